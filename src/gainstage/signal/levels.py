"""Levels: root mean square along some axes over that of the whole tensor, where coordinates differ by design.

A profile is an array with one dimension for each axis of a value, of size 1 along an axis where the level does not vary, and of
mean square 1. A slice with mean square r^2 has r^2 times the table of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gainstage.signal.axes import Axis
from gainstage.signal.quadrature import Array


def split(levels: Array | None, position: int, sizes: Sequence[int]) -> Array | None:
    """The axis at ``position`` written as a product of axes."""
    if levels is None:
        return None
    varies = levels.shape[position] > 1
    return levels.reshape(*levels.shape[:position], *(sizes if varies else [1] * len(sizes)), *levels.shape[position + 1 :])


def merge(levels: Array | None, position: int, sizes: Sequence[int]) -> Array | None:
    """Neighbouring axes from ``position`` on as one."""
    if levels is None:
        return None
    inner = levels.shape[position : position + len(sizes)]
    rest = levels.shape[position + len(sizes) :]
    if all(n == 1 for n in inner):
        return levels.reshape(*levels.shape[:position], 1, *rest)
    wide = np.broadcast_to(levels, (*levels.shape[:position], *sizes, *rest))
    return wide.reshape(*levels.shape[:position], -1, *rest)


def sliced(levels: Array | None, position: int, index: slice | int) -> tuple[Array | None, float]:
    """Part of the axis at ``position``: profile of the part, and its root mean square over that of the whole.

    With an integer index the axis goes.
    """
    if levels is None:
        return None, 1.0
    if levels.shape[position] > 1:
        part = levels[(slice(None),) * position + (index,)]
    else:
        part = levels if isinstance(index, slice) else np.take(levels, 0, axis=position)
    ratio = float(np.mean(part**2)) ** 0.5
    return (normalised(part), ratio) if ratio > 0.0 else (None, 0.0)


def normalised(levels: Array) -> Array | None:
    """With mean square 1; None where nothing varies."""
    square = float(np.mean(levels**2))
    if levels.size == 1 or square <= 0.0 or np.ptp(levels) <= 1e-9 * float(np.max(levels)):
        return None
    result = levels / square**0.5
    for position, size in enumerate(result.shape):
        first = np.take(result, [0], axis=position)
        if size > 1 and np.ptp(result - first) <= 1e-9:
            result = first
    return np.asarray(result)


def carried(operands: Sequence[tuple[Array | None, Sequence[Axis]]], axes: Sequence[Axis]) -> Array | None:
    """Profile of a sum of products: each operand's mean square over the axes that are summed, times the others'."""
    squares = np.ones((1,) * len(axes))
    for levels, own in operands:
        if levels is None:
            continue
        gone = tuple(position for position, axis in enumerate(own) if axis not in axes)
        kept = [axis for axis in own if axis in axes]
        mean = (levels**2).mean(axis=gone)
        order = sorted(range(len(kept)), key=lambda i: axes.index(kept[i]))
        shape = [1] * len(axes)
        for i in order:
            shape[axes.index(kept[i])] = mean.shape[i]
        squares = squares * mean.transpose(order).reshape(shape)
    return normalised(np.sqrt(squares))


def of_sum(terms: Sequence[tuple[Array | None, float]], axes: int) -> Array | None:
    """Profile of a sum of independent tensors with these profiles and second moments."""
    if all(levels is None for levels, _ in terms):
        return None
    ones = np.ones((1,) * axes)
    squares = sum(second * (ones if levels is None else levels**2) for levels, second in terms)
    return normalised(np.sqrt(squares))


def of_parts(parts: Sequence[tuple[Array | None, float]], sizes: Sequence[int], position: int, axes: int) -> Array | None:
    """Profile of parts with these profiles and second moments, laid one after the other along the axis at ``position``."""
    squares = []
    for (levels, second), size in zip(parts, sizes, strict=True):
        own = np.ones((1,) * axes) if levels is None else levels**2
        shape = list(own.shape)
        shape[position] = size
        squares.append(max(second, 0.0) * np.broadcast_to(own, shape))
    common = np.broadcast_shapes(*[np.take(square, [0], axis=position).shape for square in squares])
    shapes = [[*common[:position], size, *common[position + 1 :]] for size in sizes]
    wide = [np.broadcast_to(square, shape) for square, shape in zip(squares, shapes, strict=True)]
    return normalised(np.sqrt(np.concatenate(wide, axis=position)))
