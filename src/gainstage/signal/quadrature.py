"""Expectations over a standard normal variable, by one fixed rule.

A function of one Gaussian is its values on a grid: 1,025 equidistant points on [-9, 9] with normal weights. On smooth
functions the trapezoid rule is then exact to 1e-12 or better (Trefethen & Weideman 2014, section 5); at a kink
that falls between two points the error is about ``step^2 / 8`` of the change of slope, 4e-5.

Products of a matrix and a vector are taken row by row (``np.vecdot``), those of matrices by torch, which keeps to the threads
that it is given: at sizes like these the threads of NumPy's library wait for each other far longer than they work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
TIED = 4  # points of the grid in a step of the coarser one for maxima
_STEPS, _WIDEST = 30, 100.0  # of a fixed point; variance of log s^2
_STEP = 0.1  # of log s^2, for derivatives
_BLOCK = 16  # places that are looked at at once
_COARSEST = 8.0  # a distribution is smooth on points that lie as far apart as those of one this many times as wide
ORDER = 40  # highest Hermite polynomial; what lies above is kept as one term


@cache
def nodes() -> Array:
    """Points z of the grid, increasing, symmetric about 0."""
    return np.linspace(-9.0, 9.0, 1025)


def between_nodes(z: Array, values: Array) -> Array:
    """f(z) at any z in any order, linear between the nodes: as ``np.interp``, which searches for each z among them."""
    place = np.clip((z - nodes()[0]) / (nodes()[1] - nodes()[0]), 0.0, values.size - 1.0)
    below = np.minimum(place.astype(np.int32), values.size - 2)
    return np.asarray(values[below] + (place - below) * np.diff(values)[below])


@cache
def weights() -> Array:
    """Normal weights of the points; they sum to 1."""
    weight = np.exp(-0.5 * nodes() ** 2)
    return np.asarray(weight / weight.sum())


@cache
def cumulative() -> Array:
    """Probability below each point, half of its own weight included."""
    weight = weights()
    return np.asarray(np.cumsum(weight) - 0.5 * weight)


def sample_quantiles(entries: Array) -> Array:
    """Quantiles of a sample at the points' probabilities; sorting is several times faster than numpy.quantile at as many."""
    return np.asarray(np.interp(cumulative() * (entries.size - 1), np.arange(entries.size), np.sort(entries)))


@cache
def _weighted_hermite() -> Array:
    """Rows ``w(z) He_n(z) / sqrt(n!)`` for n = 0..ORDER."""
    z = nodes()
    rows = [np.ones_like(z), z.copy()]
    for n in range(1, ORDER):
        rows.append((z * rows[n] - np.sqrt(n) * rows[n - 1]) / np.sqrt(n + 1))
    return np.asarray(np.stack(rows) * weights())


@cache
def hermite() -> Array:
    """``He_n(z) / sqrt(n!)``, a row for each point z of the grid."""
    return np.ascontiguousarray((_weighted_hermite() / weights()).T)


def matmul(first: Array, second: Array) -> Array:
    """Product of two matrices."""
    a, b = (torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float64)) for matrix in (first, second))
    return np.asarray((a @ b).numpy())


def expectation(values: Array) -> float:
    """``E[f(z)]`` from the values of f on the grid."""
    return float(weights() @ values)


def kurtosis(values: Array) -> float:
    """``E[(f - E f)^4] / Var(f)^2``: 3 of a Gaussian, 1.8 of a uniform distribution; 3 of what does not vary."""
    squares = (values - expectation(values)) ** 2
    level = expectation(squares)
    return expectation(squares**2) / level**2 if level > 0.0 else 3.0


def standardised(grid: Array, mean: float, std: float) -> Array:
    """Shift and stretch a distribution to the mean and deviation that are known exactly."""
    centre = expectation(grid)
    deviation = max(expectation((grid - centre) ** 2), 0.0) ** 0.5
    return np.asarray(mean + (grid - centre) * (std / deviation if deviation > 0.0 else 0.0))


