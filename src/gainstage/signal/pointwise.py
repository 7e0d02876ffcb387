"""Pointwise functions: of one Gaussian latent exactly, of several by what they share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.axes import Axis, Dim, distinct
from gainstage.signal.between import through as through_function
from gainstage.signal.copies import once, replace
from gainstage.signal.directions import divided
from gainstage.signal.few import with_shapes
from gainstage.signal.joining import join
from gainstage.signal.known import few_along_one, known, numbers_along
from gainstage.signal.linear import add, affine, modulate, multiply
from gainstage.signal.loudness import over_loudness
from gainstage.signal.marginal import Marginal
from gainstage.signal.movement import expand, parts_along, refine, reshape, with_axes
from gainstage.signal.neighbours import Neighbours, through
from gainstage.signal.overlap import NONE, Overlap
from gainstage.signal.own_levels import by_own_level
from gainstage.signal.pairing import amplitude_of
from gainstage.signal.places import over_places
from gainstage.signal.quadrature import (
    Array,
    evaluate_series,
    expectation,
    few_scales,
    invert_series,
    nodes,
    power_series,
    standardised,
    tied_correlation,
)
from gainstage.signal.quotient import quotient
from gainstage.signal.ripples import with_ripples
from gainstage.signal.samples import over_lots
from gainstage.signal.slicing import part_by_part
from gainstage.signal.spread import held
from gainstage.signal.stray import Stray, passed
from gainstage.signal.traits import statistic_at
from gainstage.signal.two import of_two
from gainstage.signal.uneven import with_means
from gainstage.signal.value import Value

LEAST_STRAY = 1e-3  # variance of the log of a level below which all draws are alike


Function = Callable[..., torch.Tensor]

# Of the log level between draws. Beyond that the law that gave it is none, and a few points do not hold its mean.
_MOST_STRAY = 1.0


def call_on(function: Function, *grids: Array) -> Array:
    """Evaluate a tensor function on values in float64."""
    with torch.no_grad():
        result = function(*(torch.from_numpy(np.ascontiguousarray(grid)) for grid in grids))
    return np.asarray(result.to(torch.float64).numpy())


def _within_domain(values: Array) -> Array:
    """Values on the grid, the nearest finite one where the function is not defined: far in the tail of a Gaussian stand-in."""
    finite = np.isfinite(values)
    if finite.all():
        return values
    if values.ndim > 1:
        return np.array([_within_domain(row) for row in values])
    return np.asarray(np.interp(nodes(), nodes()[finite], values[finite])) if finite.any() else values


def on_latent(x: Value, values: Array, **changes: object) -> Value:
    """Return the value whose marginal on x's latent is given, with ``sum_n a_n^2 rho^n`` for its table (Mehler)."""
    return _with_neighbours(x, _alike(x, values, **changes))


def _alike(x: Value, values: Array, **changes: object) -> Value:
    """All entries of one distribution."""
    rho, series = x.correlation(), power_series(values)
    gram, table = through_function(x, series, evaluate_series(series, rho))
    made = Value(
        dims=x.dims,
        mean=expectation(values),
        table=table,
        marginal=Marginal(x.marginal.latent, lambda: values),
        rho=rho,
        source=object(),
        lineage=x.lineage,
        stray=x.stray.hidden(),
        overlap=_overlap_after(x, series, rho),
        is_weight=x.is_weight,
        edges=x.edges,
        prior=x.prior,
        gram=gram,
    )
    return replace(made, **changes) if changes else made


def _overlap_after(x: Value, series: Array, rho: Array) -> Overlap:
    """A cosine that strays is passed on by the slope of the map of cosines, at the largest there is between two places."""
    apart = rho.ravel()[:-1]
    before, after = x.marginal.series, series
    if x.overlap.variance == 0.0 or not apart.size or float(before.sum()) <= 0.0 or float(after.sum()) <= 0.0:
        return NONE
    at = float(np.clip(apart.max(), 0.0, 1.0))
    slopes = [float(np.polynomial.polynomial.polyval(at, c[1:] * np.arange(1, len(c)))) / float(c.sum()) for c in (before, after)]
    return x.overlap.times((slopes[1] / slopes[0]) ** 2) if slopes[0] > 0.0 else NONE


