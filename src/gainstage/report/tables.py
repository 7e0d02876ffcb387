"""What all tables share: their look, grouping, and the choice of columns by the width of the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gainstage.report.grouping import group_names

_GAP = 2  # characters between two columns
_INDENT = "  "  # before the further lines of a name

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class Block(Generic[_Row]):
    """Rows that are shown as one line, under the pattern of their names."""

    name: str
    rows: tuple[_Row, ...]

    @property
    def first(self) -> _Row:
        """The row that stands for all in what they agree on."""
        return self.rows[0]


def blocks(
    rows: Iterable[_Row], *, name: Callable[[_Row], str], key: Callable[[_Row], Hashable], grouped: bool
) -> list[Block[_Row]]:
    """Rows as lines of a table: repeated blocks as one where ``grouped``, else one line each.

    Args:
        rows: in the order of the model; names are distinct within one key.
        name: the dotted name of a row.
        key: what rows of one line agree on.
        grouped: whether to group at all.
    """
    listed = list(rows)
    if not grouped:
        return [Block(name(row), (row,)) for row in listed]
    groups = group_names([name(row) for row in listed], [key(row) for row in listed])
    return [Block(group.pattern, tuple(listed[member] for member in group.members)) for group in groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column(Generic[_Row]):
    """One column: its heading, and the text of a cell."""

    heading: str
    cell: Callable[[_Row], str | Text]
    is_number: bool = False
    importance: int | None = None  # where space is short the least important column goes first; None: it always stays
    is_prose: bool = False  # may take several lines
    max_width: int | None = None  # what is longer ends in an ellipsis; None: the column is as wide as its widest cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Generic[_Row]):
    """A title, a table, and remarks below it; a rich renderable."""

    title: str
    columns: Sequence[Column[_Row]]
    rows: Sequence[_Row]
    remarks: Sequence[Text] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay out at the width of the console."""
        filled = [(column, [_text(column.cell(row)) for row in self.rows]) for column in self.columns]
        (names, name_cells), *others = _fitting(filled, options.max_width)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column(Text(names.heading))
        for column, _ in others:
            justify: Literal["left", "right"] = "right" if column.is_number else "left"
            table.add_column(Text(column.heading), justify=justify, no_wrap=not column.is_prose, max_width=column.max_width)
        for position, name in enumerate(name_cells):
            table.add_row(_Name(name.plain), *(cells[position] for _, cells in others))
        yield Text(self.title, style="bold")
        yield ""
        yield table
        for remark in self.remarks:
            yield ""
            yield remark


_Filled = tuple[Column[_Row], list[Text]]


def _fitting(filled: list[_Filled[_Row]], width: int) -> list[_Filled[_Row]]:
    """Drop the least important columns until the first, the names, has about a third of the width, or all that it needs."""
    name = _width(filled[0])
    unbroken = max((_least_width(cell.plain) for cell in filled[0][1]), default=0)
    needed = min(name, max(unbroken, width // 3))
    kept = filled
    while needed + sum(_width(each) + _GAP for each in kept[1:]) > width:
        droppable = [each for each in kept[1:] if each[0].importance is not None]
        if not droppable:
            break
        least = min(droppable, key=lambda each: each[0].importance or 0)
        kept = [each for each in kept if each is not least]
    return kept


def _width(filled: _Filled[_Row]) -> int:
    column, cells = filled
    widest = max([cell_len(column.heading), *(cell.cell_len for cell in cells)])
    if column.is_prose:
        return cell_len(column.heading)
    return widest if column.max_width is None else min(widest, column.max_width)


@dataclass(frozen=True, slots=True)
class _Name:
    """A dotted name that is broken after a dot where it does not fit."""

    text: str

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_least_width(self.text), len(self.text)).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for component in _components(self.text):
            if lines[-1] and len(lines[-1]) + len(component) > options.max_width:
                lines.append(_INDENT)
            lines[-1] += component
        yield Text("\n".join(lines), overflow="fold")


def _components(name: str) -> list[str]:
    """A dotted name cut after its dots, but not inside ``{0..47}``."""
    return re.findall(r"(?:\{[^}]*\}|[^.{])+\.?|[.{]", name) or [""]


def _least_width(name: str) -> int:
    """Width at which a name is broken after dots only."""
    first, *rest = _components(name)
    return max([len(first), *(len(_INDENT + component) for component in rest)])


def _text(cell: str | Text) -> Text:
    """Plain text: brackets in a name are not markup."""
    return cell if isinstance(cell, Text) else Text(cell)


def short_type(module_type: str) -> str:
    """The class without its module."""
    return module_type.rpartition(".")[2]


def plural(count: int, noun: str) -> str:
    """``1 node``, ``3 nodes``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
