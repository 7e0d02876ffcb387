"""Sums of few terms keep something of the shape of a term: channels of a depthwise convolution are skewed, each its own way.

Given its weights, channel c of ``y = sum over n terms of w x`` has ``sum w^4 / (sum w^2)^2`` times the excess kurtosis of x, and
``sum w^3 / (sum w^2)^(3/2)`` times its skewness, of either sign. Over Gaussian weights and independent terms

    E[sum w^4 / (sum w^2)^2] = 3 / (n + 2),      E[(sum w^3)^2 / (sum w^2)^3] = 15 / ((n + 2)(n + 4)),

so that a channel is much like ``+- a u + sqrt(1 - a^2) z`` with u an entry of x at variance 1, z normal and
``a^6 = 15 / ((n + 2)(n + 4))``: the heaviest term, and the rest. Its excess kurtosis, ``a^4`` times that of x, is within 20 % of
the above for n up to 9, and less beyond. A norm removes a channel's mean and variance, not its shape; functions of it then have
another mean and level in each channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from gainstage.signal import levels
from gainstage.signal.copies import replace
from gainstage.signal.marginal import Marginal
from gainstage.signal.neighbours import pairs_by_lag
from gainstage.signal.quadrature import Array, expectation, nodes, quantiles, standardised, sum_quantiles, weights
from gainstage.signal.traits import Uneven
from gainstage.signal.value import Value

MOST = 64.0  # terms: beyond, a^3 < .06


def shape_of_sum(x: Value, terms: float) -> Array | None:
    """Quantiles of a channel with its heaviest term positive, at mean 0 and variance 1; None where it is Gaussian to the eye."""
    if terms > MOST or x.variance <= 0.0 or x.marginal.is_gaussian:
        return None
    one = x.marginal.even if x.uneven is None or x.uneven.shape is None else x.uneven.shape
    part = (15.0 / ((terms + 2.0) * (terms + 4.0))) ** (1.0 / 6.0)
    unit = standardised(one, 0.0, 1.0)
    return standardised(sum_quantiles(part * unit, (1.0 - part**2) ** 0.5 * nodes()), 0.0, 1.0)


def both_signs(shape: Array) -> Array:
    """Quantiles over channels: as many have the mirrored shape."""
    return quantiles(np.stack([shape, -shape]), np.stack([weights(), weights()]))


def shaped(y: Value, x: Value, terms: Mapping[int, float], *, of_all: bool) -> Value:
    """The sums y of these terms of x, with the shape that few of them leave.

    A sum of channels that are themselves sums, all of the same terms, is one of these terms again: behind a narrow layer without
    an activation channels are as skewed as in it. ``of_all``: channels of y read all channels of x.
    """
    again = x.uneven is not None and x.uneven.shape is not None and x.uneven.of_all
    if again and x.unevenness() is not None:
        assert x.uneven is not None
        terms = {p: number for p, number in terms.items() if x.axes[p] not in x.uneven.axes}
    if y.uneven is None or math.prod(terms.values()) > MOST**2:
        return y
    shape = shape_of_sum(x, effective_terms(x, terms) if x.variance > 0.0 else math.inf)
    if shape is None:
        return y
    std, profile = y.variance**0.5, y.levels

    def even() -> Array:
        return np.asarray(y.mean + std * both_signs(shape))

    def values() -> Array:
        return even() if profile is None else levels.mixture(profile, even(), y.mean, std)

    marginal = Marginal(y.marginal.latent, values, even)
    return replace(y, marginal=marginal, rho=None, uneven=replace(y.uneven, shape=shape, of_all=of_all or again))


def effective_terms(x: Value, terms: Mapping[int, float]) -> float:
    """``1 / mean over pairs of terms of the square of their correlation``: neighbours on a map are less than two terms."""
    near = x.neighbours()
    on_map = [] if near is None else [p for p in terms if x.axes[p] in near.axes]
    square = 1.0
    for position, number in terms.items():
        if position not in on_map:
            apart = float(x.table[tuple(0 if p == position else 1 for p in range(x.table.ndim))]) - x.mean**2
            square *= 1.0 / number + (1.0 - 1.0 / number) * (apart / x.variance) ** 2
    if near is not None and on_map:
        own, far = x.apart(near)
        taps = [max(round(terms[p]), 1) for p in on_map]
        moments = far + (own - far) * near.over(tuple(x.axes[p] for p in on_map), taps)
        alike = ((moments - x.mean**2) / (own - x.mean**2)) ** 2
        for tap in reversed(taps):
            alike = alike @ (pairs_by_lag(tap) / tap**2)
        square *= float(alike)
    return 1.0 / square


def with_shapes(x: Value, result: Value, function: Callable[[Array], Array]) -> Value:
    """Half the channels have one shape, half the other: their means and levels of f differ.

    ``((E[f+] - E[f-]) / 2)^2`` is shared by the entries of one channel that have nothing else in common, and the level strays by
    ``((E[f+^2] - E[f-^2]) / 2)^2`` over the number of channels, relative to its square.
    """
    uneven = x.unevenness()
    if uneven is None or uneven.shape is None:
        return result
    std = x.variance**0.5
    first, second = (function(x.mean + std * sign * uneven.shape) for sign in (1.0, -1.0))
    means = (expectation(first) - expectation(second)) / 2.0
    squares = [expectation(values**2) for values in (first, second)]
    if sum(squares) <= 0.0:
        return result
    rows = tuple(1 if axis in uneven.axes else slice(None) for axis in x.axes)
    table = result.table.copy()
    table[rows] += means**2 * (1.0 - x.correlation()[rows])
    table[(1,) * table.ndim] = result.second_moment
    channels = float(np.prod([axis.size for axis in uneven.axes]))
    stray = ((squares[0] - squares[1]) / sum(squares)) ** 2 / channels
    before = result.uneven or Uneven(uneven.axes, 0.0)
    return replace(result, table=table, uneven=replace(before, stray=before.stray + stray))
