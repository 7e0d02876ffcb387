"""What a calibration did: plain, frozen data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gainstage.plan import Plan

TOLERANCE = 0.02  # relative, on second moments: what counts as met


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRow:
    """One parameter, or some of its rows, at one operation that reads it.

    ``rows``: ranges (start, stop) of the parameter's output coordinate; empty for all of it. ``factor``: what these entries were
    multiplied by; where single rows have factors of their own, their geometric mean, and ``spread`` is the standard deviation of
    the logs of these factors. ``before`` is the second moment that the operation's output had with the parameter as it was (and
    all before it calibrated), ``after`` with the parameter as it is now, ``planned`` what the plan predicts there. ``note``: why
    a level is out of reach; "" where it is not.
    """

    parameter: str
    rows: tuple[tuple[int, int], ...]
    node: str
    module: str
    call: int
    factor: float
    before: float
    after: float
    planned: float
    spread: float = 0.0
    note: str = ""

    @property
    def is_met(self) -> bool:
        """The level is the planned one, to TOLERANCE."""
        return abs(self.after - self.planned) <= TOLERANCE * self.planned

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "rows": [list(span) for span in self.rows], "is_met": self.is_met}

    def __str__(self) -> str:
        """Parameter, factor, levels."""
        rows = f"[{', '.join(f'{start}:{stop}' for start, stop in self.rows[:3])}{', ...' if self.rows[3:] else ''}]"
        place = f"{self.parameter}{rows if self.rows else ''}" + (f" (call {self.call + 1})" if self.call else "")
        note = f" ({self.note})" if self.note else ""
        spread = f" (rows +-{self.spread:.1%})" if self.spread else ""
        return (
            f"{place}: x {self.factor:.4g}{spread}, level {self.before:.4g} -> {self.after:.4g}, planned {self.planned:.4g}{note}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Everything that one calibration looked at, in execution order.

    ``plan``: the plan with every distribution scaled as its parameter was: what the model is to be verified against, and what
    draws the calibrated values again from the same seed, without the data.
    """

    rows: tuple[CalibrationRow, ...]
    plan: Plan

    @property
    def scaled(self) -> tuple[CalibrationRow, ...]:
        """Rows of what was multiplied by something else than one."""
        return tuple(row for row in self.rows if row.factor != 1.0)

    @property
    def missed(self) -> tuple[CalibrationRow, ...]:
        """Rows whose level is not the planned one afterwards; each has a note."""
        return tuple(row for row in self.rows if not row.is_met)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"rows": [row.to_dict() for row in self.rows], "plan": self.plan.to_dict()}

    def __repr__(self) -> str:
        """How many levels are met, the largest changes, and all that is out of reach."""
        met = len(self.rows) - len(self.missed)
        largest = sorted(self.scaled, key=lambda row: -abs(row.factor - 1.0))[:5]
        lines = [f"Calibration({met} of {len(self.rows)} levels as planned, {len(self.scaled)} scaled)"]
        lines += [f"  {row}" for row in largest if row not in self.missed]
        return "\n".join([*lines, *(f"  out of reach: {row}" for row in self.missed)])
