"""Neighbours: along the axes of a map, entries near each other share more than those far apart.

For two entries of a tensor that differ in their place on the map only, at the distance d (a lag along each axis of the map),

    E[x_p x_{p+d}] = far + (own - far) e(d),   e(0) = 1,   e(d) = 0 beyond the array,

with ``own = E[x^2]``, at equal levels. White noise has e = 0 but at 0; pools, interpolation and strides make and
move it; activations act on it lag by lag; a sum over channels and taps with fresh weights leaves it as it is, but for padding:
positions near each other lack the same taps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gainstage.signal.axes import Axis
from gainstage.signal.copies import replace
from gainstage.signal.quadrature import Array, matmul

REACH = 12  # lags kept
SMALL = 2e-3  # of the variance: what is below is as good as far


def pairs_by_lag(count: int) -> Array:
    """How many ordered pairs of ``count`` places in a row lie at each lag: ``n`` at 0, ``2 (n - d)`` at d."""
    lags = np.arange(count)
    return np.where(lags > 0, 2.0, 1.0) * (count - lags)


@lru_cache(maxsize=1024)
def _shares(size: int, lags: int) -> Array:
    """Shares of pairs that lie at each of the first lags: of pairs of different places in a row, and of equal ones."""
    lag = np.arange(lags)
    apart = np.where(lag > 0, 2.0 * np.maximum(size - lag, 0) / (size * max(size - 1.0, 1.0)), 0.0)
    return np.stack([apart, np.where(lag > 0, 0.0, 1.0)])


def padded(part: Array, shape: Sequence[int]) -> Array:
    """An array of this shape that begins with a smaller one, and is 0 beyond."""
    if part.shape == tuple(shape):
        return part
    whole = np.zeros(shape)
    whole[tuple(slice(0, size) for size in part.shape)] = part
    return whole


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """``excess``: e(d), one dimension for each of the axes; void for a tensor that lacks one of them.

    ``ties``: of places that hold the largest of windows, the share of their window that two places have in common.
    """

    axes: tuple[Axis, ...]
    excess: Array
    ties: Array | None = None

    def with_axis(self, axis: Axis) -> Neighbours:
        """Also along an axis in which neighbours share no more than others."""
        return self if axis in self.axes else Neighbours((*self.axes, axis), self.excess[..., None])

    def renamed(self, old: Sequence[Axis], new: Sequence[Axis]) -> Neighbours:
        """The same with axes under other identities."""
        names = dict(zip(map(id, old), new, strict=True))
        return replace(self, axes=tuple(names.get(id(axis), axis) for axis in self.axes))

    def lags(self, axis: Axis) -> int:
        """How many lags are kept along an axis."""
        return self.excess.shape[self.axes.index(axis)] if axis in self.axes else 1

    def over(self, axes: tuple[Axis, ...], shape: Sequence[int]) -> Array:
        """``e(d)`` along more axes and further lags."""
        wide = self
        for axis in axes:
            wide = wide.with_axis(axis)
        excess = np.transpose(wide.excess, [wide.axes.index(axis) for axis in axes])
        cut = excess[tuple(slice(0, n) for n in shape)]
        return padded(cut, shape)

    def average(self, same: Sequence[bool]) -> float:
        """Average of e over pairs of places that are equal along some of the axes and differ along the others."""
        part = self.excess
        for axis, equal in zip(reversed(self.axes), reversed(list(same)), strict=True):
            part = part @ _shares(axis.size, part.shape[-1])[int(equal)]
        return float(part)

    def variance(self) -> float:
        """Average over all pairs of places of the square of e, less that of its averages by the axes along which they differ."""
        averages, squares, shares = self.excess, self.excess**2, np.ones(())
        order = (len(self.axes) - 1, *range(len(self.axes) - 1))
        for axis in reversed(self.axes):  # each goes to the front as it is averaged over
            by_lag = _shares(axis.size, averages.shape[-1]).T
            averages, squares = ((part @ by_lag).transpose(order) for part in (averages, squares))
            shares = np.multiply.outer(np.array([(axis.size - 1.0) / axis.size, 1.0 / axis.size]), shares)
        return float((shares * (squares - averages**2)).sum())

    def strided(self, axis: Axis, stride: int, out: tuple[Axis, ...]) -> Neighbours:
        """Every so many places along an axis; without it where one place is left."""
        if axis not in self.axes:
            return self
        position = self.axes.index(axis)
        if not out:
            rest = tuple(a for a in self.axes if a is not axis)
            return Neighbours(rest, np.take(self.excess, 0, axis=position))
        axes = tuple(out[0] if a is axis else a for a in self.axes)
        return Neighbours(axes, self.excess[(slice(None),) * position + (slice(None, None, stride),)])


def made(axes: tuple[Axis, ...], excess: Array) -> Neighbours | None:
    """Neighbours from e(d), cut where nothing is left; None where there is nothing at all."""
    keep = []
    for position in range(excess.ndim):
        others = tuple(p for p in range(excess.ndim) if p != position)
        strong = np.nonzero(np.abs(excess).max(axis=others) > SMALL)[0]
        keep.append(slice(0, min(int(strong[-1]) + 1, REACH) if strong.size else 1))
    excess = excess[tuple(keep)]
    if not axes or excess.size == 1:
        return None
    return Neighbours(axes, np.clip(excess, -1.0, 1.0))


def cut(near: Neighbours) -> Neighbours | None:
    """None where nothing is left."""
    return made(near.axes, near.excess)


def far_of(near: Neighbours, table: Array, axes: Sequence[Axis]) -> tuple[float, float]:
    """``own`` and ``far`` of a tensor from its table."""
    own = float(table[(1,) * table.ndim])
    average = near.average([False] * len(near.axes))
    apart = float(table[tuple(0 if axis in near.axes else 1 for axis in axes)])
    return own, (apart - own * average) / (1.0 - average) if average < 1.0 - 1e-9 else own


def write(near: Neighbours, table: Array, axes: Sequence[Axis], moments: tuple[float, float], factors: Sequence[float]) -> Array:
    """Table whose averages over places are those of ``far + (own - far) e``, times a factor for each axis that differs."""
    own, far = moments
    result = table.copy()
    for same in np.ndindex(*(2,) * len(near.axes)):
        if not all(same):
            index = [1] * len(axes)
            for axis, equal in zip(near.axes, same, strict=True):
                index[list(axes).index(axis)] = equal
            factor = float(np.prod([1.0 if equal else factor for equal, factor in zip(same, factors, strict=True)]))
            result[tuple(index)] = factor * (far + (own - far) * near.average([bool(equal) for equal in same]))
    return result


def by_lag_apart(near: Neighbours, own: float, far: float, same: float, other: float) -> tuple[float, float]:
    """``k, c`` of what places of two maps of a kind share at the distance d > 0, ``c + k e(d)``: maps of two samples or channels.

    Given what they share at the same place, and on average at two. What a sample has alone, ``D(d)``, is as if it fell with the
    lag as all of it does, ``D(0) a e(d)``; or ``D(0) (1 - a + a e(d))`` where it falls less, as between two channels, which share
    nothing that goes with the lag.
    """
    alone, average = max(own - same, 0.0), near.average([False] * len(near.axes))
    left = min(max((far + (own - far) * average - other) / alone, 0.0), 1.0) if alone > 0.0 else 0.0
    if left < average:
        return own - far - alone * left / average, far
    falling = alone * (1.0 - left) / (1.0 - average) if average < 1.0 else 0.0
    return own - far - falling, far - alone + falling


def through(
    near: Neighbours, own: float, far: float, function: Callable[[Array], Array], tied: tuple[Array, Array] | None = None
) -> tuple[Neighbours | None, float]:
    """Lag by lag through a map of second moments; returns ``far`` after it as well.

    ``tied``: what of ``own - far`` places share for what they hold in common, before and after; the map is for the rest of them.
    """
    before, after = (np.zeros(1),) * 2 if tied is None else tied
    alone, distant = (float(function(np.array([moment]))[0]) for moment in (own, far))
    if alone <= distant:
        return None, distant
    rest = np.where(before < 1.0, (near.excess - before) / np.where(before < 1.0, 1.0 - before, 1.0), 1.0)
    moments = function(far + (own - far) * rest)
    found = made(near.axes, after + (1.0 - after) * (moments - distant) / (alone - distant))
    return None if found is None else replace(found, ties=near.ties), distant


def _on(near: Neighbours | None, axes: Sequence[Axis]) -> Neighbours | None:
    """What is left of it on these axes: a map that was flattened and joined to something else has none."""
    return near if near is not None and all(axis in axes for axis in near.axes) else None


def mixed(terms: Sequence[tuple[Neighbours | None, float]], axes: Sequence[Axis]) -> Neighbours | None:
    """e(d) of a sum or a concatenation: the average of the terms' by what each has of ``own - far``."""
    terms = [(_on(near, axes), weight) for near, weight in terms]
    present = [near for near, _ in terms if near is not None]
    total = sum(weight for _, weight in terms)
    if not present or total <= 0.0:
        return None
    over = tuple(axis for axis in axes if any(axis in near.axes for near in present))
    shape = [max(near.lags(axis) for near in present) for axis in over]
    white = np.zeros(shape)
    white[(0,) * len(over)] = 1.0
    return made(over, np.asarray(sum(w / total * (white if near is None else near.over(over, shape)) for near, w in terms)))


