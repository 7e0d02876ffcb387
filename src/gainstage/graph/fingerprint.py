"""A short name for what a plan depends on in a graph."""

from __future__ import annotations

import hashlib

from gainstage.graph.model import Graph, NodeKind


def fingerprint(graph: Graph) -> str:
    """SHA-256 of the parameters (names, ties, shapes, element types) and of the operations that read them, in order.

    Args:
        graph: a captured model.

    Returns:
        64 hexadecimal digits. Batch size, values, device and mode (train or eval) do not enter: operations without
        parameters may differ between a meta build and a real one (a copy to contiguous memory).
    """
    digest = hashlib.sha256()
    for info in graph.parameters.values():
        digest.update(repr((info.name, info.aliases, info.shape, str(info.dtype))).encode())
    parameter_of = {node.name: node.parameter for node in graph.nodes if node.kind is NodeKind.PARAMETER}
    for node in graph.nodes:
        read = [parameter_of[name] for name in node.operands() if name in parameter_of]
        if read:
            digest.update(repr((node.op_name, read)).encode())
    return digest.hexdigest()
