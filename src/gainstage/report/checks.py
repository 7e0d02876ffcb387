"""A check as a table: prediction against measurement, then what is wrong and what to do."""

from __future__ import annotations

from rich.text import Text

from gainstage.findings import WIDEST_SPREAD
from gainstage.report.findings import finding_text
from gainstage.report.numbers import number, shape, span
from gainstage.report.tables import Block, Column, Report, blocks, plural, short_type
from gainstage.verify import Check, CheckRow


def check_report(check: Check, *, grouped: bool = True) -> Report[Block[CheckRow]]:
    """Every measured module, and the findings below.

    Args:
        check: the comparison.
        grouped: show repeated blocks as one row; those within bounds and those out of bounds stay apart, as do those without.
    """
    lines = blocks(
        check.rows,
        name=lambda row: row.path,
        key=lambda row: (row.call, row.module_type, tuple(row.shape), row.ok, row.spread > WIDEST_SPREAD),
        grouped=grouped,
    )
    within = sum(row.ok for row in check.rows)
    return Report(
        title=f"{'OK' if check.ok else 'NOT OK'}: {within} of {plural(len(check.rows), 'module output')} as predicted, "
        f"{plural(len(check.findings), 'finding')}",
        columns=_COLUMNS,
        rows=lines,
        remarks=[*(Text(remark, style="dim") for remark in _remarks(check)), *map(finding_text, check.findings)],
    )


def _remarks(check: Check) -> list[str]:
    units = "second moments; error: of the measurement, spread: of one draw, both in units of log; z: deviations"
    if all(row.spread <= WIDEST_SPREAD for row in check.rows):
        return [units]
    return [units, "any: draws stray so far from each other that none of their levels is wrong; predicted is an average of them"]


def _name(block: Block[CheckRow]) -> str:
    return (block.name or "(model)") + (f" call {block.first.call + 1}" if block.first.call else "")


def _is_lost(block: Block[CheckRow]) -> bool:
    """Draws stray so far that their average says nothing of one of them."""
    return block.first.spread > WIDEST_SPREAD


def _spread(block: Block[CheckRow]) -> str:
    """Beyond all use no number."""
    return f"> {number(WIDEST_SPREAD, 1)}" if _is_lost(block) else span(row.spread for row in block.rows)


def _verdict(block: Block[CheckRow]) -> Text:
    if block.first.ok and _is_lost(block):
        return Text("any", style="dim")
    return Text("ok", style="green") if block.first.ok else Text("off", style="bold red")


def _worst(block: Block[CheckRow]) -> str:
    return number(max((row.z for row in block.rows), key=abs), 2)


_COLUMNS: tuple[Column[Block[CheckRow]], ...] = (
    Column(heading="module", cell=_name),
    Column(heading="type", cell=lambda block: short_type(block.first.module_type), max_width=18, importance=3),
    Column(heading="shape", cell=lambda block: shape(block.first.shape), max_width=16, importance=1),
    Column(heading="predicted", cell=lambda block: span(row.predicted for row in block.rows), is_number=True),
    Column(heading="measured", cell=lambda block: span(row.measured for row in block.rows), is_number=True),
    Column(heading="ratio", cell=lambda block: span(row.ratio for row in block.rows), is_number=True),
    Column(heading="error", cell=lambda block: span(row.sampling_error for row in block.rows), is_number=True, importance=2),
    Column(heading="spread", cell=_spread, is_number=True, importance=4),
    Column(heading="max z", cell=_worst, is_number=True),
    Column(heading="", cell=_verdict),
)
