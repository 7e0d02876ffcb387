"""Exponentials below their own largest, and what is made of them and of their sums: one operation.

A softmax over the neighbours of a node, as graph networks write it, takes the largest logit among the edges that end there and
the exponentials of the differences, and divides them by their sum at that node. All of this is of one draw, and edges that end at
one node share what it adds to their logits, which a table of edges does not show: the operation begins where entries of nodes are
read off at the ends of edges.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import final

from gainstage.capture.regions.dataflow import Dataflow
from gainstage.capture.regions.region import MOST, STOPS, with_region
from gainstage.graph import Node, NodeKind, Ref, Region
from gainstage.graph.families import GATHERS, UNCHANGED

_LARGEST = {"amax": 0, "max": 0, "segment_reduce": 0, "scatter_reduce": 3, "index_reduce": 3}  # -> its argument
_SUMS = {"sum": 0, "segment_reduce": 0, "scatter_reduce": 3, "scatter_add": 3, "index_add": 3, "index_put": 2, "cumsum": 0}
_MOVED = UNCHANGED | {
    "expand", "unsqueeze", "squeeze", "view", "reshape", "permute", "transpose", "getitem", "masked_fill", "where", "add",
    "clamp", "clamp_min", "log", "reciprocal", "neg", *GATHERS,
}  # fmt: skip
_MEETINGS = frozenset({"div", "mul", "sub", "add"})


def exponentials(dataflow: Dataflow) -> list[set[str]]:
    """Exponentials with the largest that they were divided by, or what they are summed to."""
    flow = _Flow(dataflow)
    regions: list[set[str]] = []
    for node in dataflow.nodes.values():
        region = flow.around(node) if node.short_name == "exp" else set()
        if region:
            regions = with_region(regions, region)
    return regions


@final
class _Flow:
    """What exponentials are made of, and what is made of them."""

    def __init__(self, dataflow: Dataflow) -> None:
        self.dataflow = dataflow
        self.nodes, self.readers = dataflow.nodes, dataflow.readers

    def around(self, exponential: Node) -> set[str]:
        """Operations that count as one with an exponential; none where it is by itself."""
        logits, largest = self._below_largest(exponential)
        core = {exponential.name} if largest is None else self.dataflow.between({largest, exponential.name})
        if self._holds_stop(core):
            return set()
        region = set(core)
        for total in self._sums_of(exponential.name):
            for end in self._meetings(total, {logits, *core}):
                wider = region | self.dataflow.between({*core, total, end})
                region = region if self._holds_stop(wider) else wider
        if len(region) == 1:
            return set()
        region |= {name for inside in region for read in self.nodes[inside].operands() for name in self._to_gathers(read)}
        region |= self.dataflow.between(region)
        return set() if self._holds_stop(region) or len(region) > MOST else region

    def _below_largest(self, exponential: Node) -> tuple[str, str | None]:
        """What an exponential is of, but for the largest that was taken off; and the operation that found this."""
        difference = self._behind(exponential.args[0].name, UNCHANGED)
        x = self.nodes[difference]
        if x.short_name != "sub" or not all(isinstance(argument, Ref) for argument in x.args[:2]):
            return difference, None
        logits = self._behind(x.args[0].name, UNCHANGED)
        largest = self._behind(x.args[1].name, _MOVED)
        place = _LARGEST.get(self.nodes[largest].short_name)
        if place is None or self._behind(self.nodes[largest].args[place].name, UNCHANGED) != logits:
            return difference, None
        return logits, largest

    def _sums_of(self, name: str) -> list[str]:
        """Operations that add up the entries of a node."""
        same = self._ahead(name, UNCHANGED)
        return [
            reader
            for each in same
            for reader in self.readers[each]
            if (place := _SUMS.get(self.nodes[reader].short_name)) is not None
            and len(self.nodes[reader].args) > place
            and self.nodes[reader].args[place] == Ref(each)
        ]

    def _meetings(self, total: str, core: Collection[str]) -> list[str]:
        """Where a sum of exponentials meets the exponentials, or what is made of them."""
        related = set(core)
        for node in self.nodes.values():
            if node.name not in related and node.name not in core and self._passes(node):
                related.update([node.name] if any(name in related for name in node.operands()) else [])
        chain = self._ahead(total, _MOVED)
        return [
            reader
            for name in chain
            for reader in self.readers[name]
            if self.nodes[reader].short_name in _MEETINGS
            and any(other in related and other not in chain for other in self.nodes[reader].operands())
        ]

    def _to_gathers(self, name: str) -> set[str]:
        """What leads to a node from where entries were read off at known places, with no parameter and no contraction between."""
        found: dict[str, set[str]] = {}
        stack = [name]
        while stack:
            each = stack[-1]
            node = self.nodes[each]
            read = [] if self._is_gather(node) or not self._passes(node) else list(dict.fromkeys(node.operands()))
            waiting = [other for other in read if other not in found]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            inside = set().union(*(found[other] for other in read))
            has_parameter = any(self.nodes[other].kind is NodeKind.PARAMETER for other in read)
            if self._is_gather(node):
                found[each] = {each}
            else:
                found[each] = {each, *inside} if inside and not has_parameter else set()
        return found[name]

    def _is_gather(self, node: Node) -> bool:
        """Whether entries are read off at places that are known."""
        if node.short_name not in GATHERS or not self._passes(node):
            return False
        first, *others = node.operands()
        return self.dataflow.is_floating(first) and all(self.nodes[name].kind is NodeKind.CONSTANT for name in others)

    def _behind(self, name: str, through: Collection[str]) -> str:
        """What a node shows, behind operations of some kinds on one tensor of numbers."""
        while self.nodes[name].short_name in through:
            read = [other for other in self.nodes[name].operands() if self._is_data(other)]
            if len(read) != 1:
                break
            (name,) = read
        return name

    def _ahead(self, name: str, through: Collection[str]) -> set[str]:
        """A node and what operations of some kinds make of it alone."""
        found, stack = {name}, [name]
        while stack:
            for reader in self.readers[stack.pop()]:
                data = [other for other in self.nodes[reader].operands() if self._is_data(other)]
                if self.nodes[reader].short_name in through and all(other in found for other in data) and reader not in found:
                    found.add(reader)
                    stack.append(reader)
        return found

    def _holds_stop(self, names: Collection[str]) -> bool:
        return not all(self._passes(self.nodes[name]) for name in names)

    def _passes(self, node: Node) -> bool:
        return node.kind is NodeKind.OP and not node.may_draw and node.short_name not in STOPS and not isinstance(node.op, Region)

    def _is_data(self, name: str) -> bool:
        """Whether a node is neither known nor made of integers."""
        node = self.nodes[name]
        return node.kind is not NodeKind.CONSTANT and (isinstance(node.meta, tuple) or self.dataflow.is_floating(name))
