"""Edges: what a channel has at a place in all samples comes of the border of a map, and a stride may read the border more often.

Zero padding takes from what all places have in common. Of that a norm over places leaves ``b_p``, the lean of each place less the
mean lean. It is the same in all samples, and the table has the average of its square along each axis of the map:

    V = E[x_sp x_tp] - E[x_sp x_tq],      s, t two samples, p, q two places that differ along this axis.

A kernel of one tap and stride 2 reads the first row and every second one from there on: the border is twice as much of what it
reads, and so on at each such layer. V goes with the mean of ``b_p^2`` over the places that are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gainstage.signal.axes import Axis, Dim
from gainstage.signal.quadrature import Array
from gainstage.signal.traits import Edges
from gainstage.signal.value import Value

LEAST = 1e-6  # variance of the lean of places below which there is no border


def left_by_norm(x: Value, reduced: Sequence[Axis]) -> Edges | None:
    """What a norm over places leaves of edges, or of how places lean on what all have in common."""
    known, lean = dict(() if x.edges is None else x.edges.along), x.leaning()
    found = []
    for axis in reduced:
        position = x.axes.index(axis)
        profile = lean.mean(axis=tuple(p for p in range(lean.ndim) if p != position))
        profile = known.get(axis, profile)
        left = profile - profile.mean()
        square = float(np.mean(left**2))
        if profile.size > 1 and square > LEAST * float(np.mean(profile**2)):
            found.append((axis, left / square**0.5))
    return Edges(tuple(found)) if found else None


def read(x: Value, places: Sequence[NDArray[np.int64]], space: Sequence[Dim]) -> tuple[Array, Edges | None]:
    """The table of x [batch, group, channel, *space] over the places that a kernel of one tap reads, and edges of the result.

    ``places`` [outputs, taps], for each dimension of space; -1 for none.
    """
    table, found = x.table, []
    if x.edges is None or any(place.shape[1] > 1 or place.min() < 0 for place in places):
        return table, None
    known = dict(x.edges.along)
    for dim, place, out in zip(x.dims[3:], places, space, strict=True):
        if len(dim) == 1 and dim[0] in known:
            profile = known[dim[0]]
            taken = profile[place[:, 0]]
            if taken.size < profile.size:
                table = _over(table, x, dim[0], (_pairs(profile), _pairs(taken)))
            found += [(axis, taken) for axis in out]
    return table, Edges(tuple(found)) if found else None


def _pairs(profile: Array) -> Array:
    """Averages of ``b_p b_q`` over pairs of two places, and of one with itself."""
    square, size = float(np.mean(profile**2)), profile.size
    return np.array([(size * float(profile.mean()) ** 2 - square) / max(size - 1.0, 1.0), square])


def _over(table: Array, x: Value, axis: Axis, pairs: tuple[Array, Array]) -> Array:
    """With other averages of ``b_p b_q`` along an axis, in proportion to what two samples share there."""
    position = x.axes.index(axis)
    apart = table[tuple(slice(0, 1) if other in x.dims[0] else slice(None) for other in x.axes)]
    if apart.shape == table.shape:  # of one sample, which has nothing in common with another
        return table
    per_square = np.diff(apart, axis=position) / max(float(np.diff(pairs[0])[0]), 1e-12)
    gain = (pairs[1] - pairs[0]).reshape([2 if p == position else 1 for p in range(table.ndim)])
    result = np.asarray(table + np.maximum(per_square, 0.0) * gain)
    result[(1,) * table.ndim] = table[(1,) * table.ndim]
    return result
