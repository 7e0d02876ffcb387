"""Lots: levels that the coordinates along one axis drew, such as those of samples whose branches a coin has dropped.

What the log of a sample's level strays by has causes, as what a whole draw strays by (:mod:`gainstage.signal.stray`): one coin
makes a sample louder in the stream and in all branches that read it, where amplitudes add up. With log levels e of n samples,
independent, of variance v and excess ``k = E[e^4] - 3 v^2``, the mean over samples of ``(e - mean e)^2`` is

    (1 - 1/n) v,     and strays by     (n - 1)^2 / n^3 k + 2 (n - 1) / n^2 v^2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gainstage.signal.axes import Axis
from gainstage.signal.copies import replace

MOST = 16  # causes kept apart

Parts = Mapping[object, tuple[float, float]]


@dataclass(frozen=True, slots=True, eq=False)
class Lots:
    """What the logs of levels along an axis stray by.

    ``parts``: cause -> amplitude, and excess kurtosis of what it was drawn from. ``of_mean``: amplitudes of the level of what
    all places have in common, over these.
    """

    axis: Axis | None = None
    parts: Parts = field(default_factory=dict)
    of_mean: float = 1.0

    @property
    def variance(self) -> float:
        """Variance of the log of the level of one coordinate."""
        return sum(size**2 for size, _ in self.parts.values())

    @property
    def apart(self) -> float:
        """Mean square of how far logs of levels are from the mean of all coordinates."""
        return 0.0 if self.axis is None else (1.0 - 1.0 / self.axis.size) * self.variance

    @property
    def stray_of_apart(self) -> float:
        """Variance over draws of that mean square."""
        if self.axis is None:
            return 0.0
        n, excess = float(self.axis.size), sum(size**4 * kurtosis for size, kurtosis in self.parts.values())
        return (n - 1.0) ** 2 / n**3 * excess + 2.0 * (n - 1.0) / n**2 * self.variance**2

    @property
    def event(self) -> tuple[float, float]:
        """Share of draws in which levels differ, and how far logs are then from their mean: two values with these two moments."""
        square = self.apart**2
        share = square / (square + self.stray_of_apart) if square > 0.0 else 1.0
        return share, (self.apart / share) ** 0.5

    def times(self, power: float) -> Lots:
        """Of a function whose level goes with that power of the level."""
        parts = {cause: (power * size, kurtosis) for cause, (size, kurtosis) in self.parts.items()}
        return Lots(self.axis, parts, self.of_mean)

    def centred(self, removed: float) -> Lots:
        """Once the mean over all places, this share of the second moment, is gone."""
        power = (1.0 - removed * self.of_mean) / (1.0 - removed) if removed < 1.0 else 0.0
        return replace(self.times(power), of_mean=1.0)

    def renamed(self, names: Mapping[Axis, Axis]) -> Lots:
        """Of a tensor whose axes have other names."""
        return self if self.axis is None else Lots(names.get(self.axis, self.axis), self.parts, self.of_mean)


NO_LOTS = Lots()


def drawn(axis: Axis, variance: float, kurtosis: float) -> Lots:
    """Levels whose logs have this variance and excess kurtosis, of a cause of their own."""
    return Lots(axis, {object(): (variance**0.5, kurtosis)})


def together(terms: Sequence[tuple[Lots, float]]) -> Lots:
    """Of a level whose log is a sum of such with these factors, along the axis of which most is known; amplitudes add up."""
    most = max((lots for lots, _ in terms), key=lambda lots: lots.variance, default=NO_LOTS)
    if most.axis is None:
        return NO_LOTS
    found: dict[object, tuple[float, float]] = {}
    for lots, factor in terms:
        for cause, (size, kurtosis) in lots.parts.items() if lots.axis is most.axis else ():
            found[cause] = found.get(cause, (0.0, 0.0))[0] + factor * size, kurtosis
    return Lots(most.axis, _largest(found), most.of_mean)


def _largest(parts: Parts) -> Parts:
    """The largest; the rest as one."""
    if len(parts) <= MOST:
        return parts
    ordered = sorted(parts.items(), key=lambda item: -abs(item[1][0]))
    kept, rest = dict(ordered[:MOST]), [part for _, part in ordered[MOST:]]
    variance, excess = sum(size**2 for size, _ in rest), sum(size**4 * kurtosis for size, kurtosis in rest)
    return {**kept, object(): (variance**0.5, excess / variance**2 if variance > 0.0 else 0.0)}
