"""Filters, pooling and normalization along axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.axes import Axis
from gainstage.signal.linear import amplitude_of, is_gaussian, standardised
from gainstage.signal.movement import merge_dim
from gainstage.signal.quadrature import Array, coarse, cumulative, evaluate_series, invert_series, nodes, quantiles
from gainstage.signal.value import Marginal, Value, gaussian


def filter_dim(x: Value, dim: int, matrix: Array) -> Value:
    """Linear map along one dimension with known coefficients: ``y_p = sum_i matrix[p, i] x_i``.

    Covers average pooling, interpolation, cumulative sums and padding. Exact for positions that are exchangeable but for
    their levels.
    """
    x = merge_dim(x, dim)
    outputs, inputs = matrix.shape
    position = sum(len(d) for d in x.dims[:dim])
    along = np.ones(1) if x.levels is None or inputs == 1 else levels.over(x.levels, position, inputs)
    even = levels.evened(x.table, x.levels, [position]) if inputs > 1 else np.stack([x.table, x.table], axis=position)
    weighted = matrix * along
    table = np.moveaxis(np.tensordot(_mixing(weighted), np.moveaxis(even, position, 0), axes=1), 0, position)
    same_axes = outputs == inputs and inputs > 1
    out_axis = x.dims[dim] if same_axes else ((Axis(outputs),) if outputs > 1 else ())
    profile = _filtered_levels(x.levels, even, weighted, position)
    if outputs == 1:
        table = np.take(table, 1, axis=position)
    dims = tuple(out_axis if d == dim else axes for d, axes in enumerate(x.dims))
    mean = x.mean * float(weighted.sum(1).mean() / along.mean())
    result = gaussian(dims, mean, table, profile, lineage=x.lineage, log_variance=x.log_variance, is_weight=x.is_weight)
    if not is_gaussian(x):
        result = replace(result, marginal=_filtered_marginal(x, result, _terms(weighted)), rho=None)
    if same_axes:
        rest = (float(np.trace(matrix)) - float(matrix.sum()) / inputs) / (inputs - 1)
        factors = np.array([float(matrix.sum()) / inputs, rest])
        shape = [1] * table.ndim
        shape[position] = 2
        result = replace(result, source=x.source, amplitude=amplitude_of(x) * factors.reshape(shape))
    return result


def _mixing(matrix: Array) -> Array:
    """``mix[s, i]`` of ``K_y[s] = sum_i mix[s, i] K_x[i]`` along the axis of a linear map."""
    outputs = matrix.shape[0]
    sums, columns = matrix.sum(1), matrix.sum(0)
    squares = float((matrix**2).sum())
    mix = np.zeros((2, 2))
    mix[1, 1] = squares / outputs
    mix[1, 0] = float((sums**2).mean()) - mix[1, 1]
    if outputs > 1:
        pairs = outputs * (outputs - 1.0)
        mix[0, 1] = (float((columns**2).sum()) - squares) / pairs
        mix[0, 0] = (float(sums.sum()) ** 2 - float((sums**2).sum())) / pairs - mix[0, 1]
    return mix


def _filtered_levels(profile: Array | None, even: Array, matrix: Array, position: int) -> Array | None:
    """Levels after a linear map along an axis: the second moment of each output, times the levels along the other axes."""
    full = [1] * even.ndim
    other, same = (float(even[(*full[:position], s, *full[position + 1 :])]) for s in (0, 1))
    squares, sums = (matrix**2).sum(1), matrix.sum(1)
    own = np.maximum(squares * same + (sums**2 - squares) * other, 0.0)
    if profile is None:
        profile = np.ones((1,) * (even.ndim - (matrix.shape[1] == 1)))
    if matrix.shape[1] > 1:
        profile = np.sqrt((profile**2).mean(axis=position, keepdims=matrix.shape[0] > 1))
    elif matrix.shape[0] > 1:
        profile = np.expand_dims(profile, position)
    if matrix.shape[0] > 1:
        profile = profile * np.sqrt(own).reshape([-1 if p == position else 1 for p in range(even.ndim)])
    return levels.normalised(np.asarray(profile))


def _terms(matrix: Array) -> float:
    """How many equal terms an output's sum amounts to."""
    return float((matrix.sum(1) ** 2 / np.maximum((matrix**2).sum(1), 1e-300)).mean())


