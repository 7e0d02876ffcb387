"""Alike by chance: what two outputs of a layer read, once the mean over all of them is gone.

Batch norm divides channel c of ``y = w x`` by ``s^2 = w' C w``, C the covariance of what is read over samples and places. Over
rows of independent Gaussian weights s^2 strays by

    2 tr(C^2) / tr(C)^2 = 2 E[(x_i . x_j)^2] / E[x_i . x_i]^2,

the mean over pairs (i, j) of outputs, x_i what i reads less the mean of all. The square of the mean of ``x_i . x_j`` is in
the table of y; its variance over draws of what is read is found here. With C the covariances of entries r and s in one output
and in two, as if entries were Gaussian,

    Var(x_i . x_j) = sum over pairs (r, s) of terms of C_ii(r, s) C_jj(r, s) + C_ij(r, s) C_ij(s, r),

n for n independent terms of variance 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gainstage.signal.axes import Axis
from gainstage.signal.neighbours import pairs_by_lag
from gainstage.signal.overlap import Taps
from gainstage.signal.quadrature import Array

if TYPE_CHECKING:
    from gainstage.signal.value import Value


def averaged(table: Array, positions: Sequence[int], axes: Sequence[Axis]) -> Array:
    """Table of the mean over some axes, which stay with one entry: ``K[0] + (K[1] - K[0]) / n`` along each."""
    for position, axis in zip(positions, axes, strict=True):
        before = (slice(None),) * position
        other, same = table[(*before, slice(0, 1))], table[(*before, slice(1, 2))]
        table = other + (same - other) / axis.size
    return table


def centred(x: Value, positions: Sequence[int]) -> Array:
    """Table of x less its mean over some axes."""
    return x.table - averaged(x.table, positions, [x.axes[position] for position in positions])


def mean_square(x: Value, table: Array, positions: Sequence[int], edges: Array) -> Array:
    """Average over all pairs along some axes of the square of a table, that of x less a number for each of its entries.

    Lag by lag where near places share more: the mean of squares is more than the square of the mean that the table has. What
    all places have in common is less of those at a border: with the lean a of each, ``C (a_p - 1)(a_q - 1)`` is left of it.
    ``edges``: see :func:`border`.
    """
    axes = [x.axes[position] for position in positions]
    squares = averaged(table**2, positions, axes)
    far = tuple(0 if position in positions else 1 for position in range(table.ndim))
    squares[far] += float(edges[(-1,) * table.ndim]) ** 2
    near = x.neighbours()
    if near is None or any(x.axes.index(axis) not in positions for axis in near.axes):
        return squares
    own, distant = x.apart(near)
    along = [x.axes.index(axis) for axis in near.axes]
    rest = float(np.prod([x.axes[position].size for position in positions if position not in along]))
    squares[far] += (own - distant) ** 2 * near.variance() / rest
    return squares


def border(x: Value, positions: Sequence[int]) -> Array:
    """``C E[(a_p - 1)^2]``: variance over places of what each has more of what all have in common, by what else is shared."""
    common = averaged(x.table, positions, [x.axes[position] for position in positions])
    lean = x.leaning().mean(axis=tuple(p for p in range(x.table.ndim) if p not in positions))
    return np.maximum(common, 0.0) * float(lean.var() / lean.mean() ** 2)


def alike(
    x: Value, terms: Mapping[int, float], along: Sequence[int], places: Sequence[int], taps: Mapping[Axis, Taps]
) -> tuple[float, float]:
    """``Var(x_i . x_j) / E[x_i . x_i]^2`` of what outputs read, less the mean of all; and the level of a term of it.

    Args:
        x: what is read.
        terms: position of an axis that is summed over -> number of terms along it.
        along: positions of the axes along which outputs share their weights, those of a map among them.
        places: those of them that are among the summed as well (a map).
        taps: how a kernel runs along them.
    """
    table = centred(x, along)
    level = float(table[(1,) * table.ndim])
    if level <= 1e-9 * x.second_moment:
        return 0.0, 0.0
    edges = border(x, along)
    moving = table.copy()  # what all draws have at a place is no chance
    moving[tuple(slice(1, 2) if p in along else slice(None) for p in range(table.ndim))] -= edges
    squares = _within(x, moving, (terms, along, places), taps) + mean_square(x, table, along, edges)
    for position, count in terms.items():
        if position not in places:
            squares = squares.take([1], position) / count + squares.take([0], position) * (1.0 - 1.0 / count)
    return float(squares.ravel()[-1]) / level**2, level


def _within(
    x: Value, table: Array, reading: tuple[Mapping[int, float], Sequence[int], Sequence[int]], taps: Mapping[Axis, Taps]
) -> Array:
    """Mean over pairs of taps of the square of what one output reads; lag by lag where near places share more."""
    terms, along, places = reading
    free = [position for position in along if position not in places]
    squares = table[tuple(slice(1, 2) if p in free else slice(None) for p in range(table.ndim))] ** 2
    for position in places:
        same = 1.0 / terms[position]
        squares = squares.take([1], position) * same + squares.take([0], position) * (1.0 - same)
    near = x.neighbours()
    if near is None or any(axis not in taps for axis in near.axes):
        return squares
    own, far = x.apart(near)
    level = float(table[(1,) * table.ndim])
    pairs = np.array(1.0)
    for axis in near.axes:
        count = taps[axis].count
        pairs = np.multiply.outer(pairs, pairs_by_lag(count) / count**2)
    lagged = far + (own - far) * near.over(near.axes, pairs.shape) - own + level
    squares[tuple(0 if p in along else 1 for p in range(table.ndim))] = float((pairs * lagged**2).sum())
    return squares
