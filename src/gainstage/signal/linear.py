"""Linear maps of the table: averages, sums, products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gainstage.signal import levels, shares
from gainstage.signal.agreement import agreement
from gainstage.signal.alike import averaged
from gainstage.signal.axes import Axis
from gainstage.signal.between import loud_together, of_factors, of_terms, shared
from gainstage.signal.copies import replace
from gainstage.signal.filtered import meeting, times
from gainstage.signal.gram import modulated
from gainstage.signal.marginal import Marginal, gaussian_marginal
from gainstage.signal.neighbours import Neighbours, made, mixed
from gainstage.signal.overlap import mixed as summed_overlap
from gainstage.signal.pairing import amplitude_of, cross_table, summed
from gainstage.signal.quadrature import (
    Array,
    coarse,
    expectation,
    gamma_quantiles,
    nodes,
    quantiles,
    smoothed,
    standardised,
    sum_quantiles,
    weights,
)
from gainstage.signal.spread import after_shift, product_overlap, product_stray
from gainstage.signal.stray import Stray
from gainstage.signal.stray import averaged as averaged_stray
from gainstage.signal.stray import summed as summed_stray
from gainstage.signal.traits import Lean, Statistic, Sum, statistic_at
from gainstage.signal.uneven import of_product, of_sum
from gainstage.signal.value import Value, gaussian

LEAST_CENTRE = 0.25  # share of the mean's square in the second moment from which an average counts as a number
APART = 0.1  # in the share of one of two levels that add up: sums between which others are interpolated
_ROUGHLY = 0.05  # of an entry's root mean square: as far a distribution fitted to its moments may reach below zero


def affine(x: Value, scale: float, shift: float = 0.0) -> Value:
    """``scale x + shift``."""
    mean = scale * x.mean + shift
    table = scale**2 * x.covariance + mean**2
    marginal = x.marginal.affine(scale, shift)
    statistic, profile = None, None if shift else x.levels
    if x.statistic is not None:
        statistic, profile = statistic_at(x.statistic.of, scale * x.centres() + shift, profile, x.statistic.averaged)
    constant = None if x.constant is None else x.constant * scale + shift
    amplitude = scale * amplitude_of(x)
    result = replace(
        x, mean=mean, table=table, marginal=marginal, rho=x.correlation(), statistic=statistic, constant=constant,
        amplitude=amplitude, levels=profile, filtered=None if shift else times(x, scale, table),
        given=None if x.given is None else x.given.times(scale),
    )  # fmt: skip
    result = after_shift(result, x) if shift else result
    if x.added is not None and x.added.table is x.table:
        of, known = affine(x.added.of, scale, shift), x.added.known * scale
        result = replace(result, added=replace(x.added, table=table, of=of, known=known))
    if x.joined is None or x.joined.table is not x.table:
        return result
    parts = tuple(affine(part, scale, shift) for part in x.joined.parts)
    return replace(result, joined=replace(x.joined, table=result.table, parts=parts))


def mean_over(x: Value, axes: Sequence[Axis]) -> Value:
    """Average over some axes; they go from the dimensions (a dimension left without axes has size 1)."""
    gone = [axis for axis in x.axes if axis in axes]
    if not gone:
        return x
    positions = [x.axes.index(axis) for axis in gone]
    table = averaged(x.table, positions, gone)
    index = tuple(0 if axis in gone else slice(None) for axis in x.axes)
    dims = tuple(tuple(axis for axis in dim if axis not in gone) for dim in x.dims)
    count = int(np.prod([axis.size for axis in gone]))
    latents = frozenset([x.marginal.latent]) | (x.statistic.of if x.statistic else frozenset())
    profile = levels.averaged(x.levels, positions)
    centre = x.mean / (1.0 if profile is None else float(profile.mean()))
    if x.statistic is not None:
        statistic, profile = statistic_at(latents, x.centres().mean(axis=tuple(positions)), profile)
        centre = statistic.centre + _curvature_left(x, float(table[index][(1,) * table[index].ndim]))
    stray = averaged_stray(x, lambda pairs: float(averaged(pairs, positions, gone)[(-1,) * pairs.ndim]))
    result = gaussian(dims, x.mean, table[index], profile, lineage=x.lineage, stray=stray, is_weight=x.is_weight)
    shape = _average_marginal(x, result, count) if count < 8 else _common_marginal(x, result, gone)
    if shape is not None:
        result = replace(result, marginal=shape, rho=None)
    if profile is None:
        result = replace(result, marginal=_of_its_sign(x, result, gone))
    is_number = result.mean**2 >= LEAST_CENTRE * result.second_moment
    averaged_of = (x.marginal, result.marginal) if x.statistic is None else None
    number = Statistic(latents, centre, averaged_of) if is_number else None
    gram = None if x.gram is None or x.gram.axis in gone else x.gram
    return replace(result, statistic=number, source=x.source, amplitude=amplitude_of(x)[index], gram=gram)


def _curvature_left(x: Value, second: float) -> float:
    """What an average of functions of fluctuating averages has beyond the function of their mean: of what is averaged out."""
    assert x.statistic is not None
    if x.variance <= 0.0:
        return 0.0
    profile = 1.0 if x.levels is None else float(x.levels.mean())
    left = min(max((second - x.mean**2) / x.variance, 0.0), 1.0)
    return (1.0 - left) * (x.mean / profile - x.statistic.centre)


def _of_its_sign(x: Value, result: Value, gone: Sequence[Axis]) -> Marginal:
    """An average of what is never negative is not, either: where its distribution would be, ``E[g | z] e``.

    What entries have in common, times a gamma variable of mean 1, the law of a sum of squares (Satterthwaite 1946, eq. 3).
    """

    def values() -> Array:
        own, sign = result.marginal.values, math.copysign(1.0, result.mean)
        if float((sign * own).min()) >= 0.0 or float((sign * x.marginal.values).min()) < -_ROUGHLY * x.second_moment**0.5:
            return own
        r = float(x.correlation()[tuple(0 if axis in gone else 1 for axis in x.axes)])
        common = np.maximum(sign * (smoothed(x.marginal.values, min(r, 1.0)) if r > 0.0 else np.full_like(own, x.mean)), 0.0)
        rest = result.second_moment / expectation(common**2) - 1.0
        if rest <= 0.0:
            return own
        points, mass = coarse()
        u, e = np.interp(points, nodes(), common), np.interp(points, nodes(), gamma_quantiles(1.0, rest**0.5))
        grid = quantiles(u[:, None] * e[None, :], mass[:, None] * mass[None, :])
        grid = grid * (abs(result.mean) / expectation(grid))
        return grid if sign > 0.0 else -grid[::-1]

    return Marginal(result.marginal.latent, values)


def _common_marginal(x: Value, result: Value, gone: Sequence[Axis]) -> Marginal | None:
    """``E[g(sqrt(r) z + sqrt(1 - r) e) | z]``: what many entries g, of latents that correlate by r, have in common.

    The rest averages to a Gaussian; nothing where that rest prevails.
    """
    r = float(x.correlation()[tuple(0 if axis in gone else 1 for axis in x.axes)])
    if r <= 0.0 or x.marginal.is_gaussian or result.variance <= 0.0:
        return None
    common = smoothed(x.marginal.values, min(r, 1.0))
    share = min((expectation(common**2) - expectation(common) ** 2) / result.variance, 1.0)
    if share < 0.1:
        return None
    std = result.variance**0.5

    def values() -> Array:
        return standardised(share * standardised(common, 0.0, 1.0) + (1.0 - share) * nodes(), result.mean, std)

    return Marginal(object(), values)


def _average_marginal(x: Value, result: Value, count: int) -> Marginal:
    """Few terms do not make a Gaussian: keep the entry's own shape, at the variance of the average."""

    def values() -> Array:
        if x.variance <= 0.0:
            return x.marginal.values
        ratio = (result.variance / x.variance) ** 0.5
        share = 1.0 / count
        normal = result.mean + result.variance**0.5 * nodes()
        own = result.mean + ratio * (x.marginal.values - x.mean)
        return np.asarray(share * own + (1.0 - share) * normal) if np.all(np.diff(own) >= 0) else normal

    return Marginal(object(), values)


