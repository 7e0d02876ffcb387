"""Branches that stochastic depth drops for all samples at once: nothing is measured where something was predicted, rightly."""

from __future__ import annotations

import math

from gainstage.graph import Graph, Node, TensorMeta
from gainstage.graph.families import MOVEMENT

_SCALED = MOVEMENT | {"mul", "div"}  # what is nothing where a factor is


def chance_of_nothing(graph: Graph, name: str) -> float:
    """Probability that all coins of one of the masks that a tensor is multiplied by fall on zero: ``(1 - p)^n`` for n coins."""
    node = graph.by_name[name]
    if node.short_name == "bernoulli":
        return _all_zero(node)
    if node.short_name not in _SCALED:
        return 0.0
    return 1.0 - math.prod(1.0 - chance_of_nothing(graph, operand) for operand in dict.fromkeys(node.operands()))


def _all_zero(coins: Node) -> float:
    p = coins.args[1] if len(coins.args) > 1 else coins.kwargs.get("p")
    if not isinstance(p, float) or not isinstance(coins.meta, TensorMeta):
        return 0.0
    return float((1.0 - p) ** math.prod(coins.meta.shape))
