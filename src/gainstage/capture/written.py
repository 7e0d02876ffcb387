"""What is written out is read from its end: through operations that change nothing, or next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gainstage.graph import Node, NodeKind, Ref

NEGLIGIBLE = 1e-6  # added to a divisor, or the least that it may be, so that nothing is divided by zero


class Written:
    """What the nodes of a graph stand for."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = {node.name: node for node in nodes}

    def peeled(self, read: Ref, through: frozenset[str], also: Callable[[Node], bool] = lambda _: False) -> Node:
        """The node behind operations that change no entry, or next to nothing."""
        node = self.nodes[read.name]
        while node.kind is NodeKind.OP and (node.short_name in through or also(node)):
            node = self.nodes[node.args[0].name]
        return node


def is_negligible(node: Node) -> bool:
    """Whether a node adds next to nothing to a divisor, or holds it above next to nothing."""
    if node.short_name not in ("add", "clamp", "clamp_min") or len(node.args) != 2 or node.kwargs:
        return False
    return isinstance(node.args[1], (int, float)) and 0.0 <= node.args[1] <= NEGLIGIBLE