def add(x: Value, y: Value, sign: float = 1.0) -> Value:
    """``x + sign y`` of aligned values on different latents."""
    for number, other, (own, its) in ((y, x, (1.0, sign)), (x, y, (sign, 1.0))):
        is_known = number.constant is not None and other.constant is not None  # of both the sum is known entry by entry
        if number.variance <= 0.0 and number.prior is None and not is_known and not other.is_weight:
            shifted = affine(other, own, its * number.mean) if number.mean or own != 1.0 else other
            return replace(shifted, lineage=x.lineage | y.lineage, constant=None)
    cross, met = cross_table(x, y), meeting(x, y, sign)
    table = np.array(x.table + y.table + 2.0 * sign * cross) if met is None else met.table.copy()
    mean = x.mean + sign * y.mean
    table[(1,) * table.ndim] = max(float(table[(1,) * table.ndim]), mean**2)
    variance = float(table[(1,) * table.ndim]) - mean**2
    # Where x and y cancel, what is left of two entries carries the errors of both: no pair shares more than an entry has.
    table = mean**2 + np.clip(table - mean**2, -variance, variance)
    share = 0.0 if variance <= 0.0 else min(max(x.variance / variance, 0.0), 1.0)
    terms = [(x.levels, x.second_moment), (y.levels, y.second_moment)]
    profile = levels.of_sum(terms, table.ndim) if met is None else met.levels
    result = Value(
        dims=x.dims,
        mean=mean,
        table=table,
        marginal=_sum_marginal(x, y, sign, (mean, max(variance, 0.0) ** 0.5), profile),
        lineage=x.lineage | y.lineage,
        read=x.read | y.read,
        stray=_level_of_sum(x, y, sign * float(cross[(1,) * cross.ndim]), float(table[(1,) * table.ndim])),
        overlap=summed_overlap([(x.overlap, share**2), (y.overlap.renamed(y.axes, x.axes), (1.0 - share) ** 2)]),
        is_weight=x.is_weight and y.is_weight,
        uneven=of_sum(x, y, share),
        steady=shares.added(x.axes, y.axes, shares.times(x.steady, share**2), shares.times(y.steady, (1.0 - share) ** 2)),
        levels=profile,
        prior=y.prior if x.prior is None else x.prior if y.prior is None else x.prior + y.prior,
    )
    if x.origin is not None or y.origin is not None:
        result = replace(result, sum=Sum(table, ((x, 1.0), (y, sign))))
    if x.near is not None or y.near is not None:
        result = replace(result, near=mixed([(x.neighbours(), x.variance), (_on_axes(y, x), y.variance)], x.axes))
    if any(part is not None for part in (x.gram, y.gram, x.joined, y.joined, profile)):
        result = replace(result, gram=of_terms([(x, 1.0), (y, 1.0)]))
    if profile is not None and met is None and not (x.lean is None and y.lean is None):
        result = replace(result, lean=_summed_lean(x, y, profile))
    same_axes = all(a is b for a, b in zip(x.axes, y.axes, strict=True))
    if x.source is not None and x.source is y.source and same_axes:
        result = replace(result, source=x.source, amplitude=amplitude_of(x) + sign * amplitude_of(y))
        return result if met is None else replace(result, near=met.near, lean=met.lean, filtered=replace(met.maps, table=table))
    return summed(result, (x, 1.0), (y, sign))


