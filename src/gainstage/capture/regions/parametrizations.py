"""Parametrizations: a weight that is contracted with what was computed from it depends on that entry by entry.

Its spectral norm and its orthogonal factor are such; so the weight, as it is read, is one operation on the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

from gainstage.capture.regions.dataflow import Dataflow
from gainstage.capture.regions.region import as_one
from gainstage.graph import Node, NodeKind, Ref, TensorMeta
from gainstage.graph.families import CONTRACTIONS, CONVOLUTIONS, ROW_READS

_WEIGHTED = CONVOLUTIONS | {"linear"}


def fuse_parametrizations(nodes: Sequence[Node]) -> list[Node]:
    """The same graph, with one operation for each weight that is computed by contracting a parameter with functions of itself.

    Args:
        nodes: a graph without writes, its constants computed.
    """

    def is_data(node: Node) -> bool:
        return node.may_draw or node.short_name in ROW_READS

    made_of: dict[str, set[str]] = {}  # weights -> the parameters that they are computed from
    entangled: set[str] = set()  # weights on the way to which a parameter met itself
    for node in nodes:
        operands = list(dict.fromkeys(node.operands()))
        if node.kind is NodeKind.PARAMETER:
            made_of[node.name] = {node.name}
        elif node.kind is NodeKind.CONSTANT:
            made_of[node.name] = set()
        elif node.kind is NodeKind.OP and not is_data(node) and all(name in made_of for name in operands):
            made_of[node.name] = set().union(*(made_of[name] for name in operands))
            parts = [made_of[name] for name in operands]
            meets = len(set().union(*parts)) < sum(len(part) for part in parts) and node.short_name in CONTRACTIONS
            if meets or node.short_name.startswith("linalg_") or any(name in entangled for name in operands):
                entangled.add(node.name)
    weights = {node.name for node in nodes if node.name in made_of and node.kind is NodeKind.OP}
    dataflow = Dataflow(nodes)
    read = {node.args[1].name for node in nodes if node.short_name in _WEIGHTED and isinstance(node.args[1], Ref)}
    found = list(nodes)
    for place, result in enumerate(nodes):
        if result.name in weights & read & entangled and isinstance(result.meta, TensorMeta):
            inside = dataflow.behind([result.name], weights)
            found[place] = as_one([node for node in nodes if node.name in inside], [result])[0]
    return found
