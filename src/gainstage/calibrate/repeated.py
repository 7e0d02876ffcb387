"""Parameters that are read several times: one scale for several levels, as near to all of them as it can bring them.

The scale that meets the plan at the first call need not at the others: a layer that is applied to its own output turns it ever
more towards its own leading directions, and what strays at one call strays by as much again at the next. With ``r_t`` the
realised over the planned level at call t, the scale is chosen such that

    max_t log r_t + min_t log r_t = 0,

which makes the largest ``|log r_t|`` the smallest that any one scale can; what drifts evenly from call to call it removes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gainstage.calibrate.result import TOLERANCE, CalibrationRow

Key = tuple[str, tuple[tuple[int, int], ...]]  # parameter, and which of its rows
PASSES = 6  # at most, the first one included
_CENTRED = 0.002  # of the log: what is left of the condition above


def repeated(rows: Sequence[CalibrationRow]) -> dict[Key, list[CalibrationRow]]:
    """Of what was scaled at its first call, the levels at all calls, where there are several."""
    found: dict[Key, list[CalibrationRow]] = {}
    for row in rows:
        found.setdefault((row.parameter, row.rows), []).append(row)
    return {
        key: calls
        for key, calls in found.items()
        if len(calls) > 1 and calls[0].factor != 1.0 and all(row.planned > 0.0 and row.after > 0.0 for row in calls)
    }


def centre(calls: Sequence[CalibrationRow]) -> float:
    """``(max + min) / 2`` of the logs of realised over planned levels."""
    logs = [math.log(row.after / row.planned) for row in calls]
    return (max(logs) + min(logs)) / 2.0


def worst(rows: Sequence[CalibrationRow]) -> float:
    """Largest ``|log r|`` of what is read several times."""
    return max((abs(math.log(row.after / row.planned)) for calls in repeated(rows).values() for row in calls), default=0.0)


@dataclass(slots=True)
class Leaning:
    """How far the first call of each parameter is to stay off its plan, found by secant steps from pass to pass."""

    tried: dict[Key, list[tuple[float, float]]] = field(default_factory=dict)
    wanted: dict[Key, float] = field(default_factory=dict)  # log of the first call's level over its plan

    def learn(self, rows: Sequence[CalibrationRow]) -> bool:
        """Take a step after a pass; False where there is nothing to be gained by another one."""
        is_open = False
        for key, calls in repeated(rows).items():
            if all(row.is_met for row in calls):
                continue
            tried = self.tried.setdefault(key, [])
            tried.append((self.wanted.get(key, 0.0), centre(calls)))
            now, off = tried[-1]
            if abs(off) <= _CENTRED:
                continue
            self.wanted[key] = now - off / _slope(tried, len(calls))
            is_open = True
        return is_open

    def factors(self) -> Mapping[Key, float]:
        """Factor of the planned level of the first call."""
        return {key: math.exp(value) for key, value in self.wanted.items()}


def _slope(tried: Sequence[tuple[float, float]], calls: int) -> float:
    """Of the centre over the lean; at first as if each call read what the one before made: the t-th goes with its t-th power."""
    if len(tried) > 1 and abs(tried[-1][0] - tried[-2][0]) > 1e-9:
        secant = (tried[-1][1] - tried[-2][1]) / (tried[-1][0] - tried[-2][0])
        return min(max(secant, 0.5), float(calls))
    return (1.0 + calls) / 2.0


NOTE = f"one scale for several calls cannot bring all of them to within {TOLERANCE:.0%}"
