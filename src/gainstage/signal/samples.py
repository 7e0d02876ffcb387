"""Samples of levels that they drew, where a norm holds the mean over all of them: batch norm behind stochastic depth.

Of two samples one of which lost a branch, one is quieter than the other, and batch norm divides both by one deviation. In a share
of all draws levels differ (:mod:`gainstage.signal.lots`): they are then ``l = 1 + d`` or ``1 - d``, the logs ``artanh d`` from
their mean, and

    of one sample      E[f(x_i) f(x_j)] = E[f_l(z_i) f_l(z_j)],      f_l(z) = f(sqrt(l) z),
    of two samples     E[f(x_i) f(x_j)] = E[f_l(z_i) f_l'(z_j)],     l' on the other side n times in 2 (n - 1).

Levels stray by this, those of averages over places more: the square of a mean of f is a more curved function of l.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, tanh

import numpy as np

from gainstage.signal.copies import replace
from gainstage.signal.places import moved
from gainstage.signal.quadrature import Array, evaluate_series, expectation, power_series
from gainstage.signal.value import Value

LEAST = 1e-6  # variance of the logs of levels below which samples are as good as equally loud


def over_lots(x: Value, result: Value, function: Callable[[Array], Array]) -> Value:
    """Average over the levels of samples of what two entries of f(x) share, and how the levels of f(x) stray."""
    lots = x.overlap.lots
    if lots.axis is None or lots.axis not in x.axes or x.statistic is not None or lots.apart < LEAST:
        return result
    share, apart = lots.event
    step, even = tanh(apart), x.marginal.even
    louder, quieter, before = (function(x.mean + level**0.5 * (even - x.mean)) for level in (1.0 + step, 1.0 - step, 1.0))
    each = [power_series(values) for values in (louder, quieter, before)]
    top, bottom, middle = (float(series.sum()) for series in each)
    if min(top, bottom, middle) <= 0.0:
        return result
    power, of_means = log(top / bottom) / (2.0 * apart), [float(series[0]) for series in each]
    has_mean = min(of_means[:2]) > LEAST * middle and power > 0.0
    of_mean = log(of_means[0] / of_means[1]) / (2.0 * apart * power) if has_mean else 1.0
    overlap = replace(result.overlap, lots=replace(lots.times(power), of_mean=of_mean))
    if lots.axis not in x.overlap.places:  # nothing holds their mean
        return replace(result, overlap=overlap)
    own = 0.5 * (each[0] + each[1]) - each[2]
    across = 0.5 * (power_series(louder + quieter) - each[0] - each[1]) - each[2]
    opposite = 0.5 * lots.axis.size / (lots.axis.size - 1.0)
    rho, same = x.correlation(), np.array([0.0, 1.0]).reshape([2 if axis is lots.axis else 1 for axis in x.axes])
    differing = evaluate_series(opposite * across + (1.0 - opposite) * own, rho)
    table = result.table + share * (differing + same * (evaluate_series(own, rho) - differing))
    mean = result.mean + share * (0.5 * (expectation(louder) + expectation(quieter)) - expectation(before))
    table[(1,) * table.ndim] = max(result.second_moment + share * float(own.sum()), mean**2)
    std = max(float(table[(1,) * table.ndim]) - mean**2, 0.0) ** 0.5
    deviations = [_deviation(share, *gained) for gained in ((float(own.sum()), middle), (float(own[0]), of_means[2]))]
    stray = result.stray.with_amplitude(*deviations)
    return replace(result, table=table, mean=mean, marginal=moved(result, mean, std), overlap=overlap, stray=stray)


def _deviation(share: float, gained: float, before: float) -> float:
    """Relative deviation of what is greater by so much in a share of all draws, with the sign of what is gained."""
    whole = before + share * gained
    return (share * (1.0 - share)) ** 0.5 * gained / whole if whole > 0.0 else 0.0
