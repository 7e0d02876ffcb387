"""Training against evaluation as a table: where dropout and norms of batches make the two modes differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.text import Text

from gainstage.propagate.trace import Trace
from gainstage.report.numbers import span
from gainstage.report.tables import Block, Column, Report, blocks, plural, short_type

_ALIKE = 0.01  # relative: modules that differ by less are left out


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeRow:
    """Second moments of one module's first output in both modes."""

    path: str
    module_type: str
    training: float
    evaluation: float

    @property
    def ratio(self) -> float:
        """Evaluation over training."""
        return self.evaluation / self.training

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"path": self.path, "type": self.module_type, "training": self.training, "evaluation": self.evaluation}


def mode_rows(training: Trace, evaluation: Trace) -> list[ModeRow]:
    """Modules that are called in both modes and whose second moments differ, in execution order."""
    types = {call.path: call.module_type for call in training.calls}
    found = []
    for path, signals in training.modules.items():
        others = evaluation.modules.get(path, ())
        if others and min(signals[0].second_moment, others[0].second_moment) > 0.0:
            moments = signals[0].second_moment, others[0].second_moment
            row = ModeRow(path=path, module_type=types[path], training=moments[0], evaluation=moments[1])
            found += [row] if abs(row.ratio - 1.0) > _ALIKE else []
    return found


def modes_report(rows: list[ModeRow], *, grouped: bool = True) -> Report[Block[ModeRow]]:
    """The modules that differ.

    Args:
        rows: of a model.
        grouped: show repeated blocks as one row, with the range of their values.
    """
    return Report(
        title=f"Second moments in training and in evaluation: {plural(len(rows), 'module')} differ",
        columns=_COLUMNS,
        rows=blocks(rows, name=lambda row: row.path, key=lambda row: row.module_type, grouped=grouped),
        remarks=[Text("a plan holds for the mode that the model is in when it is made", style="dim")],
    )


_COLUMNS: tuple[Column[Block[ModeRow]], ...] = (
    Column(heading="module", cell=lambda block: block.name or "(model)"),
    Column(heading="type", cell=lambda block: short_type(block.first.module_type), max_width=18, importance=1),
    Column(heading="training", cell=lambda block: span(row.training for row in block.rows), is_number=True),
    Column(heading="evaluation", cell=lambda block: span(row.evaluation for row in block.rows), is_number=True),
    Column(heading="ratio", cell=lambda block: span(row.ratio for row in block.rows), is_number=True),
)
