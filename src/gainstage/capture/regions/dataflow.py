"""Who reads whom in a graph, and walks along that."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from gainstage.graph import Node, TensorMeta


class Dataflow:
    """A graph as it is walked: nodes by name, their places in the order of execution, operands and readers."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.place = {node.name: place for place, node in enumerate(nodes)}
        self.operands = {node.name: tuple(dict.fromkeys(node.operands())) for node in nodes}
        self.readers: dict[str, list[str]] = {node.name: [] for node in nodes}
        for name, read in self.operands.items():
            for other in read:
                self.readers[other].append(name)

    def first(self, names: Collection[str]) -> int:
        """The place of the first of some nodes."""
        return min((self.place[name] for name in names), default=0)

    def last(self, names: Collection[str]) -> int:
        """The place of the last of some nodes."""
        return max((self.place[name] for name in names), default=0)

    def before(self, names: Collection[str], first: int = 0) -> set[str]:
        """Some nodes and all that they are computed from, from a place on."""
        found, stack = set(names), list(names)
        while stack:
            others = [name for name in self.operands[stack.pop()] if name not in found and self.place[name] >= first]
            found.update(others)
            stack += others
        return found

    def after(self, names: Collection[str], last: int) -> set[str]:
        """Some nodes and all that is computed from them, up to a place."""
        found, stack = set(names), list(names)
        while stack:
            others = [name for name in self.readers[stack.pop()] if name not in found and self.place[name] <= last]
            found.update(others)
            stack += others
        return found

    def between(self, names: Collection[str]) -> set[str]:
        """Some nodes and all that depends on them and that they depend on."""
        return self.before(names, self.first(names)) & self.after(names, self.last(names))

    def within(self, names: Collection[str], inside: Collection[str]) -> set[str]:
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

    def behind(self, names: Collection[str], inside: Collection[str]) -> set[str]:
        """Those of some nodes that a set holds, and what leads to them through it."""
        found = {name for name in names if name in inside}
        return found | {name for name in self.within(found, inside) if name in inside}

    def ahead(self, name: str, inside: Collection[str]) -> set[str]:
        """A node and what operations of a set make of it."""
        found, stack = {name}, [name]
        while stack:
            others = [reader for reader in self.readers[stack.pop()] if reader in inside and reader not in found]
            found.update(others)
            stack += others
        return found

    def is_floating(self, name: str) -> bool:
        """Whether a node is one tensor of real numbers."""
        meta = self.nodes[name].meta
        return isinstance(meta, TensorMeta) and meta.dtype.is_floating_point

    def is_condition(self, name: str) -> bool:
        """Whether a node is one tensor of booleans."""
        meta = self.nodes[name].meta
        return isinstance(meta, TensorMeta) and meta.dtype is torch.bool
