"""The distribution of one entry of a tensor: a function of a standard normal variable."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from gainstage.signal import levels
from gainstage.signal.quadrature import (
    Array,
    expectation,
    kurtosis,
    nodes,
    normal_series,
    normal_square_series,
    power_series,
)


class Marginal:
    """Distribution of one entry: values of g on the grid. The object's identity is that of the latent variable ``z``.

    ``even``: where levels differ, the distribution of an entry of average level, for lack of which it is that of any entry.
    ``normal``: mean and slope of ``g(z) = mean + slope z``, where it is made as that: what follows is then known without sums.
    """

    def __init__(
        self, latent: object, compute: Callable[[], Array], even: Callable[[], Array] | None = None,
        *, normal: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """Hold the latent's identity and a recipe for the values, followed when they are first needed."""
        self.latent = latent
        self._compute = compute
        self._even = even
        self._normal = normal
        self.made: list[tuple[object, object, object]] = []  # see :func:`gainstage.signal.copies.once`

    def affine(self, scale: float, shift: float = 0.0) -> Marginal:
        """``scale g + shift``, on the same latent."""
        if self._normal is not None:
            return normal_marginal(self.latent, scale * self._normal[0] + shift, scale * self._normal[1])
        return Marginal(self.latent, lambda: scale * self.values + shift, lambda: scale * self.even + shift)

    @cached_property
    def values(self) -> Array:
        """``g`` on the grid of :func:`gainstage.signal.quadrature.nodes`."""
        return self._compute()

    @cached_property
    def is_gaussian(self) -> bool:
        """Tell whether an entry of average level is Gaussian (or constant)."""
        if self._normal is not None:
            return True
        return bool(np.allclose(np.diff(self.even), self.even[1] - self.even[0], rtol=1e-6, atol=1e-12))

    @cached_property
    def kurtosis(self) -> float:
        """``E[(g - E g)^4] / Var(g)^2``."""
        return 3.0 if self._normal is not None else kurtosis(self.values)

    @property
    def has_even(self) -> bool:
        """Tell whether the distribution at one level is known."""
        return self._even is not None

    @cached_property
    def even(self) -> Array:
        """Values on the grid for an entry of average level."""
        return self.values if self._even is None else self._even()

    @cached_property
    def series(self) -> Array:
        """Mehler coefficients of g."""
        return power_series(self.values) if self._normal is None else normal_series(*self._normal)

    @cached_property
    def square_series(self) -> Array | None:
        """Mehler coefficients of ``g^2 / E[g^2]`` without its mean; None for what is zero throughout."""
        if self._normal is not None:
            series, level = normal_square_series(*self._normal), float(self.series.sum())
        else:
            series, level = power_series(self.values**2), expectation(self.values**2)
        if level <= 0.0:
            return None
        series = series / level**2
        series[0] = 0.0
        return series

    @cached_property
    def even_series(self) -> Array:
        """Mehler coefficients of an entry of average level; the first is the square of its mean."""
        return self.series if self._even is None else power_series(self.even)


def normal_marginal(latent: object, mean: float, slope: float) -> Marginal:
    """``g(z) = mean + slope z``."""
    return Marginal(latent, lambda: mean + slope * nodes(), normal=(mean, slope))


def gaussian_marginal(mean: float, std: float, profile: Array | None = None) -> Marginal:
    """``g(z) = mean + std z`` on a latent of its own; where levels differ, a mixture of them."""
    if profile is None:
        return normal_marginal(object(), mean, std)
    return Marginal(object(), lambda: mean + std * levels.normal_mixture(profile), lambda: mean + std * nodes())