def _level_of_sum(x: Value, y: Value, cross: float, level: float) -> Stray:
    """The level of a sum is made of ``E[x (x + y)]`` and ``E[y (x + y)]``."""
    if level <= 0.0:
        return Stray()
    return summed_stray([(v, min(max((v.second_moment + cross) / level, 0.0), 1.0)) for v in (x, y)])


def _renamed(near: Neighbours | None, y: Value, x: Value) -> Neighbours | None:
    return None if near is None else near.renamed(y.axes, x.axes)


def _on_axes(y: Value, x: Value) -> Neighbours | None:
    return _renamed(y.neighbours(), y, x)


def _summed_lean(x: Value, y: Value, profile: Array) -> Lean:
    apart = tuple(0 if size > 1 else 1 for size in profile.shape)
    common = [max(float(v.table[apart]), 0.0) for v in (x, y)]
    share = 0.5 if sum(common) <= 0.0 else common[0] / sum(common)
    inner = mixed([(x.near_without_common(), x.variance), (_renamed(y.near_without_common(), y, x), y.variance)], x.axes)
    return Lean(profile, share * x.leaning() + (1.0 - share) * y.leaning(), inner)


def _sum_marginal(x: Value, y: Value, sign: float, moments: tuple[float, float], profile: Array | None) -> Marginal:
    mean, std = moments
    if x.marginal.is_gaussian and y.marginal.is_gaussian:
        return gaussian_marginal(mean, std, profile)
    if x.variance <= 0.0 or y.variance <= 0.0:
        base, flip = (x, 1.0) if x.variance >= y.variance else (y, sign)
        ratio = flip * std / base.variance**0.5 if base.variance > 0.0 else 0.0
        return Marginal(
            object(),
            lambda: mean + ratio * (base.marginal.values - base.mean),
            lambda: mean + ratio * (base.marginal.even - base.mean),
        )

    def values() -> Array:
        return standardised(sum_quantiles(x.marginal.values, sign * y.marginal.values), mean, std)

    if x.levels is None or y.levels is None:
        return Marginal(object(), values)
    first, second = x.levels, y.levels

    def even() -> Array:
        return standardised(sum_quantiles(x.marginal.even, sign * y.marginal.even), mean, std)

    def at_levels() -> Array:
        """``a x + b y = (a + b) ((1 - f) x + f y)`` at each pair of levels, between a few f by interpolation."""
        (a, b), shares = levels.groups(first, second)
        part = b / np.maximum(a + b, 1e-300)
        parts = np.linspace(part.min(), part.max(), 2 + int(np.ptp(part) / APART))
        each = np.array([sum_quantiles((1.0 - f) * x.marginal.even, sign * f * y.marginal.even) for f in parts])
        place = (part - parts[0]) / max(float(parts[1] - parts[0]), 1e-12)
        below = np.minimum(place.astype(int), len(parts) - 2)
        beyond = (place - below)[:, None]
        made = (a + b)[:, None] * ((1.0 - beyond) * each[below] + beyond * each[below + 1])
        return standardised(quantiles(made, shares[:, None] * weights()), mean, std)

    return Marginal(object(), at_levels, even)