def _filtered_marginal(x: Value, result: Value, terms: float) -> Marginal:
    """A sum of few terms keeps the shape of one term; of many it is Gaussian (excess moments fall like 1/terms)."""

    def values() -> Array:
        own = standardised(x.marginal.values, result.mean, result.variance**0.5)
        normal = result.mean + result.variance**0.5 * nodes()
        common = 1.0 - min(max(result.variance / x.variance, 0.0), 1.0) if x.variance > 0 else 0.0
        share = 1.0 if terms <= 1.0 else max(1.0 / terms, 1.0 - common * terms / max(terms - 1.0, 1e-9))
        mixed = share * np.sort(own) + (1.0 - share) * normal
        return standardised(mixed, result.mean, result.variance**0.5)

    return Marginal(object(), values)


def normalise(x: Value, reduced: Sequence[Axis], eps: float, *, centre: bool = True) -> Value:
    """``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)`` over some axes; without ``centre`` the mean stays.

    Layer, instance, group and batch norm are this, over other axes. The mean square over the axes is read off the table.
    """
    mixed = x.table
    for axis in reduced:
        position = x.axes.index(axis)
        other, same = np.take(mixed, 0, axis=position), np.take(mixed, 1, axis=position)
        mixed = np.expand_dims(other + (same - other) / axis.size, position)
    centred = x.table - mixed if centre else x.table
    full = (1,) * x.table.ndim
    level = max(float(centred[full]), 0.0)
    if level <= 1e-13 * max(x.second_moment, 1e-300):
        level = 0.0
    scale = 1.0 / (level + eps) ** 0.5 if level + eps > 0.0 else 0.0
    table = centred * scale**2 if level else np.zeros_like(centred)
    mean = 0.0 if centre else x.mean * scale
    amplitude = amplitude_of(x) * scale
    if centre and reduced:
        index = tuple(0 if axis in reduced else slice(None) for axis in x.axes)
        amplitude[index] = 0.0
    std = max(float(table[full]) - mean**2, 0.0) ** 0.5
    removed = max(float(mixed.max()) - x.mean**2, 0.0) if centre else 0.0
    keeps_latent = removed <= 1e-3 * max(level, 1e-300)
    profile = _normalised_levels(x, [x.axes.index(axis) for axis in reduced], float(mixed[(-1,) * mixed.ndim]) if centre else 0.0)
    marginal = _normalised_marginal(x, mean, std, profile, x.marginal.latent if keeps_latent else object())
    return replace(
        x,
        mean=mean,
        table=table,
        marginal=marginal,
        rho=x.correlation() if keeps_latent else None,
        amplitude=amplitude,
        statistic=None,
        log_variance=0.0,
        constant=None,
        mask=None,
        levels=profile,
    )


def _normalised_levels(x: Value, reduced: Sequence[int], removed: float) -> Array | None:
    """Levels of ``x - mean(x)``: of ``E[x_i^2] - 2 E[x_i mean(x)] + E[mean(x)^2]``, relative to their average over some axes."""
    if x.levels is None:
        return None
    along = tuple(reduced)
    lean = x.leaning()
    squares = x.levels**2 / np.maximum((x.levels**2).mean(axis=along, keepdims=True), 1e-300) * x.second_moment
    lean = lean / np.maximum(lean.mean(axis=along, keepdims=True), 1e-300)
    centred = np.maximum(squares + removed * (1.0 - 2.0 * lean), 0.0)
    return levels.normalised(np.sqrt(centred / np.maximum(centred.mean(axis=along, keepdims=True), 1e-300)))


