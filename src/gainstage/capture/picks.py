"""Picks by integers that depend on data, as one operation with all that these integers were computed from.

Which bin a sample falls in, which entry is the largest, which expert a token goes to: an integer says something of every tensor
that it was computed from. What is picked from such a tensor, and what is computed from the pick and that tensor together, is of
one draw. Tables of single tensors cannot show this, so the operations between become one, which is run on samples.

A region goes back to contractions, inputs and parameters, whose draws are independent, and on for as long as picks meet what
they are related to. It holds no contraction: where one lies on the way from one of its tensors to another, the earlier is an
operand. What has as many entries as a condition holds for is inside only if nothing outside reads it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, final

import torch
from torch._ops import OpOverload

from gainstage.capture.regions import as_one, in_order
from gainstage.capture.views import packet_name
from gainstage.graph import Node, NodeKind, Ref, Region, TensorMeta

aten = torch.ops.aten

_VIEWS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.select_scatter.default: aten.select.int,
    aten.slice_scatter.default: aten.slice.Tensor,
}
MOST = 400  # operations in a region: it is run for each sample
_INTO = frozenset(
    {"index_put", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "masked_scatter"}
)  # the result has the shape of the first operand
_INDEXED = frozenset({"index", "_unsafe_index"})
_PICKS = _INTO | _INDEXED | {"gather", "take_along_dim", "take", "masked_select"}
_STOPS = frozenset(
    {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "mv",
     "vdot", "dot", "mm", "bmm", "matmul", "addmm", "baddbmm", "einsum", "bilinear", "embedding", "embedding_bag",
     "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu", "_grouped_mm",
     "grouped_mm_fallback"}
)  # fmt: skip


def fuse_picks(nodes: Sequence[Node], outputs: Sequence[str], marked: Collection[str]) -> list[Node]:
    """The same graph, with one operation for each region around picks by integers that depend on data.

    Args:
        nodes: a graph without writes, its constants computed.
        outputs: names of the outputs.
        marked: names that are wanted after it (what modules return).
    """
    flow = _Flow(nodes)
    regions: list[set[str]] = []
    for node in nodes:
        common = flow.region_of(node)
        if common:
            joined = [region for region in regions if region & common]
            regions = [region for region in regions if not region & common] + [common.union(*joined)]
    found = list(nodes)
    for part in (part for region in regions for part in flow.parted(region)):
        kept = {*outputs, *marked}
        names = flow.of_fixed_shape(flow.grown(part), kept)
        drawn = names & flow.drawn(names)
        outside = [node for node in found if node.name not in drawn]
        kept.update(name for node in outside if node.name not in names for name in node.operands())
        results = [node for node in found if node.name in drawn & kept]
        names = names & flow.before({node.name for node in results})
        inside = [node for node in nodes if node.name in names]
        if results and len(names) <= MOST and not (names & flow.dynamic and not _runs(inside, flow.nodes)):
            found = outside + as_one(inside, results)
    return in_order(found) if regions else found


def unsized(nodes: Sequence[Node]) -> set[str]:
    """Nodes that have as many entries as a condition holds for."""
    return _Flow(nodes).dynamic


def resized(nodes: Sequence[Node]) -> list[Node]:
    """The same graph, in which a number that is written to a part of what has no fixed size has no fixed size either."""
    found: list[Node] = []
    loose, by_name = unsized(nodes), {node.name: node for node in nodes}
    for node in nodes:
        view = None if node.op is None else _VIEWS.get(node.op)
        base, source, *place = (*node.args[:2], *node.args[2:]) if view is not None else (None, None)
        if isinstance(base, Ref) and isinstance(source, Ref) and base.name in loose and source.name not in loose:
            filling = by_name[source.name]
            part = dataclasses.replace(filling, name=f"{node.name}_part", op=view, args=(base, *place), kwargs={})
            made = dataclasses.replace(filling, name=f"{node.name}_filling")
            if filling.op is aten.full.default:
                made = dataclasses.replace(made, op=aten.full_like.default, args=(Ref(part.name), filling.args[1]), kwargs={})
            elif filling.op is aten.expand.default:
                made = dataclasses.replace(made, op=aten.expand_as.default, args=(filling.args[0], Ref(part.name)), kwargs={})
            found += [part, made]
            node = dataclasses.replace(node, args=(base, Ref(made.name), *place))  # noqa: PLW2901
        found.append(node)
    return found


def _runs(inside: Sequence[Node], nodes: Mapping[str, Node]) -> bool:
    """Whether operations of no fixed size run on other numbers than those that they were seen on."""
    (whole, *_) = as_one(inside, inside[-1:])
    assert isinstance(whole.op, Region)
    operands = [drawn for name in whole.op.operands if (drawn := _drawn(nodes[name])) is not None]
    if len(operands) < len(whole.op.operands):
        return False
    try:
        with torch.no_grad():
            whole.op(*operands)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False
    return True


def _drawn(node: Node) -> torch.Tensor | None:
    """The value of a constant, wide normals for what is not known; None for integers."""
    if node.kind is NodeKind.CONSTANT and node.value is not None:
        return None if node.value.is_meta else node.value
    if not isinstance(node.meta, TensorMeta) or not node.meta.dtype.is_floating_point:
        return None
    return 3.0 * torch.randn(node.meta.shape, generator=torch.Generator().manual_seed(0)).to(node.meta.dtype)


@final
class _Flow:
    """Who reads whom, and what depends on what."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.operands = {node.name: tuple(dict.fromkeys(node.operands())) for node in nodes}
        self.stops = {
            node.name
            for node in nodes
            if node.kind is not NodeKind.OP or node.may_draw or packet_name(node.op) in _STOPS
        }  # fmt: skip
        self.dynamic: set[str] = set()
        for node in nodes:
            if self._is_dynamic(node):
                self.dynamic.add(node.name)

    def region_of(self, pick: Node) -> set[str]:
        """Operations that a pick and what it picks from have in common, down to the pick; none where they have nothing."""
        index, data = self._picked(pick)
        if not index or not data:
            return set()
        inside, ends = self._back(pick.name)
        from_index, from_data = ({*names, *self._within(names, inside)} for names in (index, data))
        common = {name for name in from_index & from_data if self.nodes[name].kind is not NodeKind.CONSTANT}
        return inside if common & (inside | ends) else set()

    def parted(self, region: set[str]) -> list[set[str]]:
        """A region in parts such that no contraction lies between two nodes of one part: before and behind the first ones.

        What neither leads to these nor comes behind them belongs to the part that reads it.
        """
        between = self.before(region) & self.after(region) & self.stops
        if not between:
            return [region]
        first = {name for name in between if len(self.before({name}) & between) == 1}
        behind = region & self.after(first)
        behind |= region & self.before(behind) - self.before(first)
        return [region - behind, *self.parted(behind)]

    def grown(self, region: set[str]) -> set[str]:
        """A region with what is computed from its picks and from what they are related to, and what lies between."""
        hot = self.drawn(region)
        ends = {name for inside in region for name in self.operands[inside]} - region
        related = region | {name for name in ends if self.nodes[name].kind in (NodeKind.OP, NodeKind.INPUT)}
        behind: set[str] = set()  # a contraction lies between the region and these
        found = set(region)
        for name, read in self.operands.items():
            if name in region:
                continue
            if any(other in behind or (name in self.stops and other in region | hot) for other in read):
                behind.add(name)
            elif name not in self.stops and any(other in related for other in read):
                related.add(name)
                if any(other in hot for other in read):
                    hot.add(name)
                    if (
                        len([other for other in read if other in related]) > 1
                        and self._is_floating(name)
                        and not self._is_of_rows(name)
                    ):
                        found.add(name)
        found |= self.before(found) & self.after(found)
        return found | {
            name for name, read in self.operands.items() if self.nodes[name].op is operator.getitem and read[0] in found
        }

    def of_fixed_shape(self, region: set[str], kept: Collection[str]) -> set[str]:
        """A region without what has as many entries as a condition holds for, where something outside reads that."""
        while True:
            read = {other for name, operands in self.operands.items() if name not in region for other in operands} | {*kept}
            loose = region & self.dynamic & read
            if not loose:
                break
            region = region - self.after(loose)
        picks = any(all(self._picked(self.nodes[name])) for name in region)
        return region if picks and not region & self.stops else set()

    def drawn(self, region: Collection[str]) -> set[str]:
        """What depends on the integers that a region picks by, or on its picks."""
        picks = {name for name in region if all(self._picked(self.nodes[name]))}
        stack = [name for pick in picks for name in self._picked(self.nodes[pick])[0]]
        integers: set[str] = set()
        while stack:
            name = stack.pop()
            if name in region and name not in integers and not self._is_floating(name):
                integers.add(name)
                stack += self.operands[name]
        return self.after(picks | {name for name in integers if not self._is_condition(name)})

    def before(self, names: Collection[str]) -> set[str]:
        """Some nodes and all that they are computed from."""
        found = set(names)
        for name in reversed(self.operands):
            if name in found:
                found.update(self.operands[name])
        return found

    def after(self, names: Collection[str]) -> set[str]:
        """Some nodes and all that is computed from them."""
        found = set(names)
        for name, read in self.operands.items():
            if name not in found and any(other in found for other in read):
                found.add(name)
        return found

    def _back(self, name: str) -> tuple[set[str], set[str]]:
        """Operations that lead to one without a contraction between, itself included, and where they end."""
        inside = {name, *self._within([name], self.nodes.keys() - self.stops)} - (self.stops - {name})
        ends = {other for each in inside for other in self.operands[each]} & self.stops
        earlier = self.before(ends)
        inside = inside - earlier | {name}
        inside -= {each for each in inside if self.nodes[each].op is operator.getitem and self.operands[each][0] in earlier}
        return inside, {other for each in inside for other in self.operands[each]} - inside

    def _within(self, names: Collection[str], inside: Collection[str]) -> set[str]:
        """What some nodes are computed from, through the operations of a set."""
        found: set[str] = set()
        stack = list(names)
        while stack:
            for other in self.operands[stack.pop()]:
                if other not in found:
                    found.add(other)
                    if other in inside:
                        stack.append(other)
        return found

    def _picked(self, node: Node) -> tuple[list[str], list[str]]:
        """Integers and conditions that depend on data, by which a node picks, and what it picks from and lays down.

        Whole rows that one integer each picks (tokens for an expert, codes) are left to the rule of look-ups.
        """
        if node.kind is not NodeKind.OP or packet_name(node.op) not in _PICKS or not self._is_floating(node.name):
            return [], []
        read = [name for name in self.operands[node.name] if self.nodes[name].kind is not NodeKind.CONSTANT]
        index = [name for name in read if not self._is_floating(name) and self.nodes[name].kind is NodeKind.OP]
        data = [name for name in read if self._is_floating(name)]
        return ([], []) if self._is_of_rows(node.name) else (index, data)

    def _is_of_rows(self, name: str) -> bool:
        """Whether one integer each picks whole rows."""
        index = [other for other in self.operands[name] if not self._is_floating(other)]
        return packet_name(self.nodes[name].op) in _INDEXED and len(index) == 1 and not self._is_condition(index[0])

    def _is_dynamic(self, node: Node) -> bool:
        """Whether a result has as many entries as a condition holds for."""
        name, read = packet_name(node.op), self.operands[node.name]
        if not isinstance(node.op, OpOverload):
            return any(other in self.dynamic for other in read)
        if (name in _INTO and read[0] not in self.dynamic) or (isinstance(node.meta, TensorMeta) and not node.meta.shape):
            return False
        conditions = [other for other in read if self._is_condition(other) and self.nodes[other].kind is NodeKind.OP]
        is_of_values = torch.Tag.dynamic_output_shape in node.op.tags or name == "nonzero_numpy"  # which lacks the tag
        if is_of_values and (name not in _INDEXED or conditions):
            return True
        return any(other in self.dynamic for other in read)

    def _is_floating(self, name: str) -> bool:
        meta = self.nodes[name].meta
        return isinstance(meta, TensorMeta) and meta.dtype.is_floating_point

    def _is_condition(self, name: str) -> bool:
        meta = self.nodes[name].meta
        return isinstance(meta, TensorMeta) and meta.dtype is torch.bool