def multiply(x: Value, y: Value) -> Value:
    """``x y`` of aligned values on different latents, jointly Gaussian where they share a source (Isserlis).

    Of independent ones ``x y = E[x] y + E[y] x + ...``: a gate passes in part the tensor itself, which a residual meets.
    """
    if x.variance <= 1e-14 * x.second_moment and y.variance > 1e-14 * y.second_moment:
        return multiply(y, x)
    cross = cross_table(x, y)
    shared = cross - x.mean * y.mean
    full = (1,) * shared.ndim
    table = x.table * y.table + 2 * x.mean * y.mean * shared + shared**2
    mean = x.mean * y.mean + float(shared[full])
    if float(shared[full]) != 0.0:
        table = table + float(shared[full]) * (float(shared[full]) + 2 * x.mean * y.mean)
    if y.variance <= 1e-14 * y.second_moment:
        marginal = x.marginal.affine(y.mean)
        scaled = amplitude_of(x) * y.mean
        return replace(
            x, mean=mean, table=table, marginal=marginal, rho=x.correlation(), amplitude=scaled,
            lineage=x.lineage | y.lineage, constant=None, statistic=x.statistic,
            is_weight=x.is_weight and y.is_weight, stray=summed_stray([(x, 1.0), (y, 1.0)]),
            levels=levels.product(x.levels, y.levels),
            filtered=times(x, y.mean, table),
        )  # fmt: skip
    if float(shared[full]) == 0.0 and x.levels is not None and y.levels is not None:
        table = table * loud_together(x, y, [(p, p) for p in range(table.ndim)])
    if float(shared[full]) == 0.0:
        table = table + _agreeing(x, y)
    product = Value(
        dims=x.dims,
        mean=mean,
        table=table,
        marginal=_product_marginal(x, y, mean, max(float(table[full]) - mean**2, 0.0) ** 0.5),
        source=object(),
        lineage=x.lineage | y.lineage,
        read=x.read | y.read,
        stray=summed_stray([(x, 1.0), (y, 1.0)]),
        is_weight=(x.is_weight or y.is_weight) and all(v.is_weight or v.constant is not None for v in (x, y)),
        prior=x.prior,
        levels=levels.product(x.levels, y.levels),
        uneven=of_product(x, y),
        overlap=product_overlap(x, y),
    )
    if float(shared[full]) != 0.0:
        return product
    product = of_factors(x, y, product)
    if x.neighbours() is not None or _on_axes(y, x) is not None:
        product = _near_product(x, y, product)
    parts = [(affine(one, other.mean), 1.0) for one, other in ((x, y), (y, x)) if other.mean != 0.0]
    product = summed(product, *parts) if parts else product
    if product.is_weight:
        mask = x.constant if y.constant is None else y.constant
        return replace(product, levels=levels.product(levels.of_mask(mask, product.axes), product.levels))
    return replace(product, stray=product.stray.with_cause(product_stray(x, y, product)))


