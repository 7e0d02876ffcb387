"""The pass itself: measure each level where it arises, scale the parameter that sets it, go on with what it then gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch

from gainstage.calibrate.amend import Scale
from gainstage.calibrate.levels import channels_of, level, planned_level, settled, solve_factor, spread_out
from gainstage.calibrate.repeated import NOTE
from gainstage.calibrate.result import CalibrationRow
from gainstage.calibrate.sites import Key, Ranges, Site, channel_dim, gaps, overlap
from gainstage.errors import NonFiniteError
from gainstage.graph import Graph, Node
from gainstage.plan import Family, ParameterPlan, Plan
from gainstage.propagate.execution import Execution
from gainstage.signal import Value
from gainstage.solve.constraint import is_contraction, is_lookup


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of a parameter and the channels of the output that they make; empty for all of them."""

    rows: Ranges = ()
    channels: Ranges = ()


@dataclass(frozen=True, slots=True)
class _Output:
    """What an operation returned, what of it no scale acts on (None: nothing), and where its channels are."""

    whole: torch.Tensor
    rest: torch.Tensor | None
    dim: int

    def channels(self, block: _Block) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both for the channels of one block."""
        rest = None if self.rest is None else channels_of(self.rest.expand_as(self.whole), self.dim, block.channels)
        return channels_of(self.whole, self.dim, block.channels), rest


@final
@dataclass(slots=True)
class Scaling:
    """State of one pass.

    Args:
        graph: the captured model, with its inputs.
        sites: by node, where levels are set.
        plan: which parameters may be scaled.
        planned: node -> what the plan predicts there.
        tensors: parameters as they are by now; those that are scaled are replaced, never written to.
        given: logs of the factors of parameters that are read several times, which are found from pass to pass: of each row, or
            one for all.
    """

    graph: Graph
    sites: Mapping[str, Sequence[Site]]
    plan: Plan
    planned: Mapping[str, Any]
    tensors: dict[str, torch.Tensor]
    given: Mapping[Key, torch.Tensor]
    scales: dict[str, list[Scale]] = field(default_factory=dict, init=False)  # what was done to each parameter
    execution: Execution = field(init=False)

    def __post_init__(self) -> None:
        """Make the pass ready to run."""
        self.execution = Execution(self.graph, self.tensors, self.sites)

    def run(self) -> list[CalibrationRow]:
        """The whole pass.

        Raises:
            NonFiniteError: NaN or infinity at a level to be set.
            InputError: an operation fails.
        """
        rows: list[CalibrationRow] = []
        for node, result in self.execution.run():
            rows += self._settle(node, result)
        return rows

    def _settle(self, node: Node, result: Any) -> list[CalibrationRow]:
        """Of the parameters that act on one node, the first whose scale has an effect."""
        expected, output = self.planned.get(node.name), result
        if isinstance(result, (tuple, list)):
            output, expected = result[0], expected[0] if isinstance(expected, (tuple, list)) else None
        if not isinstance(expected, Value) or not isinstance(output, torch.Tensor):
            return []
        tried: list[CalibrationRow] = []
        for site in self.sites.get(node.name, ()):
            blocks = self._blocks(site, node, output)
            found = [self._row(site, node, block, output, expected) for block in blocks]
            now, found = self._attempt(site, node, output, list(zip(blocks, found, strict=True)))
            if now is not output:
                self.execution.replace(node, now)
                return found
            tried += found
        return tried

    def _blocks(self, site: Site, node: Node, output: torch.Tensor) -> list[_Block]:
        if not site.blocks or not is_contraction(node) or is_lookup(node):
            return [_Block()]
        size, width = self.tensors[site.parameter].shape[site.dim], output.shape[channel_dim(node, output.dim())]
        if width != size:  # the operation reads a part of the parameter
            return [_Block(tuple(span for rows in site.blocks for span in rows))]
        groups = [rows for rows in (*site.blocks, gaps(site.blocks, size)) if rows]
        return [_Block(rows, rows) for rows in _matrices_whole(self.plan.parameters[site.parameter], groups)]

    def _row(self, site: Site, node: Node, block: _Block, output: torch.Tensor, expected: Value) -> CalibrationRow:
        dim = channel_dim(node, output.dim())
        found = self._level(node, output, block)
        if not math.isfinite(found):
            raise NonFiniteError(f"{node.op_name} returns NaN or infinity, in {node.provenance}. The model is unchanged.")
        return CalibrationRow(
            parameter=site.parameter,
            rows=block.rows,
            node=node.name,
            module=node.provenance.module_path,
            call=node.provenance.call,
            factor=1.0,
            before=found,
            after=found,
            planned=planned_level(expected, dim, block.channels),
        )

    def _level(self, node: Node, output: torch.Tensor, block: _Block) -> float:
        return level(settled(self.execution, node, output, block.channels))

    def _attempt(
        self, site: Site, node: Node, output: torch.Tensor, blocks: Sequence[tuple[_Block, CalibrationRow]]
    ) -> tuple[torch.Tensor, list[CalibrationRow]]:
        """The output with the parameter scaled, and what was done; the output itself where nothing was."""
        offset = self._offset(site, node)
        open_blocks = any(not self._obstacle(site, block, row) for block, row in blocks)
        rest = self._rest(site, node, offset) if open_blocks and not site.is_tied else None
        parts = _Output(output, rest, channel_dim(node, output.dim()))
        apart: torch.Tensor | float = 0.0  # what levels are measured without
        if rest is not None and _is_rest([(row, parts.channels(block)[1]) for block, row in blocks]):
            blocks, apart = [(block, _without_rest(row, *parts.channels(block))) for block, row in blocks], rest
            parts = _Output(output - rest, None, parts.dim)
        rows = [self._decide(site, block, row, parts) for block, row in blocks]
        if all(row.factor == 1.0 for row in rows):
            return output, rows
        before = self.tensors[site.parameter]
        factors = spread_out(
            before.shape, site.dim, [(b.rows, self._factor(r)) for (b, _), r in zip(blocks, rows, strict=True)], before
        )
        self.tensors[site.parameter] = ((before + offset) * factors - offset).to(before.dtype)
        now = self._scaled(site, node, output, rest, [(b, r) for (b, _), r in zip(blocks, rows, strict=True)])
        found = [replace(row, after=self._level(node, now - apart, block)) for (block, _), row in zip(blocks, rows, strict=True)]
        if any(not row.is_met and not row.note for row in found):
            self.tensors[site.parameter] = before
            return output, [replace(row, factor=1.0, note=row.note or "its scale cancels on the way here") for row in rows]
        for (block, _), row in zip(blocks, found, strict=True):
            if row.factor != 1.0:
                factors_of = tuple(torch.as_tensor(self._factor(row), dtype=torch.float64).view(-1).tolist())
                self.scales.setdefault(site.parameter, []).append(Scale(site.dim, block.rows, factors_of, offset))
        return now, found

    def _scaled(
        self,
        site: Site,
        node: Node,
        output: torch.Tensor,
        rest: torch.Tensor | None,
        rows: Sequence[tuple[_Block, CalibrationRow]],
    ) -> torch.Tensor:
        """``s (y - c) + c`` where the operation reads the parameter itself; computed again where something lies between."""
        is_direct = any(self.graph.by_name[name].parameter == site.parameter for name in node.operands())
        if not is_direct or any((block.rows and not block.channels) or row.spread for block, row in rows):
            again = self.execution.compute(node)
            assert isinstance(again, torch.Tensor)
            return again
        dim = channel_dim(node, output.dim())
        along = spread_out(output.shape, dim, [(block.channels, row.factor) for block, row in rows], output)
        moved = output * along if rest is None else (output - rest) * along + rest
        return moved.to(output.dtype)

    def _obstacle(self, site: Site, block: _Block, row: CalibrationRow) -> str:
        """Why the parameter is not to be scaled here, or ""."""
        if self.plan.parameters[site.parameter].distribution.family is Family.KEEP:
            return "kept by the plan"
        if any(part.mixing is not None for part in self.plan.parameters[site.parameter].distributions):
            return "whitened: it has its level on the data that were measured, and its bias goes with it"
        if site.is_recurrent:
            return "recurrent weights act through gates, not as a scale"
        done = self.scales.get(site.parameter, ())
        if any(not block.rows or not scale.rows or overlap(block.rows, scale.rows) for scale in done):
            return NOTE
        if row.planned <= 0.0:
            return "" if row.before == 0.0 else "planned to be silent"
        return "its output is zero: there is nothing to scale" if row.before == 0.0 else ""

    def _decide(self, site: Site, block: _Block, row: CalibrationRow, output: _Output) -> CalibrationRow:
        """The row with its factor, or with the reason why it has none."""
        why = self._obstacle(site, block, row)
        if why or row.planned <= 0.0:
            return replace(row, note=why)
        if site.is_tied:
            factor = math.sqrt(_planned_square(self.plan.parameters[site.parameter]) / level(self.tensors[site.parameter]))
            return replace(row, factor=factor, note="tied to a head: the whole table is made as planned, as the head reads it")
        given = self.given.get((row.parameter, row.rows))
        if given is not None:
            return replace(row, factor=math.exp(given.mean()), spread=float(given.std(correction=0)), note=NOTE)
        factor = solve_factor(row.before, row.planned, *output.channels(block))
        if not math.isfinite(factor):
            return replace(row, note="what is added to it (a bias) is louder than planned, or its scale does nothing")
        return replace(row, factor=factor)

    def _factor(self, row: CalibrationRow) -> float | torch.Tensor:
        """What its entries are multiplied by: a number, or of each row a number."""
        given = self.given.get((row.parameter, row.rows)) if row.factor != 1.0 else None
        return row.factor if given is None else given.exp()

    def _offset(self, site: Site, node: Node) -> float:
        """``o`` where the operation multiplies by ``slope (w + o)``: 1 for a norm written as ``1 + w``, 0 for a contraction."""
        between = [name for name in node.operands() if self.execution.depends(name, site.parameter)]
        if is_contraction(node) or not between or self.graph.by_name[between[0]].parameter is not None:
            return 0.0
        tensor = self.tensors[site.parameter]
        zero, one = (
            float(self.execution.read(between[0], {site.parameter: torch.full_like(tensor, number)}).float().mean())
            for number in (0.0, 1.0)
        )
        return zero / (one - zero) if one != zero else 0.0

    def _rest(self, site: Site, node: Node, offset: float) -> torch.Tensor | None:
        """What of the output no scale of the parameter acts on, such as a bias; None where there is nothing."""
        others = [name for name in node.operands() if not self.execution.depends(name, site.parameter)]
        data = next((name for name in others if not self.execution.is_weight(name)), None)
        if offset == 0.0 and not any(bool(self.execution.read(name).any()) for name in others if name != data):
            return None
        silent = torch.full_like(self.tensors[site.parameter], -offset)
        rest = self.execution.compute(node, {site.parameter: silent})
        assert isinstance(rest, torch.Tensor)
        return rest


def _is_rest(blocks: Sequence[tuple[CalibrationRow, torch.Tensor | None]]) -> bool:
    """Whether most of a planned level is a bias: what the weight adds to it shows in the deviations from the bias alone."""
    shares = [level(rest) / row.planned if rest is not None and row.planned > 0.0 else 1.0 for row, rest in blocks]
    return all(share < 1.0 for share in shares) and any(share > 0.5 for share in shares)


def _without_rest(row: CalibrationRow, output: torch.Tensor, rest: torch.Tensor | None) -> CalibrationRow:
    """Levels less the bias, with which a fresh weight has nothing in common."""
    assert rest is not None
    found = level(output - rest)
    return replace(row, before=found, after=found, planned=row.planned - level(rest))


def _matrices_whole(planned: ParameterPlan, groups: Sequence[Ranges]) -> list[Ranges]:
    """Groups of rows, joined where they are of one orthogonal matrix, which would not be one with rows scaled differently."""
    if not planned.has_matrices:
        return list(groups)
    pieces = [(block.start, block.stop) for block in planned.blocks] or [(0, max(stop for rows in groups for _, stop in rows))]
    joined: list[Ranges] = []
    for rows in groups:
        own = [piece for piece in pieces if overlap(rows, [piece])]
        together = [other for other in joined if any(overlap(other, [piece]) for piece in own)]
        joined = [other for other in joined if other not in together]
        joined.append(tuple(sorted(span for some in (*together, rows) for span in some)))
    return joined


def _planned_square(planned: ParameterPlan) -> float:
    """Mean square of all entries, as planned."""
    spans = [(block.stop - block.start, block.distribution) for block in planned.blocks]
    size = planned.shape[planned.blocks[0].dim] if planned.blocks else 1
    spans.append((size - sum(count for count, _ in spans), planned.distribution))
    return sum(count * (part.mean**2 + part.std**2) for count, part in spans) / size
