"""The largest of several entries: max pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.axes import Axis
from gainstage.signal.contraction import Places
from gainstage.signal.copies import replace
from gainstage.signal.joining import join
from gainstage.signal.marginal import Marginal
from gainstage.signal.movement import merge_dim, parts_along
from gainstage.signal.neighbours import REACH, Neighbours, lag_counts, made
from gainstage.signal.overlap import NONE, Overlap, filtered
from gainstage.signal.quadrature import (
    Array,
    coarse,
    evaluate_series,
    expectation_of_two,
    invert_series,
    nodes,
    power_series,
    quantiles,
    standardised,
)
from gainstage.signal.traits import Largest, Lean
from gainstage.signal.value import Value

STEP = 0.05  # of standard deviations, for a slope


@cache
def largest(count: float) -> Array:
    """Values, at the points of the coarse rule, of the largest of ``count`` independent standard normals: ``Phi(t)^count``."""
    below = torch.special.ndtr(torch.from_numpy(coarse()[0])).numpy()
    level = np.minimum(np.maximum(below, 1e-300) ** (1.0 / count), 1.0 - 1e-16)
    return np.asarray(torch.special.ndtri(torch.from_numpy(level)).numpy())


@cache
def overlapping(count: int, shared: int) -> float:
    """Correlation of the maxima of two sets of ``count`` standard normals, of which ``shared`` are the same.

    ``Cov = integral of F(x, y) - F(x) F(y)`` (Hoeffding 1940), with ``F(x, y) = Phi(min)^m (Phi(x) Phi(y))^(n - m)``.
    """
    if shared == 0:
        return 0.0
    points = np.linspace(-6.0, 6.0, 241)
    below = torch.special.ndtr(torch.from_numpy(points)).numpy()
    pairs = np.outer(below, below)
    covariances = [np.minimum.outer(below, below) ** m * pairs ** (count - m) - pairs**count for m in (shared, count)]
    return float(covariances[0].sum() / covariances[1].sum())


@dataclass(frozen=True, slots=True)
class _Window:
    """Places of equal level with the values ``f(z)``, f increasing, and ``z = sqrt(r) common + sqrt(1 - r) own``."""

    values: Array
    shared: float

    def largest_of(self, count: float) -> Array:
        """The largest is where ``own`` is: [common, the rest] on the coarse rule."""
        z = np.sqrt(self.shared) * coarse()[0][:, None] + np.sqrt(1.0 - self.shared) * largest(count)[None, :]
        return np.asarray(np.interp(z, nodes(), self.values))

    def apart(self, surface: Array, rho: Array) -> Array:
        """Second moment of two windows without a common place, whose places have the correlation rho."""
        points, mass = coarse()
        series = power_series(np.interp(nodes(), points, np.vecdot(surface, mass)))
        return evaluate_series(series, np.clip(rho / max(self.shared, 1e-12), 0.0, 1.0))

    def slope(self, count: float) -> float:
        """``E[d max / d t]`` for ``z + t`` in the place of every z."""
        points, mass = coarse()
        z = np.sqrt(self.shared) * points[:, None] + np.sqrt(1.0 - self.shared) * largest(count)[None, :]
        ahead, behind = (np.interp(z + step, nodes(), self.values) for step in (STEP, -STEP))
        return expectation_of_two(ahead - behind, mass) / (2.0 * STEP)

    def moments(self, sizes: Array, repeats: float) -> Array:
        """``E max`` and ``E max^2`` of places with levels s, each a number of times.

        By ``P(max < y | common) = prod P(s f < y | common)``.
        """
        points, mass = coarse()
        rising = self.values + 1e-9 * np.ptp(self.values) * np.arange(self.values.size)
        top = sizes.max()
        levels_y = np.unique(np.quantile(self.values * top, np.linspace(0.0, 1.0, 193)))
        middle = 0.5 * (levels_y[1:] + levels_y[:-1])
        z = np.interp(middle[:, None] / np.maximum(sizes, 1e-9 * top), rising, nodes())
        own = (z[:, None, :] - np.sqrt(self.shared) * points[:, None]) / max(1.0 - self.shared, 1e-9) ** 0.5
        below = np.vecdot((torch.special.log_ndtr(torch.from_numpy(own)).sum(-1) * repeats).exp().numpy(), mass)
        return np.asarray(np.vecdot(np.stack([levels_y, levels_y**2]), np.diff(np.r_[0.0, below, 1.0])))


def max_over(x: Value, dims: Sequence[int], windows: Sequence[Places]) -> Value:
    """Maximum over windows along some dimensions. ``windows`` [outputs, taps]: places read, -1 for none.

    Places of one window are taken to be equally correlated, as they are on average; exact for independent ones. Windows that
    share places have correlated maxima, see :func:`overlapping`. The maximum of maxima is one over the union of their windows.
    Of a concatenation, each part by itself.
    """
    parts = parts_along(x)
    if parts is not None and parts[0] not in dims:
        return join([max_over(part, dims, windows) for part in parts[1]], parts[0])
    read = [(d, window) for d, window in zip(dims, windows, strict=True) if x.shape[d] > 1]
    if x.largest is not None and x.largest.table is x.table and [d for d, _ in read] == [d for d, _ in x.largest.windows]:
        read = [(d, _union(inner, outer)) for (d, inner), (_, outer) in zip(x.largest.windows, read, strict=True)]
        x = x.largest.of
    for d, _ in read:
        x = merge_dim(x, d)
    axes = tuple(x.dims[d][0] for d, _ in read)
    near = x.neighbours() or Neighbours(axes, np.ones((1,) * len(axes)))
    for axis in axes:
        near = near.with_axis(axis)
    own, far = x.apart(near)
    moments = near.over(axes, [max(near.lags(axis), 2) for axis in axes])
    series = x.marginal.even_series
    rho = np.asarray(invert_series(series, far + (own - far) * moments - series[0]))
    distant = float(invert_series(series, np.array([far - series[0]]))[0])
    rho[(0,) * rho.ndim] = 1.0
    return _pooled(x, read, rho, distant)


def _pooled(x: Value, read: Sequence[tuple[int, Places]], rho: Array, distant: float) -> Value:
    counts = [lag_counts(window, size) for (_, window), size in zip(read, rho.shape, strict=True)]
    inside = _Correlations(counts, rho, distant).between([0] * len(counts))
    window = _Window(np.sort(x.marginal.even), min(max(inside, 0.0), 1.0))
    louder = _louder(x, read, window)
    surface = window.largest_of(float(np.prod([place.shape[1] for _, place in read])))
    out: dict[int, tuple[Axis, ...]] = {d: (Axis(len(place)),) if len(place) > 1 else () for d, place in read}
    profile = _pooled_levels(x, read, out, [np.sqrt(each[1]) for each in louder])
    marginal, mean, second = _marginal(surface, louder, profile)
    table = evaluate_series(marginal.series, x.correlation())
    gone = {x.dims[d][0] for d in out if not out[d]}
    result = Value(
        dims=tuple(out.get(d, axes) for d, axes in enumerate(x.dims)), mean=mean,
        table=np.asarray(table[tuple(1 if axis in gone else slice(None) for axis in x.axes)]), marginal=marginal,
        source=object(), lineage=x.lineage, stray=x.stray.hidden(), levels=profile,
    )  # fmt: skip
    spans = tuple(axis for d, _ in read for axis in out[d])
    excess, ties, apart = _excess(read, _Correlations(counts, rho, distant), window, surface)
    along = tuple(slice(None) if out[d] else 0 for d, _ in read)
    near = Neighbours(spans, excess[along])
    if spans:
        result = result.with_neighbours(near, second, apart * second)
    overlap = _overlap(x, read, window, out).times((x.second_moment / second) ** 2 if second > 0.0 else 0.0)
    made_near = made(near.axes, near.excess)
    if made_near is not None:
        made_near = replace(made_near, ties=ties[along])
    result = replace(result, near=made_near, overlap=overlap)
    if profile is not None:
        result = _leaning(
            result,
            _pooled_levels(x, read, out, [each[0] for each in louder]),
            {axis: each for d, each in zip(out, louder, strict=True) for axis in out[d]},
        )
    return replace(result, largest=Largest(result.table, x, tuple(read)))


def _overlap(x: Value, read: Sequence[tuple[int, Places]], window: _Window, out: Mapping[int, tuple[Axis, ...]]) -> Overlap:
    """To first order ``Cov(max, max') = E[d max / d t]^2`` times the average of the correlations of places, as of an average."""
    overlap, passed, taps = x.overlap, 1.0, 1.0
    for d, place in read:
        inside = place >= 0
        matrix = np.zeros((len(place), x.shape[d]))
        np.add.at(matrix, (np.nonzero(inside)[0], place[inside]), np.repeat(1.0 / inside.sum(1), inside.sum(1)))
        overlap, factor = filtered(overlap, x.dims[d][0], matrix, out[d])
        passed, taps = passed * factor, taps * place.shape[1]
    before = float(x.marginal.even_series[1])
    return overlap.times(passed * (window.slope(taps) ** 2 / before) ** 2) if before > 0.0 else NONE


def _louder(x: Value, read: Sequence[tuple[int, Places]], window: _Window) -> list[Array]:
    """Mean and second moment of each output along each dimension, over those of a full window of equal levels."""
    found = []
    for d, place in read:
        others = float(np.prod([p.shape[1] for e, p in read if e != d]))
        rows = np.sort(levels.read(x.levels, x.axes.index(x.dims[d][0]), place), axis=1)
        tops = np.maximum(rows[:, -1:], 1e-300)
        kinds, which = np.unique(np.round(rows / tops, 2), axis=0, return_inverse=True)
        full = window.moments(np.ones(1), others * place.shape[1])
        full = np.where(full != 0.0, full, 1.0)  # of zeros the largest is zero
        ratio = np.array(
            [window.moments(kind[kind > 0.0], others) / full if (kind > 0.0).any() else np.zeros(2) for kind in kinds]
        )
        found.append(ratio[which.reshape(-1)].T * np.stack([tops[:, 0], tops[:, 0] ** 2]))
    return found


def _marginal(surface: Array, louder: Sequence[Array], profile: Array | None) -> tuple[Marginal, float, float]:
    """Distribution of the maxima of all outputs, each louder or quieter than a full window; mean and second moment."""
    mass = np.outer(coarse()[1], coarse()[1])
    means, squares = (np.prod([each[k].mean() for each in louder]) for k in (0, 1))
    second, mean, whole = float((surface**2 * mass).sum() * squares), float((surface * mass).sum() * means), float(squares) ** 0.5
    (sizes,), shares = (np.ones((1, 1)), np.ones(1)) if profile is None else levels.groups(profile)
    std = max(second - mean**2, 0.0) ** 0.5

    def values() -> Array:
        return standardised(quantiles(surface[..., None] * sizes, mass[..., None] * shares), mean, std)

    def even() -> Array:
        return quantiles(surface * whole, mass)

    return Marginal(object(), values, None if profile is None else even), mean, second


def _union(inner: Places, outer: Places) -> Places:
    """Places read by windows of windows."""
    rows = [np.unique(inner[row[row >= 0]]) for row in outer]
    rows = [row[row >= 0] for row in rows]
    wide = np.full((len(rows), max(row.size for row in rows)), -1)
    for row, into in zip(rows, wide, strict=True):
        into[: row.size] = row
    return wide


@dataclass(frozen=True, slots=True)
class _Correlations:
    """Correlations of places by their lag, and pairs of places by the distance of the windows that hold them."""

    counts: Sequence[Array]
    rho: Array
    distant: float

    def between(self, shift: Sequence[int]) -> float:
        """Average over different places of two windows, a number of outputs apart along each axis."""
        weight, total = np.ones(1), 1.0
        for count, i in zip(self.counts, shift, strict=True):
            weight = weight[..., None] * count[i]
            total *= float(count[0, 0]) ** 2
        weight = weight[0]
        same = float(weight[(0,) * weight.ndim])
        found = float((weight * self.rho).sum()) - same + (total - float(weight.sum())) * self.distant
        return found / (total - same) if total > same else 0.0

    def shared(self, shift: Sequence[int]) -> int:
        """Places that two windows both hold."""
        return round(float(np.prod([count[i, 0] for count, i in zip(self.counts, shift, strict=True)])))


def _excess(
    read: Sequence[tuple[int, Places]], pairs: _Correlations, window: _Window, surface: Array
) -> tuple[Array, Array, float]:
    """e(d) of the maxima, by the places that two windows share and by what the others have in common; far over own.

    And the share of each window that is in the other as well.
    """
    mass = coarse()[1]
    own = expectation_of_two(surface**2, mass)
    shape = [min(len(place), REACH) for _, place in read]
    between = np.array([pairs.between(index) for index in np.ndindex(*shape)]).reshape(shape)
    far = float(window.apart(surface, np.array([pairs.distant]))[0])
    apart = np.maximum((window.apart(surface, between) - far) / (own - far), 0.0) if own > far else np.zeros(shape)
    taps = int(np.prod([place.shape[1] for _, place in read]))
    shared = np.array([pairs.shared(index) for index in np.ndindex(*shape)])
    both = np.array([overlapping(taps, int(count)) for count in shared]).reshape(shape)
    excess = both + (1.0 - both) * apart
    excess[(0,) * excess.ndim] = 1.0
    return excess, (shared / taps).reshape(shape), far / own if own > 0.0 else 0.0


def _pooled_levels(
    x: Value, read: Sequence[tuple[int, Places]], out: dict[int, tuple[Axis, ...]], louder: Sequence[Array]
) -> Array | None:
    """Levels of the maxima: along the windows' dimensions what was found there, along others as before."""
    profile = np.ones((1,) * len(x.axes)) if x.levels is None else x.levels
    for (d, _), factor in reversed(list(zip(read, louder, strict=True))):
        position = x.axes.index(x.dims[d][0])
        profile = np.sqrt((profile**2).mean(axis=position, keepdims=bool(out[d])))
        if out[d]:
            shape = [1] * profile.ndim
            shape[position] = -1
            profile = profile * factor.reshape(shape)
    return levels.normalised(np.asarray(profile))


def _leaning(x: Value, means: Array | None, louder: Mapping[Axis, Array]) -> Value:
    """Maxima whose means differ, in other proportions than their levels.

    What two of them share is nearly all of their means: of one sample and channel by pairs of means in the place of levels; of
    others, of which the table has the square of the average mean, by place.
    """
    assert x.levels is not None
    lean = np.ones_like(x.levels) if means is None else np.broadcast_to(means, x.levels.shape) * np.ones(1)
    table = x.table.copy()
    own = table[tuple(slice(None) if axis in louder else 1 for axis in x.axes)].copy()
    for axis, (mean, square) in louder.items():
        even, along = mean / mean.mean(), np.moveaxis(table, x.axes.index(axis), 0)
        along[0] *= levels.pair_factor(even)
        along[1] *= float((even**2).mean())
        inner = np.moveaxis(own, [a for a in x.axes if a in louder].index(axis), 0)
        inner[0] *= levels.pair_factor(mean) / levels.pair_factor(np.sqrt(square))
    table[tuple(slice(None) if axis in louder else 1 for axis in x.axes)] = own
    return replace(x, table=table, lean=Lean(x.levels, lean / lean.mean(), x.near))
