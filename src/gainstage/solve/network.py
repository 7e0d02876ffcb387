"""How a network maps the cosine between two inputs: the maps of its activations, composed along the graph.

Contractions with independent weights keep cosines; a sum of independent terms averages them, weighted with second moments; what
goes in no other way passes on the largest. Batch norm in training mode takes away what inputs have in common, and begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gainstage.graph import Graph, Node, NodeKind
from gainstage.signal import Value
from gainstage.solve.constraint import is_lookup

Map = Callable[[float], float]


def through_network(graph: Graph, values: Mapping[str, Any], start: float, maps: Mapping[str, Map]) -> float:
    """The largest number that arrives anywhere, from ``start`` at the inputs through the maps of the nodes that have one.

    Args:
        graph: of the network.
        values: results of its nodes, whose second moments weigh the terms of a sum.
        start: a cosine, or anything else that averages over sums.
        maps: by node: what an activation does to that number.
    """
    found: dict[str, float] = {}
    for node in graph.nodes:
        arriving = _arriving(node, found, values)
        if node.kind is NodeKind.INPUT or (graph.training and "batch_norm" in node.short_name):
            found[node.name] = start
        elif arriving is not None:
            found[node.name] = maps[node.name](arriving) if node.name in maps else arriving
        elif is_lookup(node):
            found[node.name] = start
    return max(found.values(), default=start)


def _arriving(node: Node, found: Mapping[str, float], values: Mapping[str, Any]) -> float | None:
    operands = [name for name in dict.fromkeys(node.operands()) if name in found]
    if not operands:
        return None
    if len(operands) == 1 or node.short_name not in ("add", "sub", "cat"):
        return max(found[name] for name in operands)
    weights = [_weight(values.get(name)) for name in operands]
    total = sum(weights)
    return sum(w * found[name] for w, name in zip(weights, operands, strict=True)) / total if total > 0.0 else found[operands[0]]


def _weight(value: Any) -> float:
    return value.second_moment if isinstance(value, Value) else 0.0
