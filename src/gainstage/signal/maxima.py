"""The largest of several entries: max pooling."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from gainstage.signal import levels
from gainstage.signal.axes import Axis
from gainstage.signal.contraction import Places
from gainstage.signal.copies import replace
from gainstage.signal.joining import join
from gainstage.signal.marginal import Marginal
from gainstage.signal.movement import merge_dim, parts_along
from gainstage.signal.neighbours import REACH, Neighbours, by_lag_apart, far_of, lag_counts, made
from gainstage.signal.overlap import NONE, Overlap, filtered
from gainstage.signal.patches import of_field
from gainstage.signal.quadrature import (
    Array,
    coarse,
    evaluate_series,
    expectation_of_two,
    invert_series,
    quantiles,
    standardised,
)
from gainstage.signal.traits import Largest, Lean
from gainstage.signal.value import Value
from gainstage.signal.windows import GRADES, Window, overlapping

NEARLY = 0.1  # of what two entries do not share: below it less and less is said by integrals over a grid


def _sizes(places: Places, shifts: int) -> Sequence[Mapping[tuple[int, int, int], float]]:
    """Entries of each of two windows that are a number of outputs apart, and of both: and the share of such pairs.

    For each number of outputs. Of the windows that have entries in common.
    """
    held = [frozenset(row[row >= 0].tolist()) for row in places]
    found: list[Mapping[tuple[int, int, int], float]] = []
    for shift in range(shifts):
        pairs = zip(held, held[shift:], strict=False)
        kinds = Counter((len(one), len(two), both) for one, two in pairs if (both := len(one & two)))
        found.append({kind: n / (len(held) - shift) for kind, n in kinds.items()})
    return found


def max_over(x: Value, dims: Sequence[int], windows: Sequence[Places]) -> Value:
    """Maximum over windows along some dimensions. ``windows`` [outputs, taps]: places read, -1 for none.

    Exact for independent places, where windows that share some have correlated maxima, see :func:`overlapping`. Correlated ones
    are taken to be so as they are on average, but for what draws of a patch tell, see :mod:`gainstage.signal.patches`. The
    maximum of maxima is one over the union of their windows. Of a concatenation, each part by itself.
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
    return _pooled(x, read, Neighbours(axes, moments), rho, distant)


def _pooled(x: Value, read: Sequence[tuple[int, Places]], near: Neighbours, rho: Array, distant: float) -> Value:
    counts = [lag_counts(window, size) for (_, window), size in zip(read, rho.shape, strict=True)]
    inside = _Correlations(counts, rho, distant).between([0] * len(counts))
    loud, values = [levels.read(x.levels, x.axes.index(x.dims[d][0]), place) for d, place in read], np.sort(x.marginal.even)
    field = of_field([place for _, place in read], loud, values, rho, distant)
    window = Window(values, min(max(inside, 0.0), 1.0), field)
    louder = _louder(read, loud, window) if field is None else field.louder
    surface = window.largest_of(float(np.prod([place.shape[1] for _, place in read])))
    out: dict[int, tuple[Axis, ...]] = {d: (Axis(len(place)),) if len(place) > 1 else () for d, place in read}
    profile = levels.normalised(_pooled_profile(x, read, out, np.sqrt(louder[1])))
    marginal, mean, second = _marginal(surface, louder, profile)
    unlike = np.minimum((1.0 - x.correlation()) / NEARLY, 1.0)  # where next to nothing differs, only its share is exact
    across = _across(x, read, near, window, surface) * float(louder[0].mean()) ** 2
    table = unlike * across + (1.0 - unlike) * evaluate_series(marginal.series, x.correlation())
    table[(1,) * table.ndim] = second
    gone = {x.dims[d][0] for d in out if not out[d]}
    result = Value(
        dims=tuple(out.get(d, axes) for d, axes in enumerate(x.dims)), mean=mean,
        table=np.asarray(table[tuple(1 if axis in gone else slice(None) for axis in x.axes)]), marginal=marginal,
        source=object(), lineage=x.lineage, stray=x.stray.hidden(), levels=profile,
    )  # fmt: skip
    spans = tuple(axis for d, _ in read for axis in out[d])
    excess, ties, alike = _excess(read, _Correlations(counts, rho, distant), window, surface)
    along = tuple(slice(None) if out[d] else 0 for d, _ in read)
    if spans:
        square = float((louder[0] ** 2).mean()) * (mean / float(louder[0].mean())) ** 2  # of means, over places
        result = result.with_neighbours(Neighbours(spans, excess[along]), second, square + alike * (second - square))
    overlap = _overlap(x, read, window, out).times((x.second_moment / second) ** 2 if second > 0.0 else 0.0)
    made_near = made(spans, excess[along])
    if made_near is not None:
        made_near = replace(made_near, ties=ties[along])
    result = replace(result, near=made_near, overlap=overlap)
    if profile is not None:
        result = _leaning(result, spans, louder[0][along], _pooled_profile(x, read, out, louder[0]))
    return replace(result, largest=Largest(result.table, x, tuple(read)))