def _agreeing(x: Value, y: Value) -> Array:
    """What entries of the product at two places share beyond their tables, where both factors were made of one tensor."""
    added = np.zeros_like(x.table)
    apart = [p for p in range(added.ndim) if not _is_same_along(x, p) and not _is_same_along(y, p)]
    places, covariance = agreement(x, y, [(x.axes[p], y.axes[p]) for p in apart])
    if places and covariance != 0.0:
        added[tuple(slice(None) if axis in places else 1 for axis in x.axes)] = x.second_moment * y.second_moment * covariance
        added[(1,) * added.ndim] = 0.0
    return added


def _is_same_along(x: Value, position: int) -> bool:
    """Whether all entries along an axis are one and the same."""
    return bool(np.array_equal(*np.moveaxis(x.table, position, 0)))


def _product_marginal(x: Value, y: Value, mean: float, std: float) -> Marginal:
    """Every value of x times every value of y, at the mean and deviation that are known exactly."""

    def of(values_x: Array, values_y: Array) -> Array:
        points, mass = coarse()
        u, v = np.interp(points, nodes(), values_x), np.interp(points, nodes(), values_y)
        return standardised(quantiles(u[:, None] * v[None, :], mass[:, None] * mass[None, :]), mean, std)

    def even() -> Array:
        return of(x.marginal.even, y.marginal.even)

    has_even = x.marginal.has_even or y.marginal.has_even
    return Marginal(object(), lambda: of(x.marginal.values, y.marginal.values), even if has_even else None)


def _near_product(x: Value, y: Value, product: Value) -> Value:
    """Lag by lag the product of what the factors share; what that adds to the product of their averages in the table."""
    y = replace(y, dims=x.dims, near=_on_axes(y, x))
    present = [near for near in (x.neighbours(), y.neighbours()) if near is not None]
    axes = tuple(axis for axis in x.axes if any(axis in near.axes for near in present))
    shape = tuple(max(near.lags(axis) for near in present) for axis in axes)
    (of_x, far_x), (of_y, far_y) = x.lagged(axes, shape), y.lagged(axes, shape)
    products, distant = of_x * of_y, far_x * far_y
    profile = np.ones((1,) * len(x.axes)) if product.levels is None else product.levels
    factors = [levels.pair_factor(levels.over(profile, x.axes.index(axis), axis.size)) for axis in axes]
    table = product.table.copy()
    for same in np.ndindex(*(2,) * len(axes)):
        if not all(same):
            exact, mean_x, mean_y = (
                Neighbours(axes, lagged - far).average([bool(s) for s in same]) + far
                for lagged, far in ((products, distant), (of_x, far_x), (of_y, far_y))
            )
            index = [1] * table.ndim
            for axis, equal in zip(axes, same, strict=True):
                index[x.axes.index(axis)] = equal
            factor = math.prod(1.0 if equal else along for equal, along in zip(same, factors, strict=True))
            table[tuple(index)] += factor * (exact - mean_x * mean_y)
    own = float(products[(0,) * len(shape)])
    near = made(axes, (products - distant) / (own - distant)) if own > distant else None
    return replace(product, table=table, near=near)


def modulate(x: Value, profile: Array | None, scale: float) -> Value:
    """``scale profile_t x_t``: a tensor times known numbers along one axis (a norm's, row by row).

    Along more axes than one what two entries share is taken to be scaled alike.
    """
    scaled = affine(x, scale)
    if profile is None:
        return scaled
    after = levels.product(x.levels, profile)
    own = float(np.mean(np.square((1.0 if x.levels is None else x.levels) * profile)))
    table, gram = scaled.table * own, x.gram
    varying = [position for position, size in enumerate(profile.shape) if size > 1]
    if len(varying) == 1:
        position, axis = varying[0], x.axes[varying[0]]
        gram, apart = modulated(shared(x, position), levels.over(profile, position, axis.size), axis)
        np.moveaxis(table, position, 0)[0] *= apart / own
    mean = scaled.mean * (float(profile.mean()) if x.levels is None else float((x.levels * profile).mean() / x.levels.mean()))
    std = max(float(table[(1,) * table.ndim]) - mean**2, 0.0) ** 0.5
    latent, even = x.marginal.latent, lambda: standardised(scaled.marginal.even, mean, std)
    marginal = Marginal(latent, even, even)
    if after is not None:
        marginal = Marginal(latent, lambda: standardised(scaled.marginal.values, mean, std), even)
        if x.marginal.is_gaussian:
            marginal = Marginal(latent, lambda: mean + std * levels.normal_mixture(after), even)
    return replace(scaled, mean=mean, table=table, marginal=marginal, rho=None, levels=after, gram=gram)
