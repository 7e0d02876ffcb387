"""Which parameters are data: nothing contracts them, and the same of their entries enter every sample."""

from __future__ import annotations

from gainstage.graph import Graph, NodeKind
from gainstage.graph.families import LOOKUP
from gainstage.roles.model import TABLES, Role


def is_data(graph: Graph, parameter: str, role: Role) -> bool:
    """Tell whether a parameter is a table that is added or joined as it is, or looked up at places that are always the same."""
    if role in TABLES:
        return True
    if role is not Role.EMBEDDING:
        return False
    source = next(node.name for node in graph.nodes if node.parameter == parameter)
    readers = [node for node in graph.nodes if source in node.operands()]
    return all(
        node.short_name in LOOKUP and all(_is_constant(graph, name) for name in node.operands() if name != source)
        for node in readers
    )


def _is_constant(graph: Graph, name: str) -> bool:
    stack = [name]
    while stack:
        node = graph.by_name[stack.pop()]
        if node.kind not in (NodeKind.CONSTANT, NodeKind.OP):
            return False
        stack += node.operands()
    return True
