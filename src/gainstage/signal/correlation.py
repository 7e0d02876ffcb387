"""Gradient of a kernel: input and gradient multiplied, summed over samples and positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.alike import averaged
from gainstage.signal.axes import Axis, Dim
from gainstage.signal.contraction import Places, Subscripts, match, stride_of
from gainstage.signal.copies import replace
from gainstage.signal.filters import common_part, without_mean
from gainstage.signal.movement import merge_dim, reshape
from gainstage.signal.neighbours import outer
from gainstage.signal.pointwise import combine
from gainstage.signal.quadrature import Array
from gainstage.signal.value import Value, gaussian

NOTHING = 1e-3  # of what independent entries sum to: epsilons of norms


def position_pairs(windows: Array) -> Array:
    """``N[t, g, x]``: pairs of positions that two entries of the kernel's gradient sum over, along one dimension.

    By same or another tap (t), same or another place in the gradient (g) and in the input (x). ``windows`` [outputs, taps] is the
    product of the levels of output and input where a tap reads inside the map, else 0. Two different taps read different places
    of the input, up to the few that a stride lets meet.
    """
    taps = windows.shape[1]
    sums, squares = windows.sum(0), (windows**2).sum(0)
    pairs = np.zeros((2, 2, 2))
    pairs[1, 1, 1] = squares.mean()
    pairs[1, 0, 0] = (sums**2 - squares).mean()
    if taps > 1:
        together = windows.T @ windows
        other = taps * (taps - 1.0)
        same_place = (together.sum() - np.trace(together)) / other
        pairs[0, 1, 0] = same_place
        pairs[0, 0, 0] = (sums.sum() ** 2 - (sums**2).sum()) / other - same_place
    return pairs


def convolution_weight_gradient(g: Value, x: Value, shape: Sequence[int], places: Sequence[Places], groups: int) -> Value:
    """Gradient [out, channel/groups, *taps] from g [batch, out, *outputs] and x [batch, channel, *space].

    ``K_W[S] = sum over pairs of samples and positions of K_g K_x``, g and x independent. Where g sums to zero, as behind a batch
    norm, nothing comes of what all places of x have in common but for its border: a small difference of large sums, found apart.
    """
    for d in range(2, 2 + len(places)):
        g, x = merge_dim(g, d), merge_dim(x, d)
    everywhere = [axis for d, dim in enumerate(x.dims) if d != 1 for axis in dim]
    if not _sums_to_zero(g):
        return _summed_products(g, x, shape, places, groups)
    found = _summed_products(g, without_mean(x, everywhere), shape, places, groups)
    common = common_part(x, everywhere)
    if common.levels is None and all(int(place.min()) >= 0 for place in places):
        return found
    return combine(torch.add, found, _summed_products(replace(g, levels=None), common, shape, places, groups))


def _sums_to_zero(g: Value) -> bool:
    """Whether the sum of each channel over samples and positions is nothing beside that of independent entries."""
    axes = [axis for d, dim in enumerate(g.dims) if d != 1 for axis in dim]
    total = float(averaged(g.table, [g.axes.index(axis) for axis in axes], axes)[(-1,) * g.table.ndim])
    return abs(total) * math.prod(axis.size for axis in axes) < NOTHING * g.second_moment


def _summed_products(g: Value, x: Value, shape: Sequence[int], places: Sequence[Places], groups: int) -> Value:
    rank = len(places)
    g = reshape(g, (g.shape[0], groups, g.shape[1] // groups, *g.shape[2:]))
    x = reshape(x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    outputs, space = "pqr"[:rank], "uvw"[:rank]
    g, x = match(g, x, "bgo" + outputs, "bgc" + space)
    even_g, even_x = _evened(g), _evened(x)
    numbers = Subscripts()
    index_g = [n for label, dim in zip("bgo" + outputs, g.dims, strict=True) for n in numbers.of(label, dim)]
    index_x = [n for label, dim in zip("bgc" + space, x.dims, strict=True) for n in numbers.of(label, dim)]
    operands: list[object] = [even_g, index_g, even_x, index_x]
    for axis, number in zip(g.dims[0], numbers.of("b", g.dims[0]), strict=True):
        operands += [np.array([axis.size * (axis.size - 1.0), float(axis.size)]), [number]]
    taps: list[Dim] = []
    tap_index: list[int] = []
    windows = [_weighted(place, g, x, d - rank) for d, place in enumerate(places)]
    for d, place in enumerate(places):
        pairs = position_pairs(windows[d])
        tap = (Axis(place.shape[1]),) if place.shape[1] > 1 else ()
        subscripts: list[int] = []
        if tap:
            subscripts.append(numbers.fresh())
            tap_index.append(subscripts[0])
        else:
            pairs = pairs[1:]
        for position, (label, dim) in enumerate(((outputs[d], g.dims[3 + d]), (space[d], x.dims[3 + d])), start=1):
            found = numbers.of(label, dim)
            subscripts += found
            if not found:
                pairs = pairs.sum(axis=position, keepdims=True)
        taps.append(tap)
        operands += [pairs.reshape((2,) * len(subscripts)), subscripts]
    out_index = [*(n for label in "goc" for n in numbers.of(label, ())), *tap_index]
    table = np.asarray(np.einsum(*operands, out_index), dtype=np.float64)  # type: ignore[call-overload]
    if g.neighbours() is not None or x.neighbours() is not None:
        samples = math.prod(axis.size for axis in g.dims[0])
        table[(1,) * table.ndim] += samples * _neighbours_gain(g, x, places, windows, (even_g, even_x))
    dims = ((*g.dims[1], *g.dims[2]), x.dims[2], *taps)
    found_value = gaussian(dims, 0.0, table, lineage=g.lineage | x.lineage)
    assert found_value.shape == tuple(shape), (found_value.shape, shape)
    return found_value


def _neighbours_gain(
    g: Value, x: Value, places: Sequence[Places], windows: Sequence[Array], tables: tuple[Array, Array]
) -> float:
    """``sum over pairs of positions of K_g(lag) K_x(stride lag)``, less the sum of products of the averages in the tables."""
    counts, strides, axes = [], [], [(dim_g, dim_x) for dim_g, dim_x in zip(g.dims[3:], x.dims[3:], strict=True)]
    for window, place in zip(windows, places, strict=True):
        matrix = window @ window.T / window.shape[1]
        sums = np.array([float(np.trace(matrix, lag)) for lag in range(len(matrix))])
        counts.append(np.where(np.arange(len(sums)) > 0, 2.0, 1.0) * sums)
        strides.append(stride_of(place))
    shape = [len(count) for count in counts]
    near, average = np.ones(shape), np.ones(shape)
    for value, table, side, steps in ((g, tables[0], 0, [1] * len(shape)), (x, tables[1], 1, strides)):
        present = [pair[side][0] if pair[side] else None for pair in axes]
        lags = [step * (n - 1) + 1 if axis else 1 for axis, n, step in zip(present, shape, steps, strict=True)]
        moments, _ = value.lagged([axis for axis in present if axis], [n for axis, n in zip(present, lags, strict=True) if axis])
        moments = moments.reshape(lags)[tuple(slice(None, None, step) for step in steps)]
        near = near * moments
        average = average * by_equality(table, [value.axes.index(axis) if axis else None for axis in present], shape)
    return float((outer(counts) * (near - average)).sum())


def by_equality(table: Array, positions: Sequence[int | None], shape: Sequence[int]) -> Array:
    """Entries of a table by lags along some axes: the same place at lag 0, another one elsewhere; the rest equal."""
    index: list[Array | int] = [1] * table.ndim
    for d, (position, size) in enumerate(zip(positions, shape, strict=True)):
        if position is not None:
            along = np.where(np.arange(size) > 0, 0, 1)
            index[position] = along.reshape([-1 if e == d else 1 for e in range(len(shape))])
    return np.broadcast_to(table[tuple(index)], shape)


def _weighted(places: Places, g: Value, x: Value, dim: int) -> Array:
    """Levels of gradient and input, multiplied, at the pairs of places that one dimension's taps bring together."""
    dim %= len(g.dims)
    first_g, first_x = (sum(len(axes) for axes in value.dims[:dim]) for value in (g, x))
    window = levels.read(x.levels if x.dims[dim] else None, first_x, places)
    if g.levels is None or not g.dims[dim]:
        return window
    return window * levels.over(g.levels, first_g, places.shape[0])[:, None]


def _evened(x: Value) -> Array:
    """Table without the levels along the dimensions of space."""
    first = x.table.ndim - sum(len(dim) for dim in x.dims[3:])
    return levels.evened(x.table, x.levels, range(first, x.table.ndim))
