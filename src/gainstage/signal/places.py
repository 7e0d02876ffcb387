"""Places that swell: the channels of a place have a level in common, which differs from place to place.

A layer of n inputs reads at place p a vector whose mean square strays over places by ``(kurtosis of x - 1) / n``, and by what
the levels of its inputs stray; what comes out has that level in all its channels. Batch norm holds the average over places, not
the level of each; in return it takes what the variances of channels stray by. Given its weights w, a channel has the kurtosis
``3 + (kurtosis of x - 3) sum w^4 / (sum w^2)^2``: of a Gaussian x nothing is left to see. With ``x = sqrt(l) z`` at a place, l
log-normal of mean 1 and independent from place to place,

    E[f(x)^2] = E[f_l(z)^2],      E[f(x)] = E[g(z)],      f_l(z) = f(sqrt(l) z),  g = E[f_l],

and covariances of places grow like the variance. For ReLU, ``E[f^2] = E[l] / 2`` stays, while ``E[f]^2`` falls by a quarter of
``Var(l)`` of itself, and more is left when a mean goes. Channels of one place share ``(d E[f] / d log l)^2 Var(log l)`` beyond
that, of all that the level strays by: behind a Gaussian x each channel is Gaussian, but squares of two correlate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gainstage.signal.copies import replace
from gainstage.signal.marginal import Marginal
from gainstage.signal.quadrature import Array, evaluate_series, expectation, few_scales, power_series
from gainstage.signal.value import Value

MOST = 1.0  # variance of the log of a level beyond which its first order says nothing
STEP = 0.01  # of deviations, for a derivative


def over_places(x: Value, result: Value, function: Callable[[Array], Array]) -> Value:
    """Average over the levels of places of what two entries of f(x) share, and how the levels of f(x) stray."""
    swell, places = min(max(x.overlap.swell - x.overlap.evened, 0.0), MOST), x.overlap.places
    if not places or x.statistic is not None or any(axis not in x.axes for axis in places):
        return result
    scales, mass = few_scales(swell)
    unit = at_one_level(x, float(mass @ scales))

    steps = np.array([1.0 + STEP, 1.0 - STEP, 1.0])
    made = function(np.concatenate([scales, steps])[:, None] * unit)
    each, before, rho = made[: len(scales)], function(x.marginal.even), x.correlation()
    average = (mass[:, None] * each).sum(0)
    series, second = power_series(before), float(mass @ [expectation(values**2) for values in each])
    gained = expectation(average) ** 2 - float(series[0])  # of the square of the mean
    grown = (second - float(series[0]) - gained) / max(float(series[1:].sum()), 1e-300)
    # Covariances of places grow like their variances: averages over places that cancel in x still do in what is linear in it.
    table = result.table + gained + (grown - 1.0) * (evaluate_series(series, rho) - float(series[0]))
    table[(1,) * table.ndim] = result.second_moment + second - float(series.sum())
    mean = float(np.copysign(max(result.mean**2 + gained, 0.0) ** 0.5, result.mean))
    std = max(float(table[(1,) * table.ndim]) - mean**2, 0.0) ** 0.5
    marginal = moved(result, mean, std)
    steepness = (expectation(made[-3]) - expectation(made[-2])) / (4.0 * STEP)
    of_place = tuple(slice(1, 2) if axis in places else slice(None) for axis in x.axes)
    shared = steepness**2 * min(x.overlap.swell, MOST) * (1.0 - rho[of_place] ** 2)
    number = math.prod(axis.size for axis in places)
    table -= shared / (number - 1.0)  # so that the average over all places is held
    table[of_place] += shared * (number / (number - 1.0))
    wider, narrower, level = (_level(values, expectation(average)) for values in made[len(scales) :])
    power = (wider - narrower) / (4.0 * STEP * level) if level > 0.0 else 0.0
    overlap = replace(result.overlap, swell=x.overlap.swell * power**2, places=places, evened=x.overlap.evened * power**2)
    return replace(result, table=table, mean=mean, marginal=marginal, overlap=overlap)


def at_one_level(x: Value, scale: float) -> Array:
    """Values of z in ``x = sqrt(l) z``: of x's second moment, and of the mean that ``E[sqrt(l)]``, given, makes x's of."""
    even = x.marginal.even
    mean = expectation(even)
    variances = [max(expectation(even**2) - m**2, 0.0) for m in (mean, mean / scale)]
    return np.asarray(mean / scale + (variances[1] / variances[0]) ** 0.5 * (even - mean)) if variances[0] > 0.0 else even


def _level(values: Array, mean: float) -> float:
    """``E[(f - m)^2]`` for the mean m of all places."""
    return expectation((values - mean) ** 2)


def moved(x: Value, mean: float, std: float) -> Marginal:
    """The distribution of x at another mean and deviation."""
    before, ratio = x.mean, std / x.variance**0.5 if x.variance > 0.0 else 1.0

    def values() -> Array:
        return np.asarray(mean + ratio * (x.marginal.values - before))

    def even() -> Array:
        return np.asarray(mean + ratio * (x.marginal.even - before))

    return Marginal(x.marginal.latent, values, even if x.marginal.has_even else None)
