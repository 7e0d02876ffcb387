"""Two uses as one: like operations on different tensors, with the same weights.

A module that is called on x and on x' is a module that is called on a batch of the two. So two operands become one with an axis
more, of which x and x' are two coordinates: ``K[same]`` is the table of one of them, ``K[another] = E[x_i x'_j]``. The rule of
the operation takes it from there, and of its result ``K[another] = E[y_i y'_j]``. The axis has size 1: shapes stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gainstage.signal.axes import Axis, descends
from gainstage.signal.copies import replace
from gainstage.signal.quadrature import Array, expectation
from gainstage.signal.traits import Origin
from gainstage.signal.value import Value

Covariance = Callable[[Value, Value], Array | None]


def is_same(x: Value, y: Value) -> bool:
    """Whether two values are one tensor: one object, one weight in the same form, or a function of the same computed twice."""
    if x is y or (x.marginal is y.marginal and x.dims == y.dims):
        return True
    first, second = x.origin, y.origin
    if first is None or second is None or not x.is_weight or first.value is not x or second.value is not y:
        return False
    return are_alike(first, second) and all(map(is_same, first.inputs, second.inputs))


def are_alike(first: Origin, second: Origin) -> bool:
    """Whether two tensors came of the same operation with the same settings and the same constants, on whatever tensors."""
    if first.call != second.call or first.part != second.part or len(first.inputs) != len(second.inputs):
        return False
    pairs = zip(first.inputs, second.inputs, strict=True)
    return all((x.constant is None and y.constant is None) or is_same(x, y) for x, y in pairs)


def covariance_of_uses(first: Origin, second: Origin, covariance: Covariance) -> Array | None:
    """``E[y_i y'_j] - E[y] E[y']`` of like operations; None where the rule loses sight of the two operands.

    Of uses at different levels the operation is evaluated at the first's: ``E[x x']`` enters, and ``E[y y']`` leaves, relative to
    the root mean squares.
    """
    another: list[Array | None] = []
    sign = 1.0
    for x, y in zip(first.inputs, second.inputs, strict=True):
        if is_same(x, y):
            another.append(x.table if first.draws and not x.is_weight else None)
            continue
        if x.is_weight and y.is_weight and x.marginal.latent == y.marginal.latent and x.dims == y.dims:  # multiples of one weight
            another.append(None)
            sign *= float(np.sign(expectation(x.marginal.values * y.marginal.values)))
            continue
        if x.is_weight or x.shape != y.shape:
            return None
        common = covariance(x, y)
        another.append((x.mean * y.mean + (0.0 if common is None else common)) * _ratio(x, y) * np.ones_like(x.table))
    if all(table is None for table in another):
        return np.asarray(sign * first.value.covariance / _ratio(first.value, second.value))
    made = _between_uses(first, another)
    if made is None or made.ndim != first.value.table.ndim:
        return None
    return np.asarray(sign * made / _ratio(first.value, second.value) - first.value.mean * second.value.mean)


def _between_uses(origin: Origin, another: Sequence[Array | None]) -> Array | None:
    """``K[another]`` of a result from that of the operands, in the first dimension in which the operation keeps the axis."""
    rank = max(len(x.dims) for x, table in zip(origin.inputs, another, strict=True) if table is not None)
    for dim in range(rank):
        use = Axis(1)
        operands = [
            x if table is None or len(x.dims) < rank else _in_two_uses(x, dim, use, table)
            for x, table in zip(origin.inputs, another, strict=True)
        ]
        try:
            result: Any = origin.run(operands)
        except Exception:  # noqa: BLE001, S112  (the rule counts on having no more axes than the operation has)
            continue
        made: Value = result if origin.part is None else result[origin.part]
        if any(descends(axis, [use]) for axis in made.axes):  # of a product that is summed over places, once for each factor
            return made.table[tuple(0 if descends(axis, [use]) else slice(None) for axis in made.axes)]
    return None


def _ratio(x: Value, y: Value) -> float:
    """Root mean square of x over that of y."""
    return (x.second_moment / y.second_moment) ** 0.5 if min(x.second_moment, y.second_moment) > 0.0 else 1.0


def _in_two_uses(x: Value, dim: int, use: Axis, another: Array) -> Value:
    """A tensor with an axis before those of a dimension, along which another coordinate is another tensor."""
    position = sum(len(axes) for axes in x.dims[:dim])
    table = np.stack([np.clip(another, -x.second_moment, x.second_moment), x.table], axis=position)
    dims = tuple((use, *axes) if d == dim else axes for d, axes in enumerate(x.dims))
    return replace(
        x, dims=dims, table=table, rho=None, source=object(), amplitude=None, tilt=None, origin=None, sum=None,
        levels=None if x.levels is None else np.expand_dims(x.levels, position),
    )  # fmt: skip
