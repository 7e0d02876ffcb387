"""Filters, pooling and normalization along axes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from gainstage.signal import levels
from gainstage.signal.alike import averaged, border, centred, mean_square
from gainstage.signal.axes import Axis
from gainstage.signal.between import rescaled
from gainstage.signal.copies import once, replace
from gainstage.signal.directions import divided, divided_by_channel
from gainstage.signal.edges import left_by_norm
from gainstage.signal.filtered import mapped, times
from gainstage.signal.gram import Gram
from gainstage.signal.joining import join
from gainstage.signal.linear import affine
from gainstage.signal.marginal import Marginal
from gainstage.signal.movement import merge_dim, parts_along
from gainstage.signal.neighbours import Neighbours, cut, far_of, filtered, made
from gainstage.signal.overlap import NONE, Overlap
from gainstage.signal.overlap import filtered as filtered_overlap
from gainstage.signal.pairing import amplitude_of
from gainstage.signal.quadrature import Array, gamma_scales, nodes, standardised
from gainstage.signal.shares import Share
from gainstage.signal.spread import held
from gainstage.signal.stray import averaged as averaged_stray
from gainstage.signal.uneven import after_norm
from gainstage.signal.value import Value, gaussian

NEGLIGIBLE = 1e-5  # of a second moment: what epsilon takes of quiet channels more than of loud ones
MOST_STRAY = 2.0  # relative variance of a divisor: that of the square of one normal number


def filter_dim(x: Value, dim: int, matrix: Array) -> Value:
    """Linear map along one dimension with known coefficients: ``y_p = sum_i matrix[p, i] x_i``.

    Covers average pooling, interpolation, cumulative sums and padding. Exact for positions that are exchangeable but for
    their levels. Of a concatenation, each part by itself.
    """
    parts = parts_along(x)
    if parts is not None and parts[0] != dim:
        return join([filter_dim(part, dim, matrix) for part in parts[1]], parts[0])
    x = merge_dim(x, dim)
    outputs, inputs = matrix.shape
    position = sum(len(d) for d in x.dims[:dim])
    along = np.ones(1) if x.levels is None or inputs == 1 else levels.over(x.levels, position, inputs)
    even = levels.evened(x.table, x.levels, [position]) if inputs > 1 else np.stack([x.table, x.table], axis=position)
    weighted = matrix if x.levels is None else matrix * along
    mixing = _mixing(weighted)
    table = np.moveaxis(np.tensordot(mixing, np.moveaxis(even, position, 0), axes=1), 0, position)
    same_axes = outputs == inputs and inputs > 1
    out_axis = x.dims[dim] if same_axes else ((Axis(outputs),) if outputs > 1 else ())
    near = None
    if inputs > 1:
        near, table = _filtered_neighbours(x, even, x.dims[dim][0], weighted, table, mixing=mixing)
        near = None if near is None else cut(near.strided(x.dims[dim][0], 1, out_axis))
    profile = _filtered_levels(x.levels, even, weighted, position)
    if outputs == 1:
        table = np.take(table, 1, axis=position)
    elif inputs > 1:
        table = _conserved(x, table, position, matrix)
    dims = tuple(out_axis if d == dim else axes for d, axes in enumerate(x.dims))
    mean = x.mean * float(weighted.sum(1).mean() / along.mean())
    along_it = tuple(slice(None) if p == position else 1 for p in range(x.table.ndim))
    stray = averaged_stray(x, lambda pairs: float(mixing[1] @ pairs[along_it])) if inputs > 1 else x.stray.hidden()
    result = gaussian(dims, mean, table, profile, lineage=x.lineage, stray=stray, is_weight=x.is_weight)
    if inputs > 1:
        overlap, factor = filtered_overlap(x.overlap, x.dims[dim][0], matrix, out_axis)
    else:
        overlap, factor = x.overlap, float((matrix**2).mean()) ** 2
    factor *= (x.second_moment / result.second_moment) ** 2 if result.second_moment > 0.0 else 0.0
    result = replace(result, near=near, overlap=overlap.times(factor), uneven=x.uneven)
    if not x.marginal.is_gaussian:
        result = replace(result, marginal=_filtered_marginal(x, result, weighted, matrix), rho=None)
    if same_axes:
        factors = _kept_components(x, even, position, matrix)
        shape = [1] * table.ndim
        shape[position] = 2
        amplitude, maps = amplitude_of(x) * factors.reshape(shape), mapped(x, out_axis[0], matrix, result.table)
        result = replace(result, source=x.source, amplitude=amplitude, filtered=maps)
    return result


def _conserved(x: Value, table: Array, position: int, matrix: Array) -> Array:
    """Where all inputs count alike, the sum over outputs is that of inputs, as often: levels are followed axis by axis only."""
    counts, size = matrix.sum(0), matrix.shape[0]
    if np.ptp(counts) > 1e-9 * np.abs(counts).max():
        return table
    ratio = float(counts.sum()) / size
    before, after = averaged(x.table, [position], [x.axes[position]]), averaged(table, [position], [Axis(size)])
    table = table.copy()
    np.moveaxis(table, position, 0)[0] += np.take(ratio**2 * before - after, 0, axis=position) * (size / (size - 1.0))
    return table


def _kept_components(x: Value, even: Array, position: int, matrix: Array) -> Array:
    """What is left of x in M x along an axis: of the mean over it the average row sum, of the rest so much that

    ``E[x_p (M x)_p] = sum far + (own - far) mean_p sum_j M[p, j] e(p - j)``, e the excess that places near each other share.
    """
    inputs = matrix.shape[1]
    near = x.neighbours() or Neighbours((x.axes[position],), np.ones(1))
    near = near.with_axis(x.axes[position])
    own, far = far_of(near, even, x.axes)
    at = near.axes.index(x.axes[position])
    excess = near.excess[tuple(slice(None) if p == at else 0 for p in range(near.excess.ndim))]
    beside = np.array([sum(float(np.trace(matrix, lag)) for lag in {d, -d}) for d in range(min(excess.size, inputs))])
    lean = x.leaning()
    lean = lean.mean(axis=tuple(p for p in range(lean.ndim) if p != position))
    total = float((matrix.sum(0) * lean).mean() / lean.mean())
    other = float(even[tuple(0 if p == position else 1 for p in range(even.ndim))])
    apart = own - other
    if apart <= 1e-12 * abs(own):
        return np.array([total, 0.0])
    shared = total * far + (own - far) * float(beside @ excess[: beside.size]) / inputs
    return np.array([total, (shared - total * (other + apart / inputs)) / (apart * (1.0 - 1.0 / inputs))])


def _mixing(matrix: Array) -> Array:
    """``mix[s, i]`` of ``K_y[s] = sum_i mix[s, i] K_x[i]`` along the axis of a linear map."""
    outputs = matrix.shape[0]
    sums, columns = matrix.sum(1), matrix.sum(0)
    squares = float(np.vdot(matrix, matrix))
    mix = np.zeros((2, 2))
    mix[1, 1] = squares / outputs
    mix[1, 0] = float((sums**2).mean()) - mix[1, 1]
    if outputs > 1:
        pairs = outputs * (outputs - 1.0)
        mix[0, 1] = (float((columns**2).sum()) - squares) / pairs
        mix[0, 0] = (float(sums.sum()) ** 2 - float((sums**2).sum())) / pairs - mix[0, 1]
    return mix


def _filtered_neighbours(
    x: Value, even: Array, axis: Axis, matrix: Array, table: Array, *, mixing: Array
) -> tuple[Neighbours | None, Array]:
    """Lag by lag along one axis; what that adds on average to the table, which took all pairs of places to be alike."""
    near = (x.neighbours() or Neighbours((axis,), np.ones(1))).with_axis(axis)
    own, far = far_of(near, even, x.axes)
    lags, pairs = filtered(near, axis, matrix)
    rest = tuple(a for a in near.axes if a is not axis)
    result = table.copy()
    for same in np.ndindex(*(2,) * len(near.axes)):
        here = same[near.axes.index(axis)]
        equal = dict(zip(near.axes, map(bool, same), strict=True))
        shared = Neighbours(rest, pairs[here].reshape([near.lags(a) for a in rest])).average([equal[a] for a in rest])
        alike = sum(mixing[here, i] * near.average([equal[a] if a is not axis else bool(i) for a in near.axes]) for i in (0, 1))
        index = [1] * len(x.axes)
        for a, s in equal.items():
            index[x.axes.index(a)] = int(s)
        result[tuple(index)] += (own - far) * (shared - alike)
    top = float(lags[(0,) * lags.ndim])
    return (made(near.axes, lags / top) if top > 0.0 else None), result


def _filtered_levels(profile: Array | None, even: Array, matrix: Array, position: int) -> Array | None:
    """Levels after a linear map along an axis: the second moment of each output, times the levels along the other axes."""
    full = [1] * even.ndim
    other, same = (float(even[(*full[:position], s, *full[position + 1 :])]) for s in (0, 1))
    squares, sums = np.vecdot(matrix, matrix), matrix.sum(1)
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


def _filtered_marginal(x: Value, result: Value, matrix: Array, unweighted: Array) -> Marginal:
    """A sum of few terms keeps the shape of one term; of many it is Gaussian (excess moments fall like 1/terms).

    As much of the shape stays as the terms have in common: none where their variances add up, all where their deviations do.
    Where no distribution at the average level of x is known, that of all its entries stands in, which is a mixture of its levels
    already: it is mixed by the lengths of rows alone, the matrix without the levels of x.
    """
    squares = np.vecdot(matrix, matrix)
    apart, whole = float(squares.mean()), float((np.abs(matrix).sum(1) ** 2).mean())
    terms = float((matrix.sum(1) ** 2 / np.maximum(squares, 1e-300)).mean())
    gain = result.variance / x.variance if x.variance > 0.0 else 0.0
    common = (gain - apart) / (whole - apart) if whole > apart else 1.0
    share = 1.0 if terms <= 1.0 else min(max(1.0 / terms, common), 1.0)
    std = result.variance**0.5

    def even() -> Array:
        own = standardised(x.marginal.even, result.mean, std)
        return standardised(share * np.sort(own) + (1.0 - share) * (result.mean + std * nodes()), result.mean, std)

    is_mixed = x.levels is not None and not x.marginal.has_even
    profile = levels.normalised(np.sqrt((unweighted**2).sum(1))) if is_mixed else result.levels
    if profile is None:
        return Marginal(object(), even)
    return Marginal(object(), lambda: levels.mixture(profile, even(), result.mean, std), None if is_mixed else even)


def normalise(x: Value, reduced: Sequence[Axis], eps: float, *, centre: bool = True, over_places: bool = False) -> Value:
    """``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)`` over some axes; without ``centre`` the mean stays.

    Layer, instance, group and batch norm are this, over other axes. The mean square over the axes is read off the table.
    Of a concatenation, each part by itself, unless the average runs over the parts. ``over_places``: the average of each channel
    is over all samples and places.
    """
    reduced = [axis for axis in reduced if axis.size > 1]
    found = parts_along(x)
    if found is not None and x.dims[found[0]][0] not in reduced:
        how = (normalise, tuple(reduced), eps, centre, over_places)
        alone = partial(normalise, reduced=reduced, eps=eps, centre=centre, over_places=over_places)
        return join([once(part, how, partial(alone, part)) for part in found[1]], found[0])
    positions = [x.axes.index(axis) for axis in reduced]
    common = averaged(x.table, positions, reduced) if centre else np.zeros_like(x.table)
    table = x.table - common
    level = max(float(table[(1,) * table.ndim]), 0.0)
    if level <= 1e-13 * max(x.second_moment, 1e-300):
        level, table = 0.0, np.zeros_like(table)
    scale = (level + eps) ** -0.5 if level + eps > 0.0 else 0.0
    mean = 0.0 if centre else x.mean * scale
    amplitude = amplitude_of(x) * scale
    if centre and reduced:
        amplitude[tuple(0 if axis in reduced else slice(None) for axis in x.axes)] = 0.0
    left, differ = 1.0, 0.0
    if eps > NEGLIGIBLE * level > 0.0:
        left, differ = _left_by_epsilon(divisor_strays(x, reduced, table, border(x, positions), 0.0, centre=centre), eps / level)
    std = max(level * scale**2 * left - mean**2, 0.0) ** 0.5
    amplitude *= left**0.5
    rest = table
    keeps_latent = not centre or float(common.max()) - x.mean**2 <= 1e-3 * max(level, 1e-300)
    removed = float(common[(-1,) * common.ndim])
    profile, share = _normalised_levels(x, positions, removed, eps)
    std, amplitude = std * share**0.5, amplitude * share**0.5
    marginal = _normalised_marginal(x, mean, std, profile, x.marginal.latent if keeps_latent else object())
    table, gram = _evened_pairs(x, profile, table * scale**2 * share * left)
    gone = min(removed / x.second_moment, 1.0) if level > 0.0 else 1.0
    overlap = x.overlap.over(tuple(reduced), gone) if over_places else _evened_overlap(x, table)
    result = replace(
        x,
        uneven=after_norm(x, reduced, differ), mean=mean, table=table, marginal=marginal, gram=gram, amplitude=amplitude,
        rho=x.correlation() if keeps_latent else None, statistic=None, constant=None, prior=None, levels=profile,
        near=x.near_without_common() if centre else x.near, filtered=times(x, scale, table),
        overlap=_left_overlap(overlap, x.second_moment, level), edges=left_by_norm(x, reduced) if over_places else None,
    )  # fmt: skip
    if not over_places:
        result = divided(result, positions)
    elif level > 0.0:
        alike = mean_square(x, rest, positions, border(x, positions))
        result = divided_by_channel(result, positions, float(alike[(-1,) * alike.ndim]) / level**2)
    return held(replace(result, steady=Share(frozenset(reduced), (level * scale**2) ** 2)), level * scale**2, x)


def divisor_strays(x: Value, reduced: Sequence[Axis], rest: Array, edges: Array, eps: float, *, centre: bool) -> float:
    """Relative variance of what a norm divides by, the mean square over some axes of x or of x less its mean.

    ``mean over pairs of 2 rho^2``, less what a norm before holds; and what rows of weights add, where channels have divisors.

    Args:
        x: what is normalised.
        reduced: the axes.
        rest: table of x, or of x less its mean.
        edges: what borders have more of than all places, see :func:`gainstage.signal.alike.border`.
        eps: part of the divisor that is known.
        centre: whether the mean was taken.
    """
    level = max(float(rest[(1,) * x.table.ndim]), 0.0) + eps
    if level <= 0.0:
        return 0.0
    positions = [x.axes.index(axis) for axis in reduced]
    strays = 2.0 * float(mean_square(x, rest, positions, edges)[(-1,) * x.table.ndim]) / level**2
    if x.steady is not None:
        strays *= 1.0 - x.steady.over(reduced)
    return strays + (0.0 if x.uneven is None else x.uneven.of_groups(x.axes, reduced, centre=centre))


def _left_by_epsilon(strays: float, eps: float) -> tuple[float, float]:
    """``E[l / (l + eps)] (1 + eps)`` for a gamma variable l of mean 1 and this variance, and the relative variance of that.

    Quiet channels are next to an epsilon that loud ones do not notice.
    """
    if strays <= 0.0:
        return 1.0, 0.0
    scales, mass = gamma_scales(min(strays, MOST_STRAY))
    found = scales**2 / (scales**2 + eps)
    mean = float(mass @ found)
    return mean * (1.0 + eps), float(mass @ (found / mean - 1.0) ** 2)


def without_mean(x: Value, reduced: Sequence[Axis]) -> Value:
    """``x - mean(x)`` over some axes; of a concatenation each part by itself."""
    found = parts_along(x)
    if found is not None and x.dims[found[0]][0] not in reduced:
        return join([without_mean(part, reduced) for part in found[1]], found[0])
    level = float(centred(x, [x.axes.index(axis) for axis in reduced])[(1,) * x.table.ndim])
    return affine(normalise(x, reduced, 0.0), max(level, 0.0) ** 0.5)


def common_part(x: Value, reduced: Sequence[Axis]) -> Value:
    """``a_i mean(x)``: what entries have of their mean over some axes, a their lean on it."""
    positions = [x.axes.index(axis) for axis in reduced]
    lean = x.leaning()
    lean = lean.mean(axis=tuple(p for p in range(lean.ndim) if p not in positions), keepdims=True)
    profile = levels.normalised(lean)
    table = np.broadcast_to(averaged(x.table, positions, reduced), x.table.shape) * float((lean**2).mean() / lean.mean() ** 2)
    return gaussian(x.dims, 0.0, levels.uneven(table, profile), profile)


def _left_overlap(overlap: Overlap, before: float, after: float) -> Overlap:
    """What covariances stray by is what it was, over a second moment that is smaller."""
    return overlap.times((before / after) ** 2) if after > 0.0 else NONE


def _evened_pairs(x: Value, profile: Array | None, table: Array) -> tuple[Array, Gram | None]:
    """Table and Gram matrix after each position along one axis was divided by its own level, not by the average of all."""
    ratio = np.asarray((1.0 if profile is None else profile) / (1.0 if x.levels is None else np.maximum(x.levels, 1e-150)))
    varying = [position for position, size in enumerate(ratio.shape) if size > 1]
    if x.gram is None or len(varying) != 1 or x.axes[varying[0]] is not x.gram.axis:
        return table, x.gram
    gram, table = rescaled(x, varying[0], ratio.ravel(), table)
    return table, gram


def _evened_overlap(x: Value, table: Array) -> Overlap:
    """How cosines stray once each position has one level: by what two do not have in common, which loud ones had most of."""
    if x.gram is None or x.gram.axis not in x.axes or x.overlap.variance == 0.0:
        return x.overlap.held()
    index = tuple(0 if axis is x.gram.axis else 1 for axis in x.axes)
    before, after = (max(1.0 - float(each[index] / each[(1,) * each.ndim]), 0.0) for each in (x.table, table))
    return x.overlap.held().times(min(after / before, 1.0) ** 2) if before > 0.0 else x.overlap.held()


def _normalised_levels(x: Value, reduced: Sequence[int], removed: float, eps: float) -> tuple[Array | None, float]:
    """Levels of ``x - mean(x)``: of ``E[x_i^2] - 2 E[x_i mean(x)] + E[mean(x)^2]``, relative to their average over some axes.

    And the share of the second moment that is left, where some of these averages are nothing (of padding) or next to epsilon.
    """
    if x.levels is None:
        return None, 1.0
    along = tuple(reduced)
    lean = x.leaning()
    own = (x.levels**2).mean(axis=along, keepdims=True)
    squares = x.levels**2 / np.maximum(own, 1e-300) * x.second_moment
    lean = lean / np.maximum(lean.mean(axis=along, keepdims=True), 1e-300)
    left = np.maximum(squares + removed * (1.0 - 2.0 * lean), 0.0)
    loud = own * x.second_moment
    kept = loud / np.maximum(loud + eps, 1e-300) * (1.0 + eps / max(x.second_moment, 1e-300))
    kept = np.where(np.abs(kept - 1.0) < 0.01, 1.0, kept)
    return levels.normalised(np.sqrt(left * kept / np.maximum(left.mean(axis=along, keepdims=True), 1e-300))), float(kept.mean())


def _normalised_marginal(x: Value, mean: float, std: float, profile: Array | None, latent: object) -> Marginal:
    """The shape of an entry of average level, at the levels that are left."""
    if x.levels is None:
        return Marginal(latent, lambda: standardised(x.marginal.values, mean, std))

    def even() -> Array:
        return standardised(x.marginal.even, mean, std)

    if profile is not None and x.marginal.is_gaussian:
        return Marginal(latent, lambda: standardised(levels.normal_mixture(profile), mean, std), even)
    return Marginal(latent, even if profile is None else lambda: standardised(x.marginal.values, mean, std), even)