def tied_correlation(values: Array, share: Array) -> Array:
    """``Corr(f(u), f(v))`` for maxima u and v of two sets of equally many entries that have a share s of them in common.

    From Hoeffding (1940), ``Cov = integral of C(u, v) - u v`` over df(u) df(v), with ``C = min(u, v)^s (u v)^(1 - s)`` by ranks
    (Cuadras & Auge 1981).
    """
    steps = np.diff(values[::TIED])
    kinds, which = np.unique(share, return_inverse=True)
    whole = float(steps @ _tied(1.0) @ steps)
    found = np.array([float(steps @ _tied(float(kind)) @ steps) / whole if whole > 0.0 else 0.0 for kind in kinds])
    return np.asarray(found[which].reshape(share.shape))


@cache
def _tied(share: float) -> Array:
    """``C(u, v) - u v`` between the points of a coarser grid."""
    below = torch.special.ndtr(torch.from_numpy(0.5 * (nodes()[::TIED][1:] + nodes()[::TIED][:-1]))).numpy()
    pairs = np.outer(below, below)
    return np.asarray(np.minimum.outer(below, below) ** share * pairs ** (1.0 - share) - pairs)


def gamma_quantiles(mean: float, std: float) -> Array:
    """Values of a gamma variable, increasing, by the inverse of its distribution function at that of the normal variable."""
    shape = (mean / std) ** 2
    points = torch.linspace(0.0, 1.0, 1025, dtype=torch.float64)[1:]
    spaced = torch.cat([shape * points.pow(max(4.0, 8.0 / shape)), shape + (90.0 + 14.0 * shape**0.5) * points.square()])
    below = torch.special.gammainc(torch.tensor(shape, dtype=torch.float64), spaced)
    above = torch.special.gammaincc(torch.tensor(shape, dtype=torch.float64), spaced)
    normal = torch.where(below < 0.5, torch.special.ndtri(below), -torch.special.ndtri(above))
    return np.asarray(np.interp(nodes(), normal.numpy(), spaced.numpy()) * (mean / shape))


def flattened(wanted: float) -> Array:
    """Values of mean 0, variance 1 and this kurtosis, between those of a normal and of a uniform variable."""
    shares, found = _kurtoses()
    return standardised(_between(float(np.interp(-wanted, -found, shares))), 0.0, 1.0)


@cache
def _kurtoses() -> tuple[Array, Array]:
    """Shares of a uniform variable in a normal one, and the kurtosis at each."""
    shares = np.linspace(0.0, 1.0, 33)
    return shares, np.array([kurtosis(_between(share)) for share in shares])


def _between(share: float) -> Array:
    return np.asarray((1.0 - share) * nodes() + share * 12.0**0.5 * (cumulative() - 0.5))


def over_norm(wanted: float) -> Array:
    """Values of variance 1 and this kurtosis, 1 to 3, of ``z / sqrt(l z^2 + 1 - l)``.

    What norms leave of a component with a share l of the squared norm.
    """
    shares, found = _kurtoses_over_norm()
    return _over_norm(float(np.interp(-wanted, -found, shares)))


@cache
def _kurtoses_over_norm() -> tuple[Array, Array]:
    """Shares of a component in the squared norm, and the kurtosis at each."""
    shares = 1.0 - np.geomspace(1.0, 1e-4, 65)
    return shares, np.array([kurtosis(_over_norm(share)) for share in shares])


def _over_norm(share: float) -> Array:
    return standardised(nodes() / np.sqrt(share * nodes() ** 2 + 1.0 - share), 0.0, 1.0)


