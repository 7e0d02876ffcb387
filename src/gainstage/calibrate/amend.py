"""The plan that a calibrated model follows: every distribution scaled as its parameter was."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from gainstage.calibrate.sites import Ranges
from gainstage.plan import Block, Distribution, ParameterPlan, Plan, joined


@dataclass(frozen=True, slots=True)
class Scale:
    """``w -> s (w + o) - o`` for some rows (empty: all) along one dimension: one factor for all of them, or one for each."""

    dim: int
    rows: Ranges
    factors: tuple[float, ...]
    offset: float = 0.0

    def of(self, distribution: Distribution, row: int) -> Distribution:
        """Distribution of the scaled entries of a row."""
        factor = self.factors[self._place(row) if len(self.factors) > 1 else 0]
        mean = factor * (distribution.mean + self.offset) - self.offset
        return replace(distribution, mean=mean, std=factor * distribution.std)

    def edges(self) -> set[int]:
        """Rows in front of which the factor may change."""
        if len(self.factors) > 1:
            return set(range(len(self.factors) + 1)) if not self.rows else {i for a, b in self.rows for i in range(a, b + 1)}
        return {edge for span in self.rows for edge in span}

    def _place(self, row: int) -> int:
        """Which of the rows it is."""
        if not self.rows:
            return row
        return sum(min(max(row - start, 0), stop - start) for start, stop in self.rows)

    def __str__(self) -> str:
        """For a derivation."""
        times = f"times {math.exp(statistics.fmean(map(math.log, self.factors))):.6g}"
        if len(self.factors) > 1:
            times += f", single rows by {min(self.factors):.4g} to {max(self.factors):.4g}"
        return times + (f", rows {_text(self.rows)}" if self.rows else "")


def amended(plan: Plan, scales: Mapping[str, Sequence[Scale]]) -> Plan:
    """The plan with these parameters scaled: drawn with the same seed, it gives the calibrated values, without the data."""
    parameters = {name: _scaled(planned, scales.get(name, ())) for name, planned in plan.parameters.items()}
    note = f"calibrated on data: {len(scales)} of {len(parameters)} parameters were scaled after the draw"
    return replace(plan, parameters=parameters, notes=(*plan.notes, note))


def _scaled(planned: ParameterPlan, scales: Sequence[Scale]) -> ParameterPlan:
    if not scales:
        return planned
    dim = planned.blocks[0].dim if planned.blocks else scales[0].dim
    if any(scale.edges() and scale.dim != dim for scale in scales):
        return planned  # blocks along two dimensions: no plan can say that
    size = planned.shape[dim] if planned.shape else 1
    edges = {0, size, *(edge for block in planned.blocks for edge in (block.start, block.stop))}
    edges |= {edge for scale in scales for edge in scale.edges()}
    blocks = joined(_part(planned, scales, dim, start, stop) for start, stop in pairwise(sorted(edges)))
    lines = tuple(f"calibrated on data: {scale}" for scale in scales)
    return replace(
        planned,
        distribution=blocks[0].distribution,
        blocks=() if len(blocks) == 1 else blocks,
        derivation=(*planned.derivation, *lines),
    )


def _part(planned: ParameterPlan, scales: Sequence[Scale], dim: int, start: int, stop: int) -> Block:
    """Rows that are scaled by the same factors."""
    own = next((block for block in planned.blocks if block.start <= start < block.stop), None)
    distribution = planned.distribution if own is None else own.distribution
    for scale in scales:
        if not scale.rows or any(first <= start < last for first, last in scale.rows):
            distribution = scale.of(distribution, start)
    return Block(dim, start, stop, distribution, "" if own is None else own.role)


def _text(rows: Ranges) -> str:
    return ", ".join(f"{start}:{stop}" for start, stop in rows)
