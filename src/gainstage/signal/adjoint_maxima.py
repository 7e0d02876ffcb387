"""Gradients through a maximum over windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.adjoint import averaged_over
from gainstage.signal.axes import Axis, Dim
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


def largest_gradient(g: Value, x: Value, dims: Sequence[int], windows: Sequence[Places]) -> Value:
    """Gradient of x from that of the largest entries of its windows [outputs, taps] along some dimensions.

    The sum over positions is that of g; a place is the largest as often as there are windows that hold it, and where it is so in
    two of them their gradients add up. Of a concatenation, each part by itself. An entry at
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
    same[full] = _at_largest(g, axes, windows) * outputs / inputs
    other[full] = (total[full] - same[full] * inputs) / max(inputs * (inputs - 1.0), 1.0)
    places = tuple(dim for d in dims for dim in [x.dims[d]] if dim)
    table = np.broadcast_to(np.expand_dims(other, tuple(range(-len(places), 0))), other.shape + (2,) * len(places)).copy()
    table[(slice(None),) * other.ndim + (1,) * len(places)] = same
    table = np.moveaxis(table, range(other.ndim, table.ndim), [sum(len(v) for v in x.dims[:d]) for d in dims if x.dims[d]])
    made_dims = tuple(x.dims[d] if d in dims else axes_d for d, axes_d in enumerate(g.dims))
    profile = _largest_levels(g, made_dims, dims, windows)
    made = gaussian(made_dims, 0.0, np.asarray(table), profile, lineage=g.lineage | x.lineage)
    return replace(made, given=_given_largest(x, dims, windows).scaled())


def _at_largest(g: Value, axes: Sequence[Axis], windows: Sequence[Places]) -> float:
    """``sum over windows of E[g g'] |both| / |either|``: two windows have one largest entry if it lies in both of them.

    Lag by lag along each of the axes of the outputs, by the pairs of windows at that lag; a window and itself included.
    """
    shape = [_reach(places) for places in windows]
    moments = g.lagged(axes, [n for n, places in zip(shape, windows, strict=True) if len(places) > 1])[0].reshape(shape)
    found = 0.0
    for lag, (first, second, both), share in pairs_of_windows(windows, shape):
        pairs = math.prod((1.0 + (i > 0)) * (1.0 - i / len(places)) for i, places in zip(lag, windows, strict=True))
        found += pairs * share * float(moments[lag]) * both / (first + second - both)
    return found


def _reach(places: Places) -> int:
    """How many lags lie between windows that have an entry in common, itself included."""
    lag = 1
    while lag < len(places) and any(np.intersect1d(a[a >= 0], b).size for a, b in zip(places, places[lag:], strict=False)):
        lag += 1
    return lag


def _largest_levels(g: Value, made_dims: Sequence[Dim], dims: Sequence[int], windows: Sequence[Places]) -> Array | None:
    profile = np.ones((1,) * sum(len(dim) for dim in made_dims))
    for d, places in zip(dims, windows, strict=True):
        if made_dims[d]:
            position, size = sum(len(dim) for dim in made_dims[:d]), made_dims[d][0].size
            loud = levels.over(g.levels, sum(len(dim) for dim in g.dims[:d]), len(places)) if g.dims[d] else np.ones(1)
            shape = [size if p == position else 1 for p in range(profile.ndim)]
            profile = profile * np.sqrt(_largest_at(places, loud**2, size)).reshape(shape)
    return levels.normalised(profile)


def _largest_at(windows: Places, loud: Array, size: int) -> Array:
    """Sum at each place of what comes from the windows that have it as their largest, any entry being so as often."""
    inside = windows >= 0
    share = loud[:, None] * inside / np.maximum(inside.sum(1, keepdims=True), 1)
    return np.asarray(np.bincount(windows[inside], share[inside], size))


def _given_largest(x: Value, dims: Sequence[int], windows: Sequence[Places]) -> Given:
    """What z is where the gradient goes: each window of n entries sends it to one with the density ``n Phi^(n - 1)``."""
    shared = float(np.clip(_within_windows(x, dims, [places.shape[1] for places in windows]), 0.0, 1.0))
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
