"""The distribution of one parameter while it is being decided: mean and variance of each of its parts."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter

import numpy as np

from gainstage.graph import ParameterInfo
from gainstage.plan import Distribution, Mixing
from gainstage.roles import Roles, Use
from gainstage.signal import Value

Part = tuple[str, int]  # parameter, and which of its parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Mean and variance of each part of a parameter.

    ``cuts``: where the parts begin and end along ``dim``. What the parameter does to a signal is ``slope w + offset``: a norm
    that multiplies by ``1 + w`` has offset 1; or its exponential, for a temperature. ``is_fixed``: decided by a rule that needs
    no signal, never scaled; ``given``: the distribution itself, where that rule names one (what is kept has the statistics of
    its present values here; ``table``, where these are not independent of each other); ``mixing``: the matrix that a whitened
    first layer is drawn through. ``prior``: a constant for each output of a head's bias. ``lines``: what the explanation has to
    say of this.
    """

    info: ParameterInfo
    index: int  # among the graph's parameters
    dim: int
    cuts: tuple[int, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]
    slope: float = 1.0
    offset: float = 0.0
    is_exponential: bool = False
    is_fixed: bool = False
    given: Distribution | None = None
    mixing: Mixing | None = None
    table: Value | None = None
    prior: tuple[float, ...] = ()
    lines: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Mean over all entries."""
        return self._average(self.means)

    @property
    def variance(self) -> float:
        """Variance of an entry, averaged over the parts."""
        return self._average(self.variances)

    def _average(self, numbers: tuple[float, ...]) -> float:
        if len(numbers) == 1:
            return numbers[0]
        return float(np.dot(np.diff(self.cuts), numbers)) / self.cuts[-1]

    @property
    def profile(self) -> tuple[tuple[int, int, int, float], ...]:
        """Slices (dimension, start, stop, standard deviation), where parts differ."""
        if len(set(self.variances)) < 2:
            return ()
        return tuple(
            (self.dim, start, stop, variance**0.5)
            for (start, stop), variance in zip(pairwise(self.cuts), self.variances, strict=True)
        )

    def with_part(self, part: int, *, mean: float | None = None, variance: float | None = None) -> Setting:
        """Another mean or variance for one part."""
        means, variances = list(self.means), list(self.variances)
        if mean is not None:
            means[part] = mean
        if variance is not None:
            variances[part] = variance
        return replace(self, means=tuple(means), variances=tuple(variances))

    def with_all(self, *, mean: float, variance: float) -> Setting:
        """The same mean and variance for all parts."""
        count = len(self.variances)
        return replace(self, means=(mean,) * count, variances=(variance,) * count)

    def scaled(self, part: int, factor: float) -> Setting:
        """What the part does to a signal, with ``factor`` times its second moment."""
        effect = self.slope * self.means[part] + self.offset
        if self.is_exponential:
            return self.with_part(part, mean=self.means[part] + 0.5 * math.log(factor) / self.slope)
        mean = (factor**0.5 * effect - self.offset) / self.slope
        return self.with_part(part, mean=mean, variance=factor * self.variances[part])


def cut_parameters(roles: Roles, parameters: Mapping[str, ParameterInfo]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Dimension and cuts of each parameter, so that every use covers whole parts."""
    found = {}
    for name, info in parameters.items():
        uses = [use for use in roles.uses.get(name, ()) if use.rows]
        dim = uses[0].dim if uses else 0
        size = info.shape[dim] if info.shape else 1
        inner = {edge for use in uses if use.dim == dim for rows in use.rows for edge in rows}
        found[name] = (dim, tuple(sorted({0, size} | {edge for edge in inner if 0 < edge < size})))
    return found


def parts_of(use: Use, cuts: tuple[int, ...]) -> tuple[Part, ...]:
    """Parts that a use is about."""
    spans = list(pairwise(cuts))
    if not use.rows:
        return tuple((use.parameter, part) for part in range(len(spans)))
    rows = sorted(use.rows)  # apart from each other
    return tuple(
        (use.parameter, part)
        for part, (start, stop) in enumerate(spans)
        if (before := bisect_right(rows, start, key=itemgetter(0))) and stop <= rows[before - 1][1]
    )


def covers(outer: Iterable[Part], inner: Iterable[Part]) -> bool:
    """Whether every part of ``inner`` is one of ``outer``."""
    return set(inner) <= set(outer)