def stray_passed(before: Array, after: Array, variance: float) -> float:
    """``Var log E[g(sz)^2]`` for a log-normal s such that ``Var log E[f(sz)^2]`` is the given variance: a stray level passed on.

    f and g: values before and after. The mean of s^2 is 1. To first order it grows by the square of
    ``d log E[g^2] / d log E[f^2]``; but GELU, which turns 1 % more into 1.3 % more, is linear for a signal that has strayed far,
    to either side. What is small, or negative, is passed on to first order.
    """
    turned, slope = _level_growth(before), level_slope(before, after)
    if variance <= 1e-4 or slope == 0.0:
        return variance * slope**2
    scale = variance / turned**2  # of log s^2; right at once where f is linear
    for _ in range(_STEPS):
        found = _log_variance(before, scale)
        if abs(found - variance) <= 1e-9 * variance or found <= 0.0:
            break
        scale = min(scale * variance / found, _WIDEST)
    return _log_variance(after, scale)


def level_slope(before: Array, after: Array) -> float:
    """``d log E[g(sz)^2] / d log E[f(sz)^2]`` at s = 1, from the values of f and g; 0 where f does not depend on s."""
    turned = _level_growth(before)
    return _level_growth(after) / turned if abs(turned) >= 1e-6 else 0.0


def _level_growth(values: Array) -> float:
    """``d log E[f(sz)^2] / d log s^2``."""
    levels = _log_levels(values, np.array([0.0, _STEP]))
    return float(levels[1] - levels[0]) / _STEP


def average_slope(values: Array, share: Callable[[Array], float]) -> float:
    """``d log q / d log E[f(sz)^2]`` at s = 1 of a level that is not that of the entries, such as that of averages of them.

    ``share``: of the second moment of entries, from their Mehler coefficients, what is left.
    """
    turned = _level_growth(values)
    if abs(turned) < 1e-6:
        return 1.0
    wider = _beyond(values, np.exp(0.5 * _STEP) * nodes())
    left = [max(share(power_series(part)), 1e-300) for part in (values, wider)]
    return float(np.log(left[1] / left[0])) / _STEP / turned


def _log_variance(values: Array, scale: float) -> float:
    """``Var log E[f(s z)^2]`` over a log-normal s, ``log s^2`` of this variance, ``E[s^2] = 1``."""
    points, mass = few_points()
    found = _log_levels(values, scale**0.5 * points - scale / 2.0)
    return float(mass @ (found - mass @ found) ** 2)


@cache
def few_points() -> tuple[Array, Array]:
    """Places and masses of Gauss-Hermite quadrature with 9 points."""
    points, mass = np.polynomial.hermite_e.hermegauss(9)
    return points, mass / mass.sum()


def few_scales(variance: float) -> tuple[Array, Array]:
    """Scales s and masses of a few points of a log-normal level ``s^2``, of mean 1 and this variance of its log."""
    points, mass = few_points()
    squares = np.exp(variance**0.5 * points)
    return np.sqrt(squares / float(mass @ squares)), mass


def gamma_scales(variance: float) -> tuple[Array, Array]:
    """Scales s and masses of a few points of a gamma-distributed level ``s^2`` of mean 1 and this variance.

    Gauss-Laguerre quadrature from the matrix of the recurrence of its polynomials (Golub & Welsch 1969).
    """
    shape, order = 1.0 / variance, np.arange(9.0)
    beside = np.sqrt(order[1:] * (order[1:] + shape - 1.0))
    squares, vectors = np.linalg.eigh(np.diag(2.0 * order + shape) + np.diag(beside, 1) + np.diag(beside, -1))
    return np.sqrt(squares / shape), vectors[0] ** 2


def _log_levels(values: Array, logs: Array) -> Array:
    """``log E[f(s z)^2]`` for each ``log s^2``."""
    found = _beyond(values, np.exp(0.5 * logs)[:, None] * nodes())
    return np.asarray(np.log(np.maximum(np.vecdot(found**2, weights()), 1e-300)))


