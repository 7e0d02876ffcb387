"""Picks by integers that depend on data, as one operation with all that these integers were computed from.

Which bin a sample falls in, which entry is the largest, which action was drawn by its chance: an integer says something of every
tensor that it was computed from. What is picked from such a tensor, and what is computed from the pick and that tensor
together, is of one draw. Tables of single tensors cannot show this, so the operations between become one, run on samples.

A region goes back to contractions, inputs and parameters, whose draws are independent, and on for as long as picks meet what
they are related to. It holds no contraction: where one lies on the way from one of its tensors to another, the earlier is an
operand. What has as many entries as a condition holds for is inside only if nothing outside reads it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import final

import torch

from gainstage.capture.regions.dataflow import Dataflow
from gainstage.capture.regions.region import MOST, STOPS, as_one, in_order, with_region
from gainstage.capture.regions.sizes import unsized
from gainstage.graph import Node, NodeKind, Region, TensorMeta
from gainstage.graph.families import CHOICES, GATHERS, INDEXED, INTO

_PICKS = INTO | GATHERS - {"index_select"} | {"take", "masked_select"}


def fuse_picks(nodes: Sequence[Node], wanted: Collection[str]) -> list[Node]:
    """The same graph, with one operation for each region around picks by integers that depend on data.

    Args:
        nodes: a graph without writes, its constants computed.
        wanted: names that are wanted after it: outputs, and what modules return.
    """
    flow = _Flow(nodes)
    regions: list[set[str]] = []
    for node in nodes:
        common = flow.region_of(node)
        if common:
            regions = with_region(regions, common)
    found = _Rewritten(nodes)
    for part in (part for region in regions for part in flow.apart(flow.parted(region), wanted)):
        names = flow.of_fixed_shape(flow.closed(part), wanted)
        drawn = names & part & flow.drawn(names & part)
        results = [node for node in found.among(drawn) if node.name in wanted or found.is_read_outside(node.name, names)]
        names &= flow.before({node.name for node in results}, flow.first(names))
        if results and len(names) <= MOST:
            inside = sorted((flow.nodes[name] for name in names), key=lambda node: flow.place[node.name])
            if not names & flow.dynamic or _runs(inside, flow.nodes):
                found.replace(drawn, as_one(inside, results))
    return in_order(list(found.nodes.values())) if regions else list(nodes)


@final
class _Rewritten:
    """The graph with what has become of its regions so far: new operations stand at its end."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes: dict[str, Node] = {}
        self._place: dict[str, int] = {}
        self._places = itertools.count()
        self._readers: dict[str, set[str]] = {}
        self._append(nodes)

    def among(self, names: Collection[str]) -> list[Node]:
        """Those of some nodes that are still there, in order."""
        return sorted((self.nodes[name] for name in names if name in self.nodes), key=lambda node: self._place[node.name])

    def is_read_outside(self, name: str, inside: Collection[str]) -> bool:
        """Tell whether a node is read by others than these."""
        return any(reader not in inside for reader in self._readers.get(name, ()))

    def replace(self, names: Collection[str], made: Sequence[Node]) -> None:
        """Put operations in the place of some nodes."""
        for node in self.among(names):
            del self.nodes[node.name]
            for operand in node.operands():
                self._readers[operand].discard(node.name)
        self._append(made)

    def _append(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            assert node.name not in self.nodes, f"node {node.name} stands twice"
            self.nodes[node.name] = node
            self._place[node.name] = next(self._places)
            for operand in node.operands():
                self._readers.setdefault(operand, set()).add(node.name)


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
class _Flow(Dataflow):
    """Who reads whom, and what depends on what: walks that stay within the places of the graph that a question is about."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__(nodes)
        self.stops = {
            node.name
            for node in nodes
            if node.kind is not NodeKind.OP or node.short_name in STOPS or (node.may_draw and node.short_name not in CHOICES)
        }
        self.passing = self.nodes.keys() - self.stops
        self.dynamic = unsized(self)

    def region_of(self, pick: Node) -> set[str]:
        """Operations that a pick and what it picks from have in common, down to the pick; none where they have nothing."""
        index, data = self._picked(pick)
        if not index or not data:
            return set()
        inside, ends = self._back(pick.name)
        from_index, from_data = ({*names, *self.within(names, inside)} for names in (index, data))
        common = {name for name in from_index & from_data if self.nodes[name].kind is not NodeKind.CONSTANT}
        return inside if common & (inside | ends) else set()

    def parted(self, region: set[str]) -> list[set[str]]:
        """A region in parts such that no contraction lies between two nodes of one part: before and behind the first ones.

        What neither leads to these nor comes behind them belongs to the part that reads it, with all that is computed of it.
        """
        start, end = self.first(region), self.last(region)
        between = self.before(region, start) & self.after(region, end) & self.stops
        if not between:
            return [region]
        first = {name for name in between if len(self.before({name}, start) & between) == 1}
        behind = region & self.after(first, end)
        behind |= region & self.after(region & self.before(behind, start) - self.before(first, start), end)
        return [region - behind, *self.parted(behind)]

    def grown(self, region: set[str]) -> set[str]:
        """A region with what is computed from its picks and from what they are related to, and what lies between."""
        hot = self.drawn(region)
        ends = {name for inside in region for name in self.operands[inside]} - region
        related = region | {name for name in ends if self.nodes[name].kind in (NodeKind.OP, NodeKind.INPUT)}
        behind: set[str] = set()  # a contraction lies between the region and these
        found = set(region)
        waiting = {reader for name in related for reader in self.readers[name]}  # what reads something related
        for name, read in itertools.islice(self.operands.items(), self.first(related), None):
            if not waiting:
                break
            waiting.discard(name)
            if name in region:
                continue
            if any(other in behind or (name in self.stops and (other in region or other in hot)) for other in read):
                behind.add(name)
            elif name not in self.stops and any(other in related for other in read):
                related.add(name)
                waiting.update(self.readers[name])
                if any(other in hot for other in read):
                    hot.add(name)
                    if (
                        len([other for other in read if other in related]) > 1
                        and self.is_floating(name)
                        and not self._is_of_rows(name)
                    ):
                        found.add(name)
        found |= self.before(found, self.first(found)) & self.after(found, self.last(found))
        return found | {
            name
            for other in found
            for name in self.readers[other]
            if self.nodes[name].op is operator.getitem and self.operands[name][0] == other
        }

    def apart(self, parts: Sequence[set[str]], kept: Collection[str]) -> list[set[str]]:
        """Regions as they grow from these parts, each without what a later one has or nothing but later ones read."""
        found: list[set[str]] = []
        later: set[str] = set()
        for part in reversed(parts):
            grown = self.grown(part)
            for name in sorted(grown - part - later, key=lambda name: -self.place[name]):
                if name not in kept and self.readers[name] and later.issuperset(self.readers[name]):
                    later.add(name)
            left = self.after(later & grown - part, self.last(grown))
            found.append(grown if left & part else grown - left)
            later |= found[-1]
        return found[::-1]

    def closed(self, region: set[str]) -> set[str]:
        """A region with the operations by which one of its operands is computed from others: all are of one draw.

        So are parts that were put at known places into a tensor that the region fills.
        """
        ends = {name for inside in region for name in self.operands[inside]} - region
        puts = {name for name in ends if self._is_put(name) and region.issuperset(self.readers[name])}
        region = region | puts
        ends = (ends | {name for put in puts for name in self.operands[put]}) - region
        made = (self._made_of(end, (ends | region) - {end}) for end in ends - self.stops)
        return region.union(*made)

    def _made_of(self, end: str, known: Collection[str]) -> set[str]:
        """Operations that compute a node from known ones and constants alone; none if a contraction or a pick is among them."""
        found, stack, is_related = {end}, [end], False
        while stack:
            name = stack.pop()
            if all(self._picked(self.nodes[name])):
                return set()
            for other in self.operands[name]:
                is_related |= other in known
                if other in known or other in found or self.nodes[other].kind is NodeKind.CONSTANT:
                    continue
                if other in self.stops:
                    return set()
                found.add(other)
                stack.append(other)
        return found if is_related else set()

    def _is_put(self, name: str) -> bool:
        node = self.nodes[name]
        return node.short_name in INTO and name not in self.stops and not self._picked(node)[0]

    def of_fixed_shape(self, region: set[str], kept: Collection[str]) -> set[str]:
        """A region without what has as many entries as a condition holds for, where something outside reads that."""

        def is_read_outside(name: str) -> bool:
            return name in kept or any(reader not in region for reader in self.readers[name])

        while loose := {name for name in region & self.dynamic if is_read_outside(name)}:
            region = region - self.after(loose, self.last(region))
        picks = any(all(self._picked(self.nodes[name])) for name in region)
        return region if picks and not region & self.stops else set()

    def drawn(self, region: Collection[str]) -> set[str]:
        """What depends on the integers that a region picks by, or on its picks, as far as the region goes."""
        picks = {name for name in region if all(self._picked(self.nodes[name]))}
        stack = [name for pick in picks for name in self._picked(self.nodes[pick])[0]]
        integers: set[str] = set()
        while stack:
            name = stack.pop()
            if name in region and name not in integers and not self.is_floating(name):
                integers.add(name)
                stack += self.operands[name]
        return self.after(picks | {name for name in integers if not self.is_condition(name)}, self.last(region))

    def _back(self, name: str) -> tuple[set[str], set[str]]:
        """Operations that lead to one without a contraction between, itself included, and where they end."""
        inside = {name, *self.behind(self.operands[name], self.passing)}
        ends = {other for each in inside for other in self.operands[each]}
        earlier = self.before(ends & self.stops, self.first(inside | ends))
        inside = inside - earlier | {name}
        inside -= {each for each in inside if self.nodes[each].op is operator.getitem and self.operands[each][0] in earlier}
        return inside, {other for each in inside for other in self.operands[each]} - inside

    def _picked(self, node: Node) -> tuple[list[str], list[str]]:
        """Integers and conditions that depend on data, by which a node picks, and what it picks from and lays down.

        Whole rows that one integer each picks (tokens for an expert, codes) are left to the rule of look-ups.
        """
        if node.kind is not NodeKind.OP or node.short_name not in _PICKS or not self.is_floating(node.name):
            return [], []
        read = [name for name in self.operands[node.name] if self.nodes[name].kind is not NodeKind.CONSTANT]
        index = [name for name in read if not self.is_floating(name) and self.nodes[name].kind is NodeKind.OP]
        data = [name for name in read if self.is_floating(name)]
        return ([], []) if self._is_of_rows(node.name) else (index, data)

    def _is_of_rows(self, name: str) -> bool:
        """Whether one integer each picks whole rows."""
        index = [other for other in self.operands[name] if not self.is_floating(other)]
        return self.nodes[name].short_name in INDEXED and len(index) == 1 and not self.is_condition(index[0])
