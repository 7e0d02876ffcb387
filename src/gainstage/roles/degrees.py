"""How a weight that is computed from parameters scales with each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gainstage.graph import Node, Ref
from gainstage.graph.families import JOINING, MOVEMENT, NORMS, argument, operand

Degrees = Mapping[str, float]  # parameter -> d; the value is multiplied by c^d when the parameter is by c; nan: no power of it

_HOMOGENEOUS = MOVEMENT | {
    "neg", "abs", "relu", "leaky_relu", "mean", "sum", "amax", "amin", "std", "linalg_vector_norm", "norm", "frobenius_norm",
    "norm_except_dim", "dropout", "clamp_min", "maximum",
}  # fmt: skip
_POWERS: Mapping[str, float] = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0, "reciprocal": -1.0, "var": 2.0}
_PRODUCTS = frozenset({"mul", "matmul", "mm", "bmm", "mv", "dot", "vdot", "einsum", "outer"})


def degrees_of(node: Node, name: str, weights: Mapping[str, Degrees]) -> Degrees:
    """Degrees of an operation's value in those of its operands: products add them, quotients subtract, norms have none.

    Adding a constant (the 1 of ``1 + w``) counts as linear, and so does a sum of terms of the same degree.

    Args:
        node: an operation that reads parameters and constants only.
        name: its short name.
        weights: operand -> its degrees.
    """
    found = list(weights.values())
    if name in NORMS:
        return _normalised(node, name, weights)
    if name == "_weight_norm":  # g v / |v|
        direction, length = (operand(node, place) for place in (0, 1))
        return {**dict.fromkeys(weights.get(direction or "", {}), 0.0), **weights.get(length or "", {})}
    if name in _PRODUCTS:
        return _sum(found)
    if name == "div":
        below = weights.get(operand(node, 1) or "", {})
        return _sum([weights.get(operand(node, 0) or "", {}), {key: -degree for key, degree in below.items()}])
    if name == "pow" and not isinstance(argument(node, 1), Ref):
        return _times(found[0], float(argument(node, 1)))
    if name in _POWERS:
        return _times(found[0], _POWERS[name])
    if name in ("add", "sub") or name in _HOMOGENEOUS or name in JOINING:
        return _alike(found)
    return {key: math.nan for degrees in found for key in degrees}


def _normalised(node: Node, name: str, weights: Mapping[str, Degrees]) -> Degrees:
    scale = weights.get(operand(node, NORMS[name][0]) or "", {})
    return {**{key: 0.0 for degrees in weights.values() for key in degrees}, **scale}


def _sum(found: list[Degrees]) -> Degrees:
    total: dict[str, float] = {}
    for degrees in found:
        for key, degree in degrees.items():
            total[key] = total.get(key, 0.0) + degree
    return total


def _times(degrees: Degrees, factor: float) -> Degrees:
    return {key: factor * degree for key, degree in degrees.items()}


def _alike(found: list[Degrees]) -> Degrees:
    """Terms of one sum: a parameter in several of them keeps its degree where they agree."""
    merged: dict[str, float] = {}
    for degrees in found:
        for key, degree in degrees.items():
            merged[key] = degree if merged.get(key, degree) == degree else math.nan
    return merged