def by_lag(matrix: Array) -> Array:
    """Averages along the diagonals of a symmetric matrix, by their distance from the main one."""
    size = min(matrix.shape[0], REACH)
    return np.array([float(np.mean(np.diagonal(matrix, lag))) for lag in range(size)])


def beyond(along: Array, total: float, size: int) -> float:
    """Average over pairs of places farther apart than lags are kept, from the averages at each lag and the sum of all pairs.

    Of the farthest pairs where all lags are kept.
    """
    count = pairs_by_lag(size)
    reach = min(REACH, size - 1)
    return float((total - along[:reach] @ count[:reach]) / count[reach:].sum())


def outer(along: Sequence[Array]) -> Array:
    """Product of one factor for each axis."""
    result = np.ones(1)
    for factor in along:
        result = result[..., None] * factor
    return np.asarray(result[0])


def filtered(near: Neighbours, axis: Axis, matrix: Array) -> tuple[Array, Array]:
    """``M E M'`` for a linear map M along one axis: e(d) before it is scaled to 1, and its average over pairs of outputs.

    Returns the lags [along the axis, all other lags] and pairs [another or the same output, all other lags].
    """
    position = near.axes.index(axis)
    excess = np.moveaxis(near.excess, position, 0)
    columns = excess.reshape(excess.shape[0], -1)
    outputs = matrix.shape[0]
    share = _picked if np.count_nonzero(matrix, axis=1).max() <= 1 else _combined
    lags, pairs = [], []
    for column in columns.T:
        along, total = share(matrix, column)
        trace = float(along[0]) * outputs
        lags.append(along)
        pairs.append([(total - trace) / max(outputs * (outputs - 1.0), 1.0), trace / outputs])
    shape = (-1, *excess.shape[1:])
    return np.moveaxis(np.array(lags).T.reshape(shape), 0, position), np.array(pairs).T


