"""The largest of several entries: max pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.axes import Axis
from gainstage.signal.contraction import Places
from gainstage.signal.linear import standardised
from gainstage.signal.movement import merge_dim
from gainstage.signal.neighbours import REACH, Neighbours, far_of, lag_counts, made, write
from gainstage.signal.quadrature import Array, coarse, evaluate_series, invert_series, nodes, power_series, quantiles
from gainstage.signal.value import Largest, Marginal, Value


@cache
def largest(count: float) -> Array:
    """Values, at the points of the coarse rule, of the largest of ``count`` independent standard normals: ``Phi(t)^count``."""
    below = torch.special.ndtr(torch.from_numpy(coarse()[0])).numpy()
    level = np.clip(below, 1e-300, 1.0 - 1e-16) ** (1.0 / count)
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
    """Maximum over a window, given the part that all its places have in common: [common, the rest] on the coarse rule."""

    surface: Array
    shared: float

    @property
    def mean(self) -> float:
        mass = coarse()[1]
        return float(mass @ self.surface @ mass)

    @property
    def second(self) -> float:
        mass = coarse()[1]
        return float(mass @ self.surface**2 @ mass)

    def marginal(self) -> Marginal:
        mass = coarse()[1]
        std = max(self.second - self.mean**2, 0.0) ** 0.5
        return Marginal(object(), lambda: standardised(quantiles(self.surface, np.outer(mass, mass)), self.mean, std))

    def apart(self, rho: Array) -> Array:
        """Second moment of two windows without a common place, whose places have the correlations rho."""
        points, mass = coarse()
        series = power_series(np.interp(nodes(), points, self.surface @ mass))
        return evaluate_series(series, np.clip(rho / max(self.shared, 1e-12), -1.0, 1.0))


def _window(x: Value, count: float, shared: float) -> _Window:
    """``z = sqrt(r) common + sqrt(1 - r) own`` for each place: the largest is where ``own`` is."""
    z = np.sqrt(shared) * coarse()[0][:, None] + np.sqrt(1.0 - shared) * largest(count)[None, :]
    return _Window(np.interp(z, nodes(), np.sort(x.marginal.values)), shared)


def max_over(x: Value, dims: Sequence[int], windows: Sequence[Places]) -> Value:
    """Maximum over windows along some dimensions. ``windows`` [outputs, taps]: places read, -1 for none.

    Places of one window are taken to be equally correlated, as they are on average; exact for independent ones. Windows that
    share places have correlated maxima, see :func:`overlapping`. The maximum of maxima is one over the union of their windows.
    """
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
    own, far = far_of(near, x.table, x.axes)
    moments = near.over(axes, [max(near.lags(axis), 2) for axis in axes])
    rho = np.asarray(invert_series(x.marginal.series, far + (own - far) * moments - x.mean**2))
    distant = float(invert_series(x.marginal.series, np.array([far - x.mean**2]))[0])
    rho[(0,) * rho.ndim] = 1.0
    return _pooled(x, read, rho, distant)


def _pooled(x: Value, read: Sequence[tuple[int, Places]], rho: Array, distant: float) -> Value:
    counts = [lag_counts(window, size) for (_, window), size in zip(read, rho.shape, strict=True)]
    inside = _pair_average(counts, rho, distant, [0] * len(counts))
    window = _window(x, float(np.prod([(place >= 0).sum(1).mean() for _, place in read])), max(inside, 0.0))
    marginal = window.marginal()
    table = evaluate_series(marginal.series, x.correlation())
    out: dict[int, tuple[Axis, ...]] = {d: (Axis(len(place)),) if len(place) > 1 else () for d, place in read}
    spans = tuple(axis for d, _ in read for axis in out[d])
    apart = float(window.apart(np.array([max(distant, 0.0)]))[0])
    excess = _excess(read, counts, rho, distant)[tuple(slice(None) if out[d] else 0 for d, _ in read)]
    table = np.asarray(table[tuple(1 if axis in {x.dims[d][0] for d in out if not out[d]} else slice(None) for axis in x.axes)])
    dims = tuple(out.get(d, axes) for d, axes in enumerate(x.dims))
    result = Value(
        dims=dims, mean=window.mean, table=table, marginal=marginal, source=object(), lineage=x.lineage,
        log_variance=x.log_variance, levels=_pooled_levels(x, read, out),
    )  # fmt: skip
    if spans:
        table = write(Neighbours(spans, excess), table, result.axes, window.second, apart)
    return replace(result, near=made(spans, excess), table=table, largest=Largest(table, x, tuple(read)))


def _union(inner: Places, outer: Places) -> Places:
    """Places read by windows of windows."""
    rows = [np.unique(inner[row[row >= 0]]) for row in outer]
    rows = [row[row >= 0] for row in rows]
    wide = np.full((len(rows), max(row.size for row in rows)), -1)
    for row, into in zip(rows, wide, strict=True):
        into[: row.size] = row
    return wide


def _excess(read: Sequence[tuple[int, Places]], counts: Sequence[Array], rho: Array, distant: float) -> Array:
    """e(d) of the maxima: by the places that two windows share, and by what the others have in common."""
    excess = np.ones([min(len(place), REACH) for _, place in read])
    taps = int(np.prod([place.shape[1] for _, place in read]))
    for index in np.ndindex(*excess.shape):
        if any(index):
            both = overlapping(taps, round(float(np.prod([count[i, 0] for count, i in zip(counts, index, strict=True)]))))
            between = (_pair_average(counts, rho, distant, index) - distant) / (1.0 - distant)
            excess[index] = both + (1.0 - both) * max(between, 0.0)
    return excess


def _pair_average(counts: Sequence[Array], rho: Array, distant: float, shift: Sequence[int]) -> float:
    """Average correlation between different places of two windows, a number of outputs apart along each axis."""
    weight, total = np.ones(1), 1.0
    for count, i in zip(counts, shift, strict=True):
        weight = weight[..., None] * count[i]
        total *= float(count[0, 0]) ** 2
    weight = weight[0]
    same = float(weight[(0,) * weight.ndim])
    found = float((weight * rho).sum()) - same
    beyond = total - float(weight.sum())
    pairs = total - same
    return (found + beyond * distant) / pairs if pairs > 0.0 else 0.0


def _pooled_levels(x: Value, read: Sequence[tuple[int, Places]], out: dict[int, tuple[Axis, ...]]) -> Array | None:
    """Root mean square over the places of each window."""
    profile = x.levels
    if profile is None:
        return None
    for d, place in reversed(read):
        position = x.axes.index(x.dims[d][0])
        along = levels.read(profile, position, place)
        mean = (along**2).sum(1) / np.maximum((place >= 0).sum(1), 1)
        profile = np.sqrt((profile**2).mean(axis=position, keepdims=bool(out[d])))
        if out[d]:
            shape = [1] * profile.ndim
            shape[position] = -1
            profile = profile * np.sqrt(mean).reshape(shape)
    return levels.normalised(np.asarray(profile))
