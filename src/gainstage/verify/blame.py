"""What a value depends on: which parameters are nearest to it, and what follows from a fault further up."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from gainstage.graph import Graph, Node, NodeKind


def nearest_parameters(graph: Graph, starts: Iterable[str], settled: Collection[str] = ()) -> list[str]:
    """Parameters met first on the way up from some nodes, matrices before vectors, those nearest to the end first.

    A way ends at an operation that reads a matrix, and at nodes that are settled.
    """
    found: dict[str, int] = {}
    pending, seen = list(starts), set(settled)
    while pending:
        name = pending.pop(0)
        if name in seen:
            continue
        seen.add(name)
        node = graph.by_name[name]
        if node.kind is NodeKind.PARAMETER:
            found.setdefault(_parameter(node), len(found))
            continue
        read = [graph.by_name[operand] for operand in node.operands()]
        own = [operand for operand in read if operand.kind is NodeKind.PARAMETER]
        for operand in own:
            found.setdefault(_parameter(operand), len(found))
        if not any(_is_matrix(graph, operand) for operand in own):
            pending += [operand.name for operand in read if operand.kind is NodeKind.OP]
    return sorted(found, key=lambda name: (len(graph.parameters[name].shape) < 2, found[name]))


def _parameter(node: Node) -> str:
    assert node.parameter is not None
    return node.parameter


def _is_matrix(graph: Graph, node: Node) -> bool:
    return len(graph.parameters[_parameter(node)].shape) >= 2


def unused_parameters(graph: Graph) -> list[str]:
    """Parameters that reach no output of the model."""
    used = {node.parameter for node in graph.nodes if node.kind is NodeKind.PARAMETER}
    return [name for name in graph.parameters if name not in used]


def first_attention(graph: Graph, path: str) -> Sequence[str]:
    """Queries and keys (or logits) of the first attention in a module, by name."""
    for node in graph.nodes:
        if node.kind is NodeKind.OP and node.provenance.module_path == path:
            operands = list(node.operands())
            if "scaled_dot_product" in node.op_name:
                return operands[:2]
            if "softmax" in node.op_name:
                return operands[:1]
    return ()