def _beyond(values: Array, z: Array) -> Array:
    """f(z), which beyond 5 goes on as it does from 4 to 5."""
    inside = np.clip(z, -5.0, 5.0)
    ends = np.interp([-5.0, -4.0, 4.0, 5.0], nodes(), values)
    return np.asarray(np.interp(inside, nodes(), values) + np.where(z > 0.0, ends[3] - ends[2], ends[1] - ends[0]) * (z - inside))


def power_series(values: Array) -> Array:
    """Coefficients ``c_n`` of ``E[f(z) f(z')] = sum_n c_n rho^n`` (Mehler), n = 0..ORDER+1.

    ``c_n = a_n^2`` for the normalised Hermite coefficients ``a_n``; the last coefficient holds all that lies above ORDER, so
    that the sum at rho = 1 is ``E[f^2]`` exactly.
    """
    squares = np.vecdot(_weighted_hermite(), values) ** 2
    rest = max(expectation(values * values) - float(squares.sum()), 0.0)
    return np.append(squares, rest)


def smoothed(values: Array, r: float) -> Array:
    """``E[f(sqrt(r) z + sqrt(1 - r) e) | z]`` on the grid, e normal: the n-th Hermite coefficient times ``r^(n/2)``."""
    if r > 0.98:  # higher orders than ORDER would count
        return values
    coefficients = np.vecdot(_weighted_hermite(), values) * r ** (0.5 * np.arange(ORDER + 1))
    return np.asarray(np.vecdot(hermite(), coefficients))


def covariance_series(f: Array, g: Array, rho: Array) -> Array:
    """``Cov(f(z), g(z')) = sum_{n>0} a_n b_n rho^n`` from the values of f and g on the grid, for each correlation of z and z'."""
    series = joint_series(f, g)
    series[0] = 0.0
    return evaluate_series(series, rho)


def joint_series(f: Array, g: Array) -> Array:
    """Coefficients ``c_n = a_n b_n`` of ``E[f(z) g(z')] = sum_n c_n rho^n``; the last holds all that lies above ORDER."""
    products = np.vecdot(_weighted_hermite(), f) * np.vecdot(_weighted_hermite(), g)
    return np.append(products, float(weights() @ (f * g)) - float(products.sum()))


def covariances(functions: Array, rho: Array) -> Array:
    """``E[f_i(z) f_j(z')]`` for functions [i, grid], z and z' of correlation ``rho[i, j]``; as they are where it is 1 (i = j)."""
    coefficients = functions @ _weighted_hermite().T
    found, power = np.zeros_like(rho), np.ones_like(rho)
    for each in coefficients.T:
        found += np.outer(each, each) * power
        power = power * rho
    np.fill_diagonal(found, (functions**2) @ weights())
    return found


def normal_series(mean: float, slope: float) -> Array:
    """Coefficients ``c_0, c_1`` of :func:`power_series` for ``f(z) = mean + slope z``; all others are 0."""
    return np.array([mean**2, slope**2])


def normal_square_series(mean: float, slope: float) -> Array:
    """Coefficients ``c_0, c_1, c_2`` of :func:`power_series` for ``(mean + slope z)^2``."""
    return np.array([(mean**2 + slope**2) ** 2, 4.0 * (mean * slope) ** 2, 2.0 * slope**4])


def evaluate_series(series: Array, rho: Array) -> Array:
    """``sum_n c_n rho^n`` for each entry of rho."""
    return np.asarray(np.vecdot(_powers(rho, len(series)), series)).reshape(rho.shape)


def _powers(rho: Array, count: int) -> Array:
    """``rho^0, rho^1 ...``, a row for each entry of rho."""
    return np.vander(rho.ravel(), count, increasing=True)


@cache
def _correlations(count: int) -> tuple[Array, Array]:
    """Correlations from -1 to 1, and their powers."""
    grid = np.linspace(-1.0, 1.0, 401)
    return grid, np.ascontiguousarray(_powers(grid, count)[:, 1:])


