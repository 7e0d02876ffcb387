"""The plan that a calibrated model follows: every distribution scaled as its parameter was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from gainstage.calibrate.sites import Ranges
from gainstage.plan import Block, Distribution, ParameterPlan, Plan


@dataclass(frozen=True, slots=True)
class Scale:
    """``w -> s (w + o) - o`` for some rows (empty: all) along one dimension."""

    dim: int
    rows: Ranges
    factor: float
    offset: float = 0.0

    def of(self, distribution: Distribution) -> Distribution:
        """Distribution of the scaled entries."""
        mean = self.factor * (distribution.mean + self.offset) - self.offset
        return replace(distribution, mean=mean, std=self.factor * distribution.std)


def amended(plan: Plan, scales: Mapping[str, Sequence[Scale]]) -> Plan:
    """The plan with these parameters scaled: drawn with the same seed, it gives the calibrated values, without the data."""
    parameters = {name: _scaled(planned, scales.get(name, ())) for name, planned in plan.parameters.items()}
    note = f"calibrated on data: {len(scales)} of {len(parameters)} parameters were scaled after the draw"
    return replace(plan, parameters=parameters, notes=(*plan.notes, note))


def _scaled(planned: ParameterPlan, scales: Sequence[Scale]) -> ParameterPlan:
    if not scales:
        return planned
    dim = planned.blocks[0].dim if planned.blocks else scales[0].dim
    if any(scale.rows and scale.dim != dim for scale in scales):
        return planned  # blocks along two dimensions: no plan can say that
    size = planned.shape[dim] if planned.shape else 1
    edges = {0, size, *(edge for block in planned.blocks for edge in (block.start, block.stop))}
    edges |= {edge for scale in scales for span in scale.rows for edge in span}
    parts = [(start, stop, _distribution(planned, scales, start)) for start, stop in pairwise(sorted(edges))]
    blocks = _joined(dim, parts)
    lines = tuple(
        f"calibrated on data: times {scale.factor:.6g}" + (f", rows {_text(scale.rows)}" if scale.rows else "")
        for scale in scales
    )
    return replace(
        planned,
        distribution=blocks[0].distribution,
        blocks=() if len(blocks) == 1 else tuple(blocks),
        derivation=(*planned.derivation, *lines),
    )


def _distribution(planned: ParameterPlan, scales: Sequence[Scale], row: int) -> Distribution:
    own = (block.distribution for block in planned.blocks if block.start <= row < block.stop)
    distribution = next(own, planned.distribution)
    for scale in scales:
        if not scale.rows or any(start <= row < stop for start, stop in scale.rows):
            distribution = scale.of(distribution)
    return distribution


def _joined(dim: int, parts: Iterable[tuple[int, int, Distribution]]) -> list[Block]:
    blocks: list[Block] = []
    for start, stop, distribution in parts:
        if blocks and blocks[-1].distribution == distribution:
            blocks[-1] = Block(dim, blocks[-1].start, stop, distribution)
        else:
            blocks.append(Block(dim, start, stop, distribution))
    return blocks


def _text(rows: Ranges) -> str:
    return ", ".join(f"{start}:{stop}" for start, stop in rows)
