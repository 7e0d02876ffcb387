"""Loud places: few numbers are loud together, and all channels that read them are, place by place.

A layer that reads n numbers at a place puts out Gaussian channels of the level ``l = mean of x^2``. It strays over places by
``(kurtosis of x - 1) / n``, 2/n for Gaussian numbers, as a gamma variable does. The level of ``f(sqrt(l) z)`` strays with it, and
is what the next layer makes its own of, as long as no norm comes between. With ``f_l(z) = f(sqrt(l) z)``, of two entries

    of one place      E[f(x_i) f(x_j)] = E_l[E[f_l(z_i) f_l(z_j)]],
    of two places     E[f(x_i) f(x_j)] = E[g(z_i) g(z_j)],   g = E_l[f_l],   with correlations of z greater by 1 / E[sqrt(l)]^2

than those of x. (Behind a batch norm, see :mod:`gainstage.signal.places`.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gainstage.signal.copies import replace
from gainstage.signal.places import at_one_level, moved
from gainstage.signal.quadrature import Array, evaluate_series, expectation, gamma_scales, power_series
from gainstage.signal.value import Value, gaussian

LEAST = 0.05  # relative variance of levels below which all places are as good as equally loud
MOST = 2.0  # that of the square of one normal number


def over_loudness(x: Value, result: Value, function: Callable[[Array], Array]) -> Value:
    """Average over the levels of places of what two entries of f(x) share, and how the levels of f(x) stray."""
    uneven, loud = x.unevenness(), min(x.overlap.loud, MOST)
    if loud < LEAST or uneven is None or x.overlap.places or x.statistic is not None:
        return result
    scales, mass = gamma_scales(loud)
    root, rho = float(mass @ scales), x.correlation()
    # Sums of few terms are shaped over the places of a channel; over the channels of a place, whose weights differ, they are not.
    unit = at_one_level(x if uneven.shape is None else gaussian(x.dims, x.mean, x.table), root)
    each = function(scales[:, None] * unit)
    average = (mass[:, None] * each).sum(0)
    squares = np.array([expectation(values**2) for values in each])
    second = float(mass @ squares)
    if second <= 0.0:
        return result
    apart = evaluate_series(power_series(average), np.clip(rho / root**2, -1.0, 1.0))
    together = evaluate_series(
        np.sum([share * power_series(values) for share, values in zip(mass, each, strict=True)], axis=0), rho
    )
    of_place = tuple(slice(None) if axis in uneven.axes else 1 for axis in x.axes)
    apart[of_place] = together[of_place]
    before = function(x.marginal.even)
    table = result.table + apart - evaluate_series(power_series(before), rho)
    mean = result.mean + expectation(average) - expectation(before)
    table[(1,) * table.ndim] = max(result.second_moment + second - expectation(before**2), mean**2)
    std = max(float(table[(1,) * table.ndim]) - mean**2, 0.0) ** 0.5
    strays = float(mass @ (squares / second - 1.0) ** 2)
    return replace(
        result, table=table, mean=mean, marginal=moved(result, mean, std), overlap=replace(result.overlap, loud=strays)
    )
