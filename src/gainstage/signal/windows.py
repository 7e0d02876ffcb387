"""Windows of places of equal level, and the largest value of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from gainstage.signal.patches import Maxima
from gainstage.signal.quadrature import (
    Array,
    coarse,
    evaluate_series,
    expectation_of_two,
    hermite,
    invert_series,
    nodes,
    power_series,
    weights,
)

STEP = 0.05  # of standard deviations, for a slope
LOUDER = 0.1  # of a level, for the slope of odds
_OWN = 8  # orders of what is a window's own; the rest is kept as one term
GRADES = np.linspace(0.0, 1.0, 101)  # of the levels of places, over the largest of their window
BLOCK = 16  # windows that are looked at at once


@cache
def largest(count: float) -> Array:
    """Values, at the points of the coarse rule, of the largest of ``count`` independent standard normals: ``Phi(t)^count``."""
    below = torch.special.ndtr(torch.from_numpy(coarse()[0])).numpy()
    level = np.minimum(np.maximum(below, 1e-300) ** (1.0 / count), 1.0 - 1e-16)
    return np.asarray(torch.special.ndtri(torch.from_numpy(level)).numpy())


@cache
def overlapping(first: int, second: int, shared: int) -> float:
    """Covariance of the maxima of two sets of standard normals, so many in each, of which some are the same.

    ``Cov = integral of F(x, y) - F(x) F(y)`` (Hoeffding 1940), with ``F(x, y) = Phi(min)^m Phi(x)^(n - m) Phi(y)^(k - m)``.
    """
    if shared == 0:
        return 0.0
    points, step = np.linspace(-6.0, 6.0, 241, retstep=True)
    below = torch.special.ndtr(torch.from_numpy(points)).numpy()
    wholes, rests = (below**first, below**second), (below ** (first - shared), below ** (second - shared))
    beyond = [np.cumsum(rest[::-1])[::-1] for rest in rests]
    both = wholes[0] @ beyond[1] + wholes[1][:-1] @ beyond[0][1:]  # where the second is the larger, or as large; and the first
    return float(both - wholes[0].sum() * wholes[1].sum()) * float(step) ** 2


@cache
def paired(count: float) -> tuple[Array, Array]:
    """Correlations r of ``count`` pairs of standard normals, and of the latents of their two maxima.

    ``Cov = integral of F(x, y)^n - (Phi(x) Phi(y))^n``, with ``dF / dr`` the density of a pair (Plackett 1954): for small r the
    slope is ``1 / n``, as only one pair in n^2 is of one and its counterpart, and for r = 1 the two are the same.
    """
    points, angles = np.linspace(-6.0, 6.0, 121), np.linspace(0.0, 0.5 * np.pi, 65)
    below = torch.special.ndtr(torch.from_numpy(points)).numpy()
    alone, x, y = np.outer(below, below), points[:, None], points[None, :]
    joint, density, covariances = alone, np.exp(-0.5 * (x**2 + y**2)), [0.0]
    for angle in angles[1:-1]:
        before, density = density, np.exp(-0.5 * (x**2 + y**2 - 2.0 * x * y * np.sin(angle)) / np.cos(angle) ** 2)
        joint = joint + (before + density) * angles[1] / (4.0 * np.pi)
        covariances.append(float((joint**count - alone**count).sum()))
    covariances.append(float((np.minimum.outer(below, below) ** count - alone**count).sum()))
    series = power_series(np.interp(nodes(), coarse()[0], largest(count)))
    found = np.array(covariances) / covariances[-1] * series[1:].sum()
    return np.sin(angles), np.asarray(invert_series(series, found))


@dataclass(frozen=True, slots=True)
class Window:
    """Places of equal level with the values ``f(z)``, f increasing, and ``z = sqrt(r) common + sqrt(1 - r) own``.

    ``field``: what is known of the largest of them beyond their average correlation r.
    """

    values: Array
    shared: float
    field: Maxima | None = None

    def largest_of(self, count: float) -> Array:
        """The largest is where ``own`` is: [common, the rest] on the coarse rule."""
        return np.asarray(np.interp(self.latents(count), nodes(), self.values))

    def latents(self, count: float) -> Array:
        """Those of the largest; of mean and deviation as in the field."""
        points, mass = coarse()
        z = np.sqrt(self.shared) * points[:, None] + np.sqrt(1.0 - self.shared) * largest(count)[None, :]
        if self.field is None:
            return np.asarray(z)
        mean = expectation_of_two(z, mass)
        deviation = (expectation_of_two(z**2, mass) - mean**2) ** 0.5
        return np.asarray(self.field.mean + (z - mean) * (self.field.deviation / deviation))

    def apart(self, surface: Array, rho: Array) -> Array:
        """Second moment of two windows without a common place, whose places have the correlation rho."""
        points, mass = coarse()
        series = power_series(np.interp(nodes(), points, np.vecdot(surface, mass)))
        return evaluate_series(series, np.clip(rho / max(self.shared, 1e-12), 0.0, 1.0))

    def opposite(self, surface: Array, rho: Array, beyond: Array, count: float) -> Array:
        """Second moment of two windows, as of two samples, whose places have the correlation rho; counterparts more.

        ``beyond``: by how much. ``sum of a_nm^2 c^n o^m``, c and o the correlations of the latents of what is common and own.
        """
        points, mass = coarse()
        common = np.clip(rho / max(self.shared, 1e-12), -1.0, 1.0)
        own = np.clip(beyond / max(1.0 - self.shared, 1e-12), -1.0, 1.0)
        own = np.sign(own) * np.interp(np.abs(own), *paired(count))
        orders = [np.interp(points, nodes(), each) for each in hermite().T[:_OWN]]
        series = [power_series(np.interp(nodes(), points, np.vecdot(surface, mass * each))) for each in orders]
        columns = [weight * power_series(np.interp(nodes(), points, each)) for each, weight in zip(surface.T, mass, strict=True)]
        series.append(np.sum(columns, axis=0) - np.sum(series, axis=0))
        return np.asarray(sum(evaluate_series(each, common) * own**order for order, each in enumerate(series)))

    def slope(self, count: float) -> float:
        """``E[d max / d t]`` for ``z + t`` in the place of every z."""
        z, mass = self.latents(count), coarse()[1]
        ahead, behind = (np.interp(z + step, nodes(), self.values) for step in (STEP, -STEP))
        return expectation_of_two(ahead - behind, mass) / (2.0 * STEP)

    def preference(self, count: float) -> float:
        """By which power of its level the odds of an entry grow to be the largest of ``count``: the slope at equal levels."""
        rank = 1e-9 * np.ptp(self.values) * np.arange(self.values.size)  # of equal values any one
        common, own = np.sqrt(self.shared) * coarse()[0], max(1.0 - self.shared, 1e-9) ** 0.5
        z = common + own * nodes()[:, None]
        value, tie = (np.interp(z, nodes(), each) for each in (self.values, rank))
        chances = []
        for level in (1.0 + LOUDER, 1.0 - LOUDER):
            others = (np.interp(level * value + tie, self.values + rank, nodes()) - common) / own
            below = torch.special.ndtr(torch.from_numpy(others)).numpy() ** (count - 1.0)
            chances.append(float(weights() @ below @ coarse()[1]))
        odds = [chance / max(1.0 - chance, 1e-12) for chance in chances]
        return max(math.log(odds[0] / odds[1]) / math.log((1.0 + LOUDER) / (1.0 - LOUDER)), 0.0) if count > 1 else 0.0

    def moments(self, held: Array) -> Array:
        """``E max`` and ``E max^2`` [2, windows], of windows that hold so many places of each of the levels s [windows, GRADES].

        By ``P(max < y | common) = prod P(s f < y | common)``.
        """
        points, mass = coarse()
        rising = self.values + 1e-9 * np.ptp(self.values) * np.arange(self.values.size)
        levels_y = np.unique(np.quantile(self.values, np.linspace(0.0, 1.0, 193)))
        middle = 0.5 * (levels_y[1:] + levels_y[:-1])
        occur = held.any(axis=0)
        z = np.interp(middle / np.maximum(GRADES[occur, None], 1e-9), rising, nodes())
        own = (z[..., None] - np.sqrt(self.shared) * points) / max(1.0 - self.shared, 1e-9) ** 0.5
        each = torch.special.log_ndtr(torch.from_numpy(own.reshape(len(own), -1)))
        below = np.ones((len(held), middle.size + 2))
        below[:, 0] = 0.0
        for start in range(0, len(held), BLOCK):
            whole = (torch.from_numpy(held[start : start + BLOCK, occur]) @ each).exp().numpy()
            below[start : start + BLOCK, 1:-1] = np.vecdot(whole.reshape(len(whole), middle.size, mass.size), mass)
        return np.asarray(np.stack([levels_y, levels_y**2]) @ np.diff(below, axis=1).T)