def invert_series(series: Array, covariance: Array) -> Array:
    """Correlations rho at which ``sum_{n>0} c_n rho^n`` equals each covariance; clipped to [-1, 1].

    Exact for a linear function. The series is increasing on [0, 1] always, and on [-1, 0] for monotone functions.
    """
    grid, powers = _correlations(len(series))
    values = np.maximum.accumulate(np.vecdot(powers, series[1:]))
    return np.asarray(np.interp(covariance, values, grid))


def quantiles(samples: Array, probabilities: Array | None = None) -> Array:
    """Values on the grid of the increasing function g with g(z) distributed as the samples, weighted or all alike."""
    if probabilities is None:
        below = (np.arange(samples.size) + 0.5) / samples.size
        return _on_grid(below, below, np.sort(samples, axis=None))
    order = np.argsort(samples, axis=None, kind="stable")
    ordered, mass = samples.ravel()[order], probabilities.ravel()[order] / probabilities.sum()
    below, above = (np.cumsum(part) - 0.5 * part for part in (mass, mass[::-1]))
    return _on_grid(below, above, ordered)


def _on_grid(below: Array, above: Array, values: Array) -> Array:
    """Increasing values on the grid, from the probabilities below them and, of the last one first, above them.

    Each tail is read from its own end: the probability below the last points is 1 to a float, and all would be the largest value.
    """
    lower = cumulative()[: nodes().size // 2 + 1]
    low, high = np.interp(lower, below, values), np.interp(lower, above, values[::-1])
    return np.concatenate([low, high[-2::-1]])


@cache
def coarse(every: int = 16) -> tuple[Array, Array]:
    """Points and weights of a coarser rule for sums and products of two distributions."""
    points = nodes()[::every]
    weight = np.exp(-0.5 * points**2)
    return points, weight / weight.sum()


def expectation_of_two(surface: Array, mass: Array) -> float:
    """``E[f(z, z')]`` of two independent variables from the values of f on a grid of both, with the weights of its points."""
    return float(np.vecdot(surface, mass) @ mass)


def _largest_atom(x: Array) -> float:
    """Largest probability of one value, of sorted values on the grid."""
    return float(np.bincount(np.append(0, np.cumsum(np.diff(x) > 0.0)), weights()).max())


def sum_quantiles(x: Array, y: Array) -> Array:
    """Values on the grid of the increasing function g with g(z) distributed as the sum of two independent entries.

    ``P(x + y <= t) = sum over the points of x of w(x) P(y <= t - x)``: points of the narrower one, or of the one of which
    many entries are equal, whose distribution function would jump between points; distribution function of the other; inverted at
    the grid's probabilities.
    """
    x, y = np.sort(x), np.sort(y)
    if np.ptp(x) > np.ptp(y):
        x, y = y, x
    if _largest_atom(y) > _largest_atom(x) and np.ptp(y) < _COARSEST * np.ptp(x):
        x, y = y, x
    points, mass = x[::4], weights()[::4] / weights()[::4].sum()
    reach = np.linspace(-1.0, 1.0, 257)
    middle = np.median(x) + np.median(y)
    low, high = x[0] + y[0] - middle, x[-1] + y[-1] - middle
    places = middle + np.where(reach < 0, -low, high) * np.sign(reach) * np.abs(reach) ** 2  # denser in the middle
    below = _below_sum(places, points, mass, y)
    above = _below_sum(-places[::-1], -points, mass, -y[::-1])
    return _on_grid(below, above, places)


def _below_sum(places: Array, points: Array, mass: Array, y: Array) -> Array:
    """``P(x + y <= t)`` at increasing places t as far as it is no more than a half, and a little beyond; then 1."""
    found = np.ones(places.size)
    for start in range(0, places.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        found[block] = np.vecdot(np.interp(places[block, None] - points, y, cumulative(), left=0.0, right=1.0), mass)
        if found[block][-1] > 0.5:
            break
    return found
