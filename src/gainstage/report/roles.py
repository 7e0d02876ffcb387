"""Roles as a table: what every parameter is for, and why."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

from gainstage.report.tables import Block, Column, Report, blocks, plural
from gainstage.roles import Roles


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleRow:
    """What a parameter, or some of its rows, is for."""

    parameter: str
    rows: str
    role: str
    reason: str


def roles_report(roles: Roles, *, grouped: bool = True) -> Report[Block[RoleRow]]:
    """A row for each parameter and role of its rows, with the first reason.

    Args:
        roles: of a model.
        grouped: show repeated blocks as one row.
    """
    rows = [row for name in roles.uses for row in _rows(roles, name)]
    return Report(
        title=f"What {plural(len(roles.uses), 'parameter')} are for",
        columns=_COLUMNS,
        rows=blocks(rows, name=lambda row: row.parameter, key=lambda row: (row.role, row.rows), grouped=grouped),
        remarks=[Text("another role: --role 'PATTERN=ROLE', a pattern of parameter names or module paths", style="dim")],
    )


def _rows(roles: Roles, name: str) -> list[RoleRow]:
    found: dict[tuple[str, str], RoleRow] = {}
    for use in roles.uses[name]:
        rows = ", ".join(f"{start}:{stop}" for start, stop in use.rows)
        row = RoleRow(parameter=name, rows=rows, role=use.role.value, reason=use.reason)
        found.setdefault((row.rows, row.role), row)
    return list(found.values()) or [RoleRow(parameter=name, rows="", role=roles.of(name).value, reason="reaches no output")]


_COLUMNS: tuple[Column[Block[RoleRow]], ...] = (
    Column(heading="parameter", cell=lambda block: block.name),
    Column(heading="rows", cell=lambda block: block.first.rows, max_width=12, importance=1),
    Column(heading="role", cell=lambda block: block.first.role),
    Column(heading="because", cell=lambda block: block.first.reason, is_prose=True),
)