def _normalised_marginal(x: Value, mean: float, std: float, profile: Array | None, latent: object) -> Marginal:
    """The shape of an entry of average level, at the levels that are left."""
    if x.levels is None:
        return Marginal(latent, lambda: standardised(x.marginal.values, mean, std))

    def even() -> Array:
        return standardised(x.marginal.even, mean, std)

    if profile is not None and is_gaussian(x):
        return Marginal(latent, lambda: standardised(levels.normal_mixture(profile), mean, std), even)
    return Marginal(latent, even if profile is None else lambda: standardised(x.marginal.values, mean, std), even)


@cache
def _largest(count: float) -> Array:
    """Grid values of the largest of ``count`` independent standard normals, as a function of a standard normal."""
    level = np.clip(cumulative(), 1e-300, 1 - 1e-16) ** (1.0 / count)
    return np.asarray(torch.special.ndtri(torch.from_numpy(level)).numpy())


def max_over(x: Value, dims: Sequence[int], counts: Sequence[Array]) -> Value:
    """Maximum over windows along some dimensions. ``counts``: positions in each window, for each dimension.

    Positions are equally correlated Gaussians behind x: ``z = sqrt(r) common + sqrt(1 - r) own``; the maximum of the own parts
    has the distribution ``Phi(t)^k``.
    """
    for d in dims:
        x = merge_dim(x, d)
    rho = x.correlation()
    position_of = {d: sum(len(dim) for dim in x.dims[:d]) for d in dims if x.dims[d]}
    index = tuple(0 if p in position_of.values() else 1 for p in range(rho.ndim))
    shared = float(np.clip(rho[index], 0.0, 1.0)) if position_of else 1.0
    window = float(np.prod([float(np.mean(count)) for count in counts]))
    points, mass = coarse()
    top = np.interp(points, nodes(), _largest(window))
    z = np.sqrt(shared) * points[:, None] + np.sqrt(1.0 - shared) * top[None, :]
    ordered = np.maximum.accumulate(x.marginal.values)
    surface = np.interp(z, nodes(), ordered if np.all(np.diff(x.marginal.values) >= 0) else np.sort(x.marginal.values))
    weight = mass[:, None] * mass[None, :]
    mean, second = float((surface * weight).sum()), float((surface**2 * weight).sum())
    grid = quantiles(surface, weight)
    std = max(second - mean**2, 0.0) ** 0.5
    common = float(((surface @ mass) ** 2) @ mass)
    new_dims = list(x.dims)
    table_index: list[Any] = [slice(None)] * rho.ndim
    for d, count in zip(dims, counts, strict=True):
        outputs = len(count)
        new_dims[d] = (Axis(outputs),) if outputs > 1 else ()
        if d in position_of and outputs == 1:
            table_index[position_of[d]] = 1
    marginal = Marginal(object(), lambda: standardised(grid, mean, std))
    new_rho = rho.copy()
    if position_of:
        target = float(invert_series(marginal.series, np.array([common - mean**2]))[0])
        ratio = target / shared if shared > 0 else 1.0
        for p in position_of.values():
            np.moveaxis(new_rho, p, 0)[0] *= ratio if p == min(position_of.values()) else 1.0
        both = list(position_of.values())
        for subset in np.ndindex(*rho.shape):
            if any(subset[p] == 0 for p in both):
                new_rho[subset] = np.clip(rho[subset] * ratio, -1, 1)
            else:
                new_rho[subset] = rho[subset]
    new_rho = np.asarray(new_rho[tuple(table_index)])
    table = evaluate_series(marginal.series, new_rho)
    return Value(
        dims=tuple(new_dims),
        mean=mean,
        table=table,
        marginal=marginal,
        rho=new_rho,
        source=object(),
        lineage=x.lineage,
        log_variance=x.log_variance,
    )