def _across(x: Value, read: Sequence[tuple[int, Places]], near: Neighbours, window: Window, surface: Array) -> Array:
    """Table of the maxima of full windows at equal levels, of other samples or channels, by what their places share.

    Of windows that are counterparts each place meets its counterpart, and its neighbours.
    """
    series, positions = x.marginal.even_series, [x.axes.index(axis) for axis in near.axes]
    even = levels.evened(x.table, x.levels, positions)
    own, far = far_of(near, even, x.axes)
    counts = [lag_counts(place, size) for (_, place), size in zip(read, near.excess.shape, strict=True)]
    common = np.asarray(invert_series(series, even - series[0]))
    for position, count in zip(positions, counts, strict=True):
        other, same = np.take(common, [0], position), np.take(common, [1], position)
        common = np.concatenate([other, other + (same - other) / count[0, 0]], position)
    beyond = np.zeros_like(common)
    for index in np.ndindex(*(1 if position in positions else 2 for position in range(even.ndim))):
        met = tuple(1 if position in positions else i for position, i in enumerate(index))
        kept, base = by_lag_apart(near, own, far, float(even[met]), float(even[index]))
        lagged = np.minimum(np.append(base + kept * near.excess, [base, math.inf]), even[met])
        rho = np.asarray(invert_series(series, lagged - series[0]))
        common[met] = _Correlations(counts, rho[:-2].reshape(near.excess.shape), float(rho[-2])).between([0] * len(counts))
        beyond[met] = rho[-1] - common[met]
    return window.opposite(surface, common, beyond, float(np.prod([place.shape[1] for _, place in read])))


def _overlap(x: Value, read: Sequence[tuple[int, Places]], window: Window, out: Mapping[int, tuple[Axis, ...]]) -> Overlap:
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


def _louder(read: Sequence[tuple[int, Places]], loud: Sequence[Array], window: Window) -> Array:
    """Mean and second moment of each output [2, along each of the dimensions], over those of a full window of equal levels."""
    kinds, which = [], []
    for level in loud:
        rows = np.sort(level, axis=1)
        tops = np.maximum(rows.max(), 1e-300)
        kind, index = np.unique(np.round(rows / tops, 2), axis=0, return_inverse=True)
        kinds.append(kind * tops)
        which.append(index.reshape(-1))
    shape = tuple(len(kind) for kind in kinds)
    tops, held = np.zeros(math.prod(shape)), np.zeros((math.prod(shape) + 1, len(GRADES)))
    for i, combined in enumerate(np.ndindex(*shape)):
        sizes = reduce(np.multiply.outer, [kind[k] for kind, k in zip(kinds, combined, strict=True)]).ravel()
        sizes = sizes[sizes > 0.0]
        tops[i] = sizes.max(initial=0.0)
        grade = np.rint(sizes / tops[i] * (len(GRADES) - 1) + 1e-6)  # halves go up, whatever rounding made of them
        held[i] = np.bincount(grade.astype(int), minlength=len(GRADES))
    held[-1, -1] = math.prod(place.shape[1] for _, place in read)  # full, and all as loud
    distinct, index = np.unique(held, axis=0, return_inverse=True)
    *found, full = window.moments(distinct)[:, index.reshape(-1)].T
    made = np.stack(found, axis=1) * np.stack([tops, tops**2]) / np.where(full != 0.0, full, 1.0)[:, None]
    if full[1] == 0.0:
        made[:] = 1.0  # of zeros the largest is zero everywhere
    return np.asarray(made.reshape(2, *shape)[np.ix_(np.arange(2), *which)])