def _with_neighbours(x: Value, made: Value) -> Value:
    """Carry what near places share through a function of x: into the table what it makes of them beyond that of their average."""
    near = x.neighbours()
    if near is None:
        return made
    own, far = x.apart(near)

    def function(moments: Array) -> Array:
        rho = invert_series(x.marginal.even_series, moments - x.marginal.even_series[0])
        return evaluate_series(made.marginal.even_series, np.where(moments >= own, 1.0, rho))

    after, distant = through(near, own, far, function, _tied(near, x, made))
    if after is None:
        return made
    table = made.table.copy()
    for same in itertools.product((0, 1), repeat=len(near.axes)):
        if not all(same):
            equal = [bool(one) for one in same]
            alike = float(function(np.array([far + (own - far) * near.average(equal)]))[0])
            index = [1] * table.ndim
            for axis, one in zip(near.axes, same, strict=True):
                index[made.axes.index(axis)] = one
            table[tuple(index)] += distant + (made.second_moment - distant) * after.average(equal) - alike
    return replace(made, near=after, table=table)


def _tied(near: Neighbours, x: Value, made: Value) -> tuple[Array, Array] | None:
    """Correlations of windows' maxima that come of places in both, before and after a function of them."""
    if near.ties is None:
        return None
    share = near.ties[tuple(slice(0, n) for n in near.excess.shape)]
    return tied_correlation(x.marginal.even, share), tied_correlation(made.marginal.even, share)


def _on_levels(x: Value, values: Array, function: Callable[[Array], Array]) -> Value:
    """f(x) where levels differ: levels of f(x), and its distribution at the average level."""
    assert x.levels is not None
    profile = levels.mapped(x.levels, x.marginal.even, function)
    if not x.marginal.has_even:
        return _with_neighbours(x, _alike(x, values, levels=profile))
    second, alike = expectation(values**2), _within_domain(function(x.marginal.even))
    own = expectation(alike**2)
    even = alike * (second / own) ** 0.5 if own > 0.0 else alike
    marginal = Marginal(x.marginal.latent, lambda: values, lambda: even)
    return _with_neighbours(x, _alike(x, values, marginal=marginal, levels=profile))


def apply(function: Function, x: Value) -> Value:
    """``f(x)`` for any function of one tensor, entry by entry; of several functions of one tensor side by side, of each."""
    parts = parts_along(x)
    if parts is not None:
        return join([once(part, function, partial(apply, function, part)) for part in parts[1]], parts[0])

    def on_grid(grid: Array) -> Array:
        return call_on(function, grid)

    values = _within_domain(on_grid(x.marginal.values))
    result = on_latent(x, values) if x.levels is None else _on_levels(x, values, on_grid)
    result = replace(result, stray=passed(x, values))
    alike = result.marginal
    for differing in (with_means, with_shapes, with_ripples, over_draws, over_places, over_loudness, over_lots):
        result = differing(x, result, lambda grid: _within_domain(on_grid(grid)))
    result = result if result.marginal is alike else _held_to_sign(result, values)
    statistic = None
    if x.statistic is not None:
        statistic, profile = statistic_at(x.statistic.of, on_grid(x.centres()), result.levels, x.statistic.averaged)
        result = replace(result, levels=profile)
    constant = None if x.constant is None else function(x.constant.to(torch.float64))
    return replace(result, statistic=statistic, constant=constant)


def _held_to_sign(result: Value, values: Array) -> Value:
    """With a distribution that is as far from 0 as the values of the function are, where they are all on one side of it.

    A distribution that was brought to moments may reach beyond, where what comes next (a logarithm, a root) is not defined. Zeros
    of a ReLU are left as they are: its slope is told by them.
    """
    low, high = float(values.min()), float(values.max())
    if low <= 0.0 <= high:
        return result
    marginal, limits = result.marginal, (low, None) if low > 0.0 else (None, high)
    even = (lambda: np.clip(marginal.even, *limits)) if marginal.has_even else None
    return replace(result, marginal=Marginal(marginal.latent, lambda: np.clip(marginal.values, *limits), even))


def over_draws(x: Value, result: Value, function: Callable[[Array], Array]) -> Value:
    """Average over draws of x times a log-normal level, of what two entries of f(x) share: f is not linear in it.

    What all entries of a draw have in common, ``E[E[f | level]^2]``, is more than the square of the mean over draws.
    """
    stray = min(x.log_variance, _MOST_STRAY)
    if stray < LEAST_STRAY or x.levels is not None or x.statistic is not None:
        return result
    scales, mass = few_scales(stray)
    each = function(scales[:, None] * x.marginal.values)
    series = sum(share * power_series(values) for share, values in zip(mass, each, strict=True))
    added = evaluate_series(np.asarray(series - power_series(result.marginal.values)), x.correlation())
    if float(np.abs(added).max()) <= 1e-9 * result.second_moment:  # x, ReLU and all that scales with its argument
        return result
    table, mean = result.table + added, float(mass @ np.array([expectation(values) for values in each]))
    std = max(float(table[(1,) * table.ndim]) - mean**2, 0.0) ** 0.5
    marginal = Marginal(result.marginal.latent, lambda: standardised(result.marginal.values, mean, std))
    return replace(result, table=table, mean=mean, marginal=marginal)


