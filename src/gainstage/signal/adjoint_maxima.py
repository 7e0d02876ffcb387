"""Gradients through a maximum over windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.adjoint import averaged_over
from gainstage.signal.axes import Axis
from gainstage.signal.contraction import Places
from gainstage.signal.copies import replace
from gainstage.signal.joining import join
from gainstage.signal.maxima import pairs_of_windows
from gainstage.signal.movement import merge_dim, parts_along
from gainstage.signal.neighbours import pairs_by_lag
from gainstage.signal.quadrature import Array, coarse, invert_series, nodes
from gainstage.signal.slicing import slices
from gainstage.signal.traits import Given
from gainstage.signal.value import Value, gaussian
from gainstage.signal.windows import Window


def largest_gradient(g: Value, x: Value, dims: Sequence[int], windows: Sequence[Places]) -> Value:
    """Gradient of x from that of the largest entries of its windows [outputs, taps] along some dimensions.

    The sum over positions is that of g; loud places are the largest more often, and where a place is so in two windows their
    gradients add up. Of a concatenation, each part by itself. An entry at
    ``z = sqrt(r) common + sqrt(1 - r) own`` is the largest of its window with probability ``Phi(own)^(positions - 1)``.
    """
    parts = parts_along(x)
    if parts is not None and parts[0] not in dims:
        pairs = zip(slices(g, *parts), parts[1], strict=True)
        return join([largest_gradient(piece, part, dims, windows) for piece, part in pairs], parts[0])
    outputs, inputs = (float(np.prod([value.shape[d] for d in dims])) for value in (g, x))
    for d in dims:
        g, x = merge_dim(g, d), merge_dim(x, d)
    axes = [axis for d in dims for axis in g.dims[d]]
    at = [g.axes.index(axis) for axis in axes]
    total = averaged_over(g.table, g, axes)[tuple(0 if p in at else slice(None) for p in range(g.table.ndim))] * outputs**2
    same = total / inputs**2
    other = same.copy()
    full = (1,) * same.ndim
    shared = float(np.clip(_within_windows(x, dims, [places.shape[1] for places in windows]), 0.0, 1.0))
    odds = [_along(x, d) for d in dims]
    if any(np.ptp(own) > 0.0 for own in odds):
        places_held = math.prod(float((places >= 0).sum(1).mean()) for places in windows)
        preference = Window(np.sort(x.marginal.even), shared).preference(places_held)
        odds = [own**preference for own in odds]
    arriving = _at_largest(g, axes, [_along(g, d) for d in dims], windows, odds)
    same[full] = float(arriving.mean())
    other[full] = (total[full] - same[full] * inputs) / max(inputs * (inputs - 1.0), 1.0)
    places = tuple(dim for d in dims for dim in [x.dims[d]] if dim)
    table = np.broadcast_to(np.expand_dims(other, tuple(range(-len(places), 0))), other.shape + (2,) * len(places)).copy()
    table[(slice(None),) * other.ndim + (1,) * len(places)] = same
    table = np.moveaxis(table, range(other.ndim, table.ndim), [sum(len(v) for v in x.dims[:d]) for d in dims if x.dims[d]])
    made_dims = tuple(x.dims[d] if d in dims else axes_d for d, axes_d in enumerate(g.dims))
    shape = [size if d in dims else 1 for d, size in enumerate(x.shape) for _ in made_dims[d]]
    profile = levels.normalised(np.sqrt(arriving).reshape(shape))
    made = gaussian(made_dims, 0.0, np.asarray(table), profile, lineage=g.lineage | x.lineage)
    return replace(made, given=_given_largest(shared, windows).scaled())


def _along(x: Value, d: int) -> Array:
    """Levels along one dimension that is one axis, or of one entry."""
    return levels.over(x.levels, sum(len(dim) for dim in x.dims[:d]), x.shape[d]) if x.dims[d] else np.ones(1)


def _at_largest(g: Value, axes: Sequence[Axis], loud: Sequence[Array], windows: Sequence[Places], odds: Sequence[Array]) -> Array:
    """Sum over pairs of windows of ``E[g g']`` where a place is the largest of both, at each place along each of the dimensions.

    Lag by lag along each of the axes of the outputs, a window and itself included. Of the union of two windows a place is the
    largest by its odds, which are those along each dimension times one another (Luce 1959, section 1.C). ``loud``: levels of g.
    """
    pairs = [[_pairs(places, shift, own) for shift in range(_reach(places))] for places, own in zip(windows, odds, strict=True)]
    shape = [len(each) for each in pairs]
    moments = g.lagged(axes, [n for n, places in zip(shape, windows, strict=True) if len(places) > 1])[0].reshape(shape)
    found = np.zeros([own.size for own in odds])
    for lag in np.ndindex(*shape):
        along = [each[shift] for each, shift in zip(pairs, lag, strict=True)]
        one, two, both = (reduce(np.multiply.outer, [pair.odds[k] for pair in along]) for k in range(3))
        level = [s[: s.size - shift] * s[shift:] * (1 + (shift > 0)) for s, shift in zip(loud, lag, strict=True)]
        arriving = float(moments[lag]) * reduce(np.multiply.outer, level) / np.maximum(one + two - both, 1e-300)
        for pair, own in zip(along, odds, strict=True):  # each turn takes the first dimension and leaves it as the last
            arriving = np.moveaxis(pair.spread(arriving, own), 0, -1)
        found += arriving
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Pairs of windows some outputs apart: places of both [pairs, taps], -1 for none; odds of the first, the second, of both."""

    common: Places
    odds: tuple[Array, Array, Array]

    def spread(self, arriving: Array, own: Array) -> Array:
        """What comes from each pair, at the places of both by their odds: along the first dimension."""
        found = np.zeros((own.size, *arriving.shape[1:]))
        for places in self.common.T:
            inside = places >= 0
            at = places[inside]
            np.add.at(found, at, arriving[inside] * own[at].reshape(-1, *(1,) * (arriving.ndim - 1)))
        return found


def _pairs(places: Places, shift: int, own: Array) -> _Pairs:
    first, second = places[: len(places) - shift], places[shift:]
    common = first if shift == 0 else np.where((first[:, :, None] == second[:, None, :]).any(-1), first, -1)
    one, two, both = (np.where(each >= 0, own[each], 0.0).sum(1) for each in (first, second, common))
    return _Pairs(common, (one, two, both))


def _reach(places: Places) -> int:
    """How many lags lie between windows that have an entry in common, itself included."""
    lag = 1
    while lag < len(places) and any(np.intersect1d(a[a >= 0], b).size for a, b in zip(places, places[lag:], strict=False)):
        lag += 1
    return lag


def _given_largest(shared: float, windows: Sequence[Places]) -> Given:
    """What z is where the gradient goes: each window of n entries sends it to one with the density ``n Phi^(n - 1)``."""
    points, mass = coarse()
    own = np.sqrt(1.0 - shared) * nodes()[:, None] + np.sqrt(shared) * points[None, :]
    below = torch.special.ndtr(torch.from_numpy(own)).numpy()
    kinds = pairs_of_windows(windows, [1] * len(windows))
    chance = sum(np.vecdot(share * size * below ** (size - 1.0), mass) for _, (size, _, _), share in kinds)
    return Given(chance, chance)


def _within_windows(x: Value, dims: Sequence[int], kernels: Sequence[int]) -> float:
    """Correlation of the latents of two entries of one window: of neighbours, where near places share more."""
    axes = [axis for d in dims for axis in x.dims[d]]
    if not axes:
        return 1.0
    near = x.neighbours()
    if near is None or any(axis not in axes for axis in near.axes):
        return float(x.correlation()[tuple(0 if axis in axes else 1 for axis in x.axes)])
    sizes = [kernel for d, kernel in zip(dims, kernels, strict=True) for _ in x.dims[d]]
    moments, _ = x.lagged(axes, sizes)
    pairs = np.array(1.0)
    for size in sizes:
        pairs = np.multiply.outer(pairs, pairs_by_lag(size))
    pairs[(0,) * pairs.ndim] = 0.0
    series = x.marginal.even_series
    rho = invert_series(series, moments - series[0])
    return float((pairs * rho).sum() / pairs.sum())
