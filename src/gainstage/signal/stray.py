"""Stray levels: how far the level of a tensor strays from draw to draw, by cause: branches of one tensor stray together.

The log of the level of one draw is its mean and ``sum over causes c of t_c xi_c``, the xi_c independent, of variance 1.
A cause is the weights of one layer, a coin, or the entries of one tensor: a table of second moments shows the last
(:meth:`gainstage.signal.value.Value.fluctuation`), but only in the tensor itself. What reads it has its level all the same. So of
each t_c a part s_c is shown, and

    Var(log q) = fluctuation + sum over c of (t_c^2 - s_c^2) - taken

In ``x + f(x)`` the amplitudes of what x and f(x) have from one cause add up, where variances would if they were independent: in a
network of residual branches without norms all levels rise and fall together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from gainstage.signal.quadrature import Array, average_slope, evaluate_series, level_slope, stray_passed

if TYPE_CHECKING:
    from gainstage.signal.value import Value

MOST = 64  # causes kept apart
LEAST = 1e-4  # variance of the log of a level that is looked at more closely
NEGLIGIBLE = 1e-8  # variance of the log of a level

Parts = Mapping[object, tuple[float, float]]


@dataclass(frozen=True, slots=True, eq=False)
class Stray:
    """What the log of a level strays by.

    ``parts``: cause -> amplitude, and how much of it the table shows. ``taken``: variance that the table shows but a norm
    took back. ``own``: what stands for the entries of the tensor, as a cause. ``of_mean``: ``d log E[x]^2 / d log E[x^2]``, of
    what is no function of a latent any more. ``of_means``: cause -> amplitude of the log of ``E[x]^2``, where that is another.
    """

    parts: Parts = field(default_factory=dict)
    taken: float = 0.0
    own: object = field(default_factory=object)
    of_mean: float | None = None
    of_means: Mapping[object, float] = field(default_factory=dict)

    @property
    def variance(self) -> float:
        """Variance of the log of the level beyond what the table shows; negative where a norm took back what the table shows."""
        return _hidden(self.parts) - self.taken

    def hidden(self, slope: float = 1.0) -> Stray:
        """Of what is made of the entries and has a table that shows other things, its log level times ``slope`` theirs."""
        parts = {cause: (slope * (whole - shown), 0.0) for cause, (whole, shown) in self.parts.items() if whole != shown}
        return Stray(parts, slope**2 * self.taken)

    def through_epsilon(self, left: float) -> Stray:
        """What is left of what the table does not show, behind a norm that divides by little more than its epsilon."""
        if left**2 * _hidden(self.parts) < NEGLIGIBLE:
            return Stray()
        return Stray({cause: (left * whole, 0.0) for cause, (whole, shown) in self.parts.items() if whole != shown})

    def with_cause(self, variance: float) -> Stray:
        """With a variance that comes of a further cause."""
        return self if variance <= 0.0 else Stray(_largest({**self.parts, object(): (variance**0.5, 0.0)}), self.taken)

    def with_amplitude(self, whole: float, of_mean: float) -> Stray:
        """With a further cause, of these amplitudes of the logs of the level and of the square of the mean."""
        cause = object()
        parts, of_means = {**self.parts, cause: (whole, 0.0)}, {**self.of_means, cause: of_mean}
        return replace(self, parts=_largest(parts), of_means=of_means)


def of(variance: float) -> Stray:
    """A level that strays by this variance, of a cause of its own."""
    return Stray().with_cause(variance)


def _hidden(parts: Parts) -> float:
    return sum(whole**2 - shown**2 for whole, shown in parts.values())


def _largest(parts: Parts) -> Parts:
    """The largest; the rest as one."""
    if len(parts) <= MOST:
        return parts
    ordered = sorted(parts.items(), key=lambda item: -abs(item[1][0]))
    kept, rest = dict(ordered[:MOST]), ordered[MOST:]
    whole, shown = (sum(item[1][k] ** 2 for item in rest) ** 0.5 for k in (0, 1))
    return {**kept, object(): (whole, shown)}


def _all(x: Value) -> Parts:
    """All causes, those that its table shows and nothing else is known of among them."""
    if x.is_weight or x.constant is not None:
        return x.stray.parts
    left = x.fluctuation() - x.stray.taken - sum(shown**2 for _, shown in x.stray.parts.values())
    return {**x.stray.parts, x.stray.own: (left**0.5, left**0.5)} if left > 0.0 else x.stray.parts


def read(terms: Sequence[tuple[Value, float]]) -> Stray:
    """Of sums over many products, which have the levels of their factors, with these powers; their tables show nothing of it."""
    parts = _summed([(_all(x), factor) for x, factor in terms])
    return Stray(_largest({cause: (whole, 0.0) for cause, (whole, _) in parts.items()}))


def averaged(x: Value, average: Callable[[Array], float]) -> Stray:
    """Of linear combinations of entries of x, whose second moment is an average of its table: ``average``, of any table."""
    if (_hidden(x.stray.parts) < LEAST and not x.stray.of_means) or average(x.table) <= 0.0:
        return x.stray.hidden()
    rho, of_mean = x.correlation(), 0.0 if x.mean == 0.0 else growth(x, (x.mean**2, 0.0), lambda series: float(series[0]))
    left = x.mean**2, average(x.table) - x.mean**2
    slope = growth(x, left, lambda series: average(evaluate_series(series, rho)))
    found = x.stray.hidden(slope)
    parts = {**found.parts, **_means_known(x, left)}
    return replace(found, parts=parts, of_mean=of_mean / slope if slope > 0.0 else None, of_means=x.stray.of_means)


def _means_known(x: Value, left: tuple[float, float]) -> Parts:
    """What causes that have an amplitude for the mean make of an average, where so much is left of its square and variance."""
    found = {}
    for cause, of_mean in x.stray.of_means.items():
        whole = x.stray.parts.get(cause, (0.0, 0.0))[0]
        of_rest = (x.second_moment * whole - x.mean**2 * of_mean) / x.variance if x.variance > 0.0 else 0.0
        found[cause] = (left[0] * of_mean + left[1] * of_rest) / (left[0] + left[1]), 0.0
    return found


def growth(x: Value, left: tuple[float, float], share: Callable[[Array], float]) -> float:
    """``d log p / d log E[x^2]`` where levels stray, of what p is left of the square of the mean and of the variance of x.

    Args:
        x: a tensor.
        left: of both.
        share: what makes p of Mehler coefficients.
    """
    of_mean, (own, other) = x.stray.of_mean, left
    if of_mean is None:
        return average_slope(x.marginal.values, share)
    of_rest = (x.second_moment - x.mean**2 * of_mean) / x.variance if x.variance > 0.0 else 0.0
    return (own * of_mean + other * of_rest) / (own + other)


def summed(terms: Sequence[tuple[Value, float]]) -> Stray:
    """Of a sum or a product of entries, whose log level is a sum of those of the terms with these factors."""
    parts = _summed([(_all(x), factor) for x, factor in terms])
    return Stray(_largest(parts), sum(factor**2 * x.stray.taken for x, factor in terms))


def _summed(terms: Sequence[tuple[Parts, float]]) -> Parts:
    """Amplitudes add up. What a table shows is made of the tables of the terms as if these were independent."""
    found: dict[object, tuple[float, float]] = {}
    for parts, factor in terms:
        for cause, (whole, shown) in parts.items():
            before = found.get(cause, (0.0, 0.0))
            found[cause] = before[0] + factor * whole, float(np.hypot(before[1], factor * shown))
    return found


def passed(x: Value, after: Array) -> Stray:
    """Of a function of x, given by its values on the grid of x's latent: log levels times ``d log E[f(x)^2] / d log E[x^2]``.

    What is not small goes through the whole of f, see :func:`gainstage.signal.quadrature.stray_passed`.
    """
    before, parts = x.marginal.values, _all(x)
    if not parts and not x.stray.taken:
        return Stray()
    slope = level_slope(before, after)
    variance = _hidden(x.stray.parts)
    rate = slope if variance <= 0.0 else float(np.copysign((stray_passed(before, after, variance) / variance) ** 0.5, slope))
    found = {cause: (rate * (whole - shown) + slope * shown, abs(slope) * shown) for cause, (whole, shown) in parts.items()}
    return Stray(found, slope**2 * x.stray.taken)