def align(x: Value, y: Value) -> tuple[Value, Value]:
    """Broadcast two values against each other, with matching axes.

    Where one tensor, or two of the same places, meet in rows and columns (``x[:, None] - x[None]``), entries are of other places
    but on the diagonal: the second then has crossed axes.
    """
    rank = max(len(x.dims), len(y.dims))
    shape_x = (1,) * (rank - len(x.dims)) + x.shape
    shape_y = (1,) * (rank - len(y.dims)) + y.shape
    shape = [b if a == 1 else a for a, b in zip(shape_x, shape_y, strict=True)]
    broadcast_x = [a == 1 and n != 1 for a, n in zip(shape_x, shape, strict=True)]
    broadcast_y = [b == 1 and n != 1 for b, n in zip(shape_y, shape, strict=True)]
    x, y = expand(x, shape), expand(y, shape)
    for d in range(rank):
        x, y = refine(x, y, d, d)
    crossing = _own(x, broadcast_x) & _own(y, broadcast_y)
    dims_x, dims_y = distinct(_adopt(x, y, broadcast_x)), distinct(_adopt(y, x, broadcast_y))
    for d in range(rank):
        if (broadcast_x[d] or broadcast_y[d]) and crossing & {*x.dims[d], *y.dims[d]}:
            dims_y = tuple(tuple(axis.crossed() for axis in dim) if place == d else dim for place, dim in enumerate(dims_y))
    return with_axes(x, dims_x), with_axes(y, dims_y)


def _own(x: Value, broadcast: Sequence[bool]) -> set[Axis]:
    """Axes along which a tensor is not broadcast."""
    return {axis for dim, missing in zip(x.dims, broadcast, strict=True) if not missing for axis in dim}


def _adopt(x: Value, y: Value, broadcast: Sequence[bool]) -> tuple[Dim, ...]:
    """Along a broadcast dimension a tensor has the other's coordinates."""
    return tuple(y.dims[d] if missing else x.dims[d] for d, missing in enumerate(broadcast))


def _is_statistic_of(y: Value, x: Value) -> bool:
    return y.statistic is not None and not x.names.isdisjoint(y.statistic.of)


def _shares_latent(x: Value, y: Value) -> bool:
    return x.marginal.latent == y.marginal.latent and all(a is b for a, b in zip(x.axes, y.axes, strict=True))


def combine(function: Function, x: Value, y: Value) -> Value:
    """``f(x, y)`` entry by entry, for addition, subtraction, multiplication, division and the rest.

    Two functions of the same latent are one function of it. A tensor met by a statistic of itself (its mean square, its
    maximum) meets a number. What else is not independent shares a source, see :func:`cross_table`.
    """
    x, y = _as_numbers(x), _as_numbers(y)
    parts = part_by_part(x, y)
    if parts is not None:
        return join([combine(function, a, b) for a, b in parts[1]], parts[0])
    row = _row_of_numbers(function, x, y)
    if row is not None:
        return row
    numbers = (x.constant, y.constant)
    x, y = align(x, y)
    if _shares_latent(x, y):
        values = call_on(function, x.marginal.values, y.marginal.values)
        result = on_latent(x, values, stray=passed(x, values))
        if x.source is not None and x.source is y.source and function in (torch.add, torch.sub):
            sign = 1.0 if function is torch.add else -1.0
            result = replace(result, source=x.source, amplitude=amplitude_of(x) + sign * amplitude_of(y))
        profile = levels.product(x.levels, y.levels) if function is torch.mul else x.levels
        return _as_statistic(function, x, y, replace(result, lineage=x.lineage | y.lineage, levels=profile))
    if function in (torch.mul, torch.div) and _is_statistic_of(y, x):
        assert y.statistic is not None
        centres = y.centres() if function is torch.mul else 1.0 / y.centres()
        number, profile = statistic_at(y.statistic.of, centres, None)
        scaled = replace(modulate(x, profile, number.centre), lineage=x.lineage | y.lineage)
        scaled = by_own_level(scaled, x, y, inverse=function is torch.div)
        return _as_direction(scaled, y)
    if function is torch.mul and _is_statistic_of(x, y):
        return combine(function, y, x)
    for first, known_numbers in ((x, numbers[1]), (y, numbers[0])):
        along = numbers_along(known_numbers, first)
        if along is not None and (function is torch.mul or (function is torch.div and first is x)):
            statistic, profile = statistic_at(frozenset(), along if function is torch.mul else 1.0 / along, None)
            return replace(modulate(first, profile, statistic.centre), lineage=x.lineage | y.lineage, constant=None)
    if function is torch.add or function is torch.sub:
        result = add(x, y, 1.0 if function is torch.add else -1.0)
    elif function is torch.mul:
        result = multiply(x, y)
    elif function is torch.div:
        result = quotient(x, y) or multiply(x, _reciprocal(y))
    else:
        result = of_two(lambda u, v: call_on(function, u, v), x, y)
    return _as_statistic(function, x, y, result)