def _combined(matrix: Array, column: Array) -> tuple[Array, float]:
    """``M E M'`` by lag, and its sum over all pairs of outputs."""
    size = matrix.shape[1]
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    pad = np.where(distance < len(column), column[np.minimum(distance, len(column) - 1)], 0.0)
    product = matmul(matmul(matrix, pad), matrix.T)
    return by_lag(product), float(product.sum())


def _picked(matrix: Array, column: Array) -> tuple[Array, float]:
    """The same where each output is a multiple of one input: entries of E, looked up."""
    outputs = matrix.shape[0]
    places = np.abs(matrix).argmax(1)
    factors = matrix[np.arange(outputs), places]
    beyond_reach = np.append(column, 0.0)
    along = np.array(
        [
            np.mean(
                factors[: outputs - lag]
                * factors[lag:]
                * beyond_reach[np.minimum(np.abs(places[lag:] - places[: outputs - lag]), len(column))]
            )
            for lag in range(min(outputs, REACH))
        ]
    )
    sums = matrix.sum(0)
    total = column[0] * (sums @ sums) + 2.0 * sum(column[lag] * (sums[:-lag] @ sums[lag:]) for lag in range(1, len(column)))
    return along, float(total)


def lag_counts(places: NDArray[np.int64], lags: int) -> Array:
    """``N[D, d]``: pairs of places at distance d that two windows at distance D hold, on average over the windows.

    ``places`` [outputs, taps], -1 for none.
    """
    outputs = places.shape[0]
    found = []
    for shift in range(min(outputs, REACH)):
        first, second = places[: outputs - shift, :, None], places[shift:, None, :]
        distance = np.where((first >= 0) & (second >= 0), np.abs(first - second), lags)
        found.append(np.bincount(np.minimum(distance, lags).ravel(), minlength=lags + 1)[:lags] / (outputs - shift))
    return np.array(found, dtype=np.float64)
