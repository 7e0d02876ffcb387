"""Gradients through functions of many entries: norms, softmax, maximum over windows, look-ups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.axes import Axis
from gainstage.signal.filters import normalise
from gainstage.signal.gather import same_index_table
from gainstage.signal.linear import affine, averaged, multiply
from gainstage.signal.movement import merge_dim, refine
from gainstage.signal.pointwise import align, combine
from gainstage.signal.quadrature import Array, coarse, expectation, nodes, weights
from gainstage.signal.value import Given, Value, gaussian


def averaged_over(table: Array, value: Value, reduced: Sequence[Axis]) -> Array:
    """Average of a table over all pairs of coordinates along some axes of a value, which keep length 1."""
    return averaged(table, [value.axes.index(axis) for axis in reduced], reduced)


def together(x: Value, y: Value) -> tuple[Value, Value]:
    """Two values of one shape, with the axes of both split alike."""
    for d in range(len(x.dims)):
        x, y = refine(x, y, d, d)
    return x, y


def normalise_gradient(g: Value, x: Value, dims: Sequence[int], eps: float, *, centre: bool = True) -> tuple[Value, Value]:
    """``scale (g - mean(g) - xhat mean(g xhat))``, the means over some dimensions; and ``xhat``, the normalised x.

    Of g's second moments go those of its mean and of its part along xhat, which has mean square 1 there. The variance that
    divides strays from draw to draw, by ``v = mean over pairs of 2 rho^2`` of its square: ``E[1 / s^2] = (1 + v) / E[s^2]``.
    """
    x, g = together(x, g)
    x_axes = [axis for d in dims for axis in x.dims[d]]
    axes = [axis for d in dims for axis in g.dims[d]]
    centred = x.table - averaged_over(x.table, x, x_axes) if centre else x.table
    level = max(float(centred[(1,) * x.table.ndim]), 0.0) + eps
    stray = averaged_over(2.0 * (centred / level) ** 2, x, x_axes)[(-1,) * x.table.ndim] if level > 0.0 else 0.0
    xhat = normalise(x, x_axes, eps, centre=centre)
    table = g.table - xhat.table * averaged_over(times_own(g, xhat).table, g, axes)
    if centre:
        table = table - averaged_over(g.table, g, axes)
    inverse, profile = _divided_levels(g, x, [x.axes.index(axis) for axis in x_axes], level - eps, eps)
    table = table * ((1.0 + stray) * inverse)
    full = (1,) * table.ndim
    table[full] = max(float(table[full]), 0.0)
    extra = {"lineage": g.lineage | x.lineage, "log_variance": g.log_variance}
    return gaussian(g.dims, 0.0, table, profile, **extra), xhat


def _divided_levels(g: Value, x: Value, reduced: Sequence[int], level: float, eps: float) -> tuple[float, Array | None]:
    """``E[g^2 / (s^2 + eps)] / E[g^2]`` over coordinates, each with the deviation s of its own level; and its profile."""
    own = np.ones((1,) * x.table.ndim) if x.levels is None else x.levels**2
    gradient = np.ones((1,) * g.table.ndim) if g.levels is None else g.levels**2
    variance = level * own.mean(axis=tuple(reduced), keepdims=True) + eps
    inverse = np.where(variance > 0.0, 1.0 / np.where(variance > 0.0, variance, 1.0), 0.0) * gradient
    return float(inverse.mean()), levels.normalised(np.sqrt(inverse))


def softmax_gradient(g: Value, p: Value, dim: int, evenness: float = 1.0) -> Value:
    """``p (g - sum p g)`` along a dimension: what g has in common along it goes.

    ``K[S] = (1/n) U (1 - U) (K_g[same] - K_g[other])`` for keys that are the same, U the overlap ``sum p p'`` of the rows; the
    sum over keys is zero. ``evenness``: mean of U (1 - U) over rows that see different numbers of keys, over its
    value at the mean U.
    """
    g, p = together(g, p)
    g, p = merge_dim(g, dim), merge_dim(p, dim)
    if not g.dims[dim]:
        return gaussian(g.dims, 0.0, np.zeros_like(g.table))
    position = sum(len(d) for d in g.dims[:dim])
    size = g.shape[dim]
    own = np.take(g.table, 1, axis=position) - np.take(g.table, 0, axis=position)
    overlap = np.clip(size * np.take(p.table, 1, axis=position), 0.0, 1.0)
    same = own * overlap * (1.0 - overlap) * evenness / size
    table = np.stack([-same / (size - 1.0), same], axis=position)
    return gaussian(g.dims, 0.0, table, lineage=g.lineage | p.lineage, log_variance=g.log_variance)


def lookup_gradient(g: Value, index: torch.Tensor, rows: int) -> Value:
    """Gradient [rows, ...] of a table from that of the entries looked up: sums over equal indices.

    ``K[same row] = (1/rows) sum over pairs of entries of P(equal) K_g``; the sum over all pairs is that of g.
    """
    rank = index.dim()
    probability, dims = same_index_table(index)
    equal = gaussian(dims, 0.0, probability)
    for d in range(rank):
        g, equal = refine(g, equal, d, d)
    axes = [axis for dim in g.dims[:rank] for axis in dim]
    counts = np.ones((1,) * len(axes))
    for position, axis in enumerate(axes):
        shape = [1] * len(axes)
        shape[position] = 2
        counts = counts * np.array([axis.size * (axis.size - 1.0), float(axis.size)]).reshape(shape)
    pad = (...,) + (None,) * (g.table.ndim - len(axes))
    over = tuple(range(len(axes)))
    everything = (g.table * counts[pad]).sum(over)
    same = (g.table * (counts * equal.table)[pad]).sum(over)
    other = (everything - same) / max(rows * (rows - 1.0), 1.0)
    table = np.stack([other, same / rows]) if rows > 1 else everything
    rows_dim = (Axis(rows),) if rows > 1 else ()
    return gaussian((rows_dim, *g.dims[rank:]), 0.0, np.asarray(table), lineage=g.lineage, log_variance=g.log_variance)


def through_slope(g: Value, steepness: Value) -> Value:
    """``g f'(u)`` for the slope f'(u) of an activation: what g knows of u and what the slope knows of it are not independent."""
    made = multiply(*align(g, steepness))
    slopes = steepness.marginal.values
    if g.given is None:
        return replace(made, given=Given(slopes, slopes**2, g).scaled())
    given = Given(g.given.mean * slopes, g.given.square * slopes**2, g.given.base)
    apart = g.given.moments() * np.array([expectation(slopes), expectation(slopes**2)])
    if apart[0] ** 2 <= 1e-6 * apart[1] or apart[1] <= 0.0:  # what two entries share is not carried by the mean of r
        return replace(made, given=given.scaled())
    means, squares = given.moments() / apart
    return replace(_weighted(made, squares, means**2), given=given.scaled())


def _weighted(x: Value, own: float, pairs: float) -> Value:
    """The second moment of an entry with itself times one factor, those of two entries times another."""
    table = x.table * pairs
    table[(1,) * table.ndim] = x.second_moment * own
    return replace(x, table=table, rho=None)


def to_summand(g: Value, total: Value, x: Value, y: Value, sign: float) -> Value:
    """Gradient of x from that of ``x + sign y``: ``E[h(x + sign y) | x]`` of what it knows of the sum."""
    if g.given is None:
        return g
    order = np.argsort(total.marginal.values, kind="stable")
    known = total.marginal.values[order]
    places = x.marginal.values[:, None] + sign * y.marginal.values[None, ::8]
    mass = weights()[::8] / weights()[::8].sum()
    mean, square = (np.interp(places, known, part[order]) @ mass for part in (g.given.mean, g.given.square))
    return replace(g, given=Given(mean, square, g.given.base).scaled())


def accumulated(first: Value, second: Value) -> Value:
    """Sum of two independent gradients of one tensor."""
    total = combine(torch.add, first, second)
    if (first.given is None and second.given is None) or total.second_moment <= 0.0:
        return total
    even = Given(np.ones(nodes().shape), np.ones(nodes().shape))
    a, b = first.given or even, second.given or even
    share = first.second_moment / (first.second_moment + second.second_moment)
    mean = np.sqrt(share * a.mean**2 + (1.0 - share) * b.mean**2)
    louder = a if share > 0.5 else b
    return replace(total, given=Given(mean, share * a.square + (1.0 - share) * b.square, louder.base).scaled())


def times_own(g: Value, x: Value) -> Value:
    """``g x`` for a gradient g and the tensor x that it belongs to, or an affine function of it.

    Where g has met x in an activation, ``g = g0 r(x)``: entries that share g0 keep ``E[r x]^2 / E[r]^2`` beside ``E[x x']``.
    """
    g, x = together(*align(g, x))
    made = multiply(g, x)
    if g.given is None:
        return made
    mean, square = g.given.moments()
    leaning = expectation(g.given.mean * x.marginal.values) / mean if mean else 0.0
    table = g.table * (x.table - x.mean**2 + leaning**2)
    table[(1,) * table.ndim] = g.second_moment * expectation(g.given.square * x.marginal.values**2) / square
    return gaussian(made.dims, 0.0, table, lineage=made.lineage)


def along_weight(g: Value, x: Value, reduced: Sequence[int], fan_in: float) -> tuple[Value, Value] | None:
    """Two tensors whose product, summed like ``g x``, is what the gradient of a weight w has along w itself; None for nothing.

    Where the gradient of ``u = w x`` has met u in an activation, ``g = g0 r(u)``, samples of one g0 add up along the weight: by
    Stein's lemma ``E[r(u) x_i] = w_i E[r u] E[x^2] / E[u^2]``, so that ``E[x x']`` gains ``E[r z]^2 E[x^2] / n`` for n terms and
    the standardised u = z. ``reduced``: the dimensions of x that the weight sums over.
    """
    if g.given is None or g.given.base is None or g.given.base.shape != g.shape or g.given.base.second_moment <= 0.0:
        return None
    pull = expectation(g.given.mean * nodes()) ** 2
    starts = np.cumsum([0, *(len(dim) for dim in x.dims)])
    shared = {position for d in reduced for position in range(starts[d], starts[d + 1])}
    table = np.zeros_like(x.table)
    table[tuple(1 if position in shared else slice(None) for position in range(table.ndim))] = pull * x.second_moment / fan_in
    table[(1,) * table.ndim] = 0.0  # a sample with itself is counted in full
    base = g.given.base
    return affine(base, (g.second_moment / base.second_moment) ** 0.5), gaussian(x.dims, 0.0, table)


def largest_gradient(g: Value, x: Value, dims: Sequence[int], window: float) -> Value:
    """Gradient of x from that of the largest entries of its windows along some dimensions, each with ``window`` positions.

    The sum over positions is that of g. An entry at ``z = sqrt(r) common + sqrt(1 - r) own`` is the largest of its window with
    probability ``Phi(own)^(window - 1)``.
    """
    outputs, inputs = (float(np.prod([value.shape[d] for d in dims])) for value in (g, x))
    for d in dims:
        g, x = merge_dim(g, d), merge_dim(x, d)
    axes = [axis for d in dims for axis in g.dims[d]]
    at = [g.axes.index(axis) for axis in axes]
    alike = g.table[tuple(1 if p in at else slice(None) for p in range(g.table.ndim))]
    total = averaged_over(g.table, g, axes)[tuple(0 if p in at else slice(None) for p in range(g.table.ndim))] * outputs**2
    same = total / inputs**2
    other = same.copy()
    full = (1,) * same.ndim
    same[full] = alike[full] * outputs / inputs
    other[full] = (total[full] - alike[full] * outputs) / max(inputs * (inputs - 1.0), 1.0)
    places = tuple(dim for d in dims for dim in [x.dims[d]] if dim)
    table = np.broadcast_to(np.expand_dims(other, tuple(range(-len(places), 0))), other.shape + (2,) * len(places)).copy()
    table[(slice(None),) * other.ndim + (1,) * len(places)] = same
    table = np.moveaxis(table, range(other.ndim, table.ndim), [sum(len(v) for v in x.dims[:d]) for d in dims if x.dims[d]])
    made_dims = tuple(x.dims[d] if d in dims else axes_d for d, axes_d in enumerate(g.dims))
    made = gaussian(made_dims, 0.0, np.asarray(table), lineage=g.lineage | x.lineage)
    return replace(made, given=_given_largest(x, dims, window).scaled())


def _given_largest(x: Value, dims: Sequence[int], window: float) -> Given:
    rho = x.correlation()
    at = {sum(len(v) for v in x.dims[:d]) for d in dims if x.dims[d]}
    shared = float(np.clip(rho[tuple(0 if p in at else 1 for p in range(rho.ndim))], 0.0, 1.0)) if at else 1.0
    points, mass = coarse()
    own = np.sqrt(1.0 - shared) * nodes()[:, None] + np.sqrt(shared) * points[None, :]
    chance = (torch.special.ndtr(torch.from_numpy(own)).numpy() ** (window - 1.0)) @ mass
    return Given(chance, chance)