def of_one_latent(x: Value, y: Value) -> bool:
    """Whether two tensors of one shape are functions of one latent, entry by entry; of numbers, no."""
    is_number = any(v.statistic is not None or v.constant is not None for v in (x, y))
    return not is_number and x.shape == y.shape and _shares_latent(x, y)


def _row_of_numbers(function: Function, x: Value, y: Value) -> Value | None:
    """A tensor spread over a few known numbers, such as centres or frequencies: a function of it for each, side by side.

    Where all of these are taken to be of one distribution, ``f(x - c)`` of a normal x is one of a mixture that is none.
    """
    for first, second in ((x, y), (y, x)):
        if second.constant is None or first.constant is not None or first.statistic is not None or first.is_weight:
            continue
        rank = max(len(x.dims), len(y.dims))
        shape, spread = ((1,) * (rank - len(v.dims)) + v.shape for v in (first, second))
        numbers = few_along_one(second.constant.reshape(spread), shape)
        if numbers is None:
            continue
        varying = next(d for d, size in enumerate(numbers.shape) if size > 1)
        whole = [1 if d == varying else max(sizes) for d, sizes in enumerate(zip(shape, spread, strict=True))]
        wide = replace(expand(reshape(first, shape), whole), uneven=None)  # which is followed through one function, not a chain
        return join([_with_number(function, wide, float(n), is_first=first is x) for n in numbers.reshape(-1)], varying)
    return None


def _with_number(function: Function, x: Value, number: float, *, is_first: bool) -> Value:
    """``f(x, number)`` or ``f(number, x)``."""
    if function is torch.add or (function is torch.sub and is_first):
        return affine(x, 1.0, number if function is torch.add else -number)
    if function is torch.sub:
        return affine(x, -1.0, number)
    if function is torch.mul or (function is torch.div and is_first):
        return affine(x, number if function is torch.mul else 1.0 / number)
    constant = torch.tensor(number, dtype=torch.float64)
    return apply((lambda t: function(t, constant)) if is_first else (lambda t: function(constant, t)), x)


def _as_direction(scaled: Value, statistic: Value) -> Value:
    """A tensor over a statistic of itself; where that is the norm of each of its vectors, what strays is taken back."""
    reduced = [p for p in range(statistic.table.ndim) if np.ptp(statistic.table, axis=p).max() <= 1e-9 * statistic.second_moment]
    length = scaled.second_moment * math.prod(scaled.axes[p].size for p in reduced)
    is_level, is_unit = (abs(square - 1.0) < 0.05 for square in (scaled.second_moment, length))
    if is_level or is_unit:
        scaled = divided(scaled, reduced)
    return held(scaled) if is_level else replace(scaled, stray=Stray())


def _as_numbers(x: Value) -> Value:
    """Known integers and masks, which are carried without statistics as long as they index, as the numbers that they are."""
    return x if x.constant is None or x.constant.is_floating_point() else known(x.constant)


def _reciprocal(y: Value) -> Value:
    """``1 / y``; a denominator that hardly fluctuates is taken at its mean."""
    if y.statistic is not None and y.variance < 0.05 * y.second_moment:
        return replace(affine(y, 0.0, 1.0 / y.statistic.centre), statistic=None, amplitude=None, source=object())
    return apply(torch.reciprocal, y)


def _as_statistic(function: Function, x: Value, y: Value, result: Value) -> Value:
    """Mark a function of statistics and numbers as a statistic."""

    def centres(v: Value) -> Array | None:
        if v.statistic is not None:
            return v.centres()
        return np.full((1,) * v.table.ndim, v.mean) if v.variance <= 1e-12 * v.second_moment else None

    a, b = centres(x), centres(y)
    if a is None or b is None or (x.statistic is None and y.statistic is None):
        return replace(result, statistic=None)
    of = (x.statistic.of if x.statistic else frozenset()) | (y.statistic.of if y.statistic else frozenset())
    a, b = np.broadcast_arrays(a, b)
    statistic, profile = statistic_at(of, call_on(function, a, b), result.levels)
    return replace(result, statistic=statistic, levels=profile)