def _marginal(surface: Array, louder: Array, profile: Array | None) -> tuple[Marginal, float, float]:
    """Distribution of the maxima of all outputs, each louder or quieter than a full window; mean and second moment."""
    mass = np.outer(coarse()[1], coarse()[1])
    means, squares = (each.mean() for each in louder)
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
        found = float((weight * self.rho).sum()) - same * float(self.rho[(0,) * weight.ndim])
        found += (total - float(weight.sum())) * self.distant
        return found / (total - same) if total > same else 0.0


def _excess(
    read: Sequence[tuple[int, Places]], pairs: _Correlations, window: Window, surface: Array
) -> tuple[Array, Array, float]:
    """e(d) of the maxima, by the places that two windows share and by what the others have in common.

    And the share of each window that is in the other as well, and the correlation of two far apart.
    """
    mass = coarse()[1]
    own = expectation_of_two(surface**2, mass)
    shape = [min(len(place), REACH) for _, place in read]
    between = np.array([pairs.between(index) for index in np.ndindex(*shape)]).reshape(shape)
    far = float(window.apart(surface, np.array([pairs.distant]))[0])
    apart = np.maximum((window.apart(surface, between) - far) / (own - far), 0.0) if own > far else np.zeros(shape)
    covariances, ties = np.zeros(shape), np.zeros(shape)
    for lag, (first, second, shared), share in pairs_of_windows([place for _, place in read], shape):
        covariances[lag] += share * overlapping(first, second, shared)
        ties[lag] += share * shared / (first * second) ** 0.5
    both = covariances / covariances[(0,) * len(shape)]
    excess = both + (1.0 - both) * apart
    if window.field is not None:
        drawn = window.field.correlations[tuple(slice(n) for n in shape)]
        excess[tuple(slice(n) for n in drawn.shape)] = drawn
    excess[(0,) * excess.ndim] = 1.0
    square = expectation_of_two(surface, mass) ** 2
    ties = np.minimum(ties, 1.0)  # which rounding may pass
    return excess, ties, (far - square) / (own - square) if own > square else 0.0


def pairs_of_windows(
    windows: Sequence[Places], shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, int, int], float]]:
    """Pairs of windows with entries in common by their lag: entries of each and of both, and their share of the pairs there."""
    kinds = [[list(sizes.items()) for sizes in _sizes(places, n)] for places, n in zip(windows, shape, strict=True)]
    for lag in np.ndindex(*shape):
        for along in itertools.product(*(each[shift] for each, shift in zip(kinds, lag, strict=True))):
            first, second, shared = (math.prod(sizes[k] for sizes, _ in along) for k in range(3))
            yield lag, (first, second, shared), math.prod(part for _, part in along)


def _pooled_profile(x: Value, read: Sequence[tuple[int, Places]], out: dict[int, tuple[Axis, ...]], louder: Array) -> Array:
    """What is known of x along other axes, times a factor for each output of windows."""
    at = [x.axes.index(x.dims[d][0]) for d, _ in read]
    before = np.ones((1,) * len(x.axes)) if x.levels is None else np.sqrt((x.levels**2).mean(axis=tuple(at), keepdims=True))
    shape = [1] * len(x.axes)
    for position, size in zip(at, louder.shape, strict=True):
        shape[position] = size
    return np.squeeze(before * louder.reshape(shape), tuple(p for p, (d, _) in zip(at, read, strict=True) if not out[d]))


def _leaning(x: Value, spans: Sequence[Axis], means: Array, lean: Array) -> Value:
    """Maxima whose means differ, in other proportions than their levels.

    What two of them share is nearly all of their means: of one sample and channel by pairs of means in the place of levels; of
    others, of which the table has the square of the average mean, by place. ``means``: of the outputs along ``spans``.
    """
    by_mean = levels.pair_factors(means)
    at = [x.axes.index(axis) for axis in spans]
    table = np.moveaxis(x.table, at, range(-len(at), 0)).copy()
    one = (1,) * (table.ndim - len(at))
    own = table[one].copy()
    table *= by_mean / means.mean() ** 2
    alike = by_mean / by_mean[(1,) * by_mean.ndim]
    for position, axis in enumerate(spans):
        along = levels.over(x.levels, x.axes.index(axis), axis.size)
        np.moveaxis(alike, position, 0)[0] /= levels.pair_factor(along)
    table[one] = own * alike
    made = np.ascontiguousarray(np.moveaxis(table, range(-len(at), 0), at))
    assert x.levels is not None
    return replace(x, table=made, lean=Lean(x.levels, lean / lean.mean(), x.near))
