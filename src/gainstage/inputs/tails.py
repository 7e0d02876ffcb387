"""How many rows the variance of a column rests on: one pass, float64, any order of merging."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gainstage.signal.quadrature import Array


@dataclass(frozen=True, slots=True, eq=False)
class Tails:
    """Count and mean of rows, and the sums of ``(x - mean)^p`` of each column for p = 2, 3, 4."""

    count: int
    mean: Array
    squares: Array
    cubes: Array
    fourths: Array

    @classmethod
    def of(cls, rows: Array) -> Tails:
        """Of rows [count, columns]."""
        mean = rows.mean(axis=0)
        centred = rows - mean
        squared = centred * centred
        return cls(
            len(rows), mean, squared.sum(0), np.einsum("nc,nc->c", squared, centred), np.einsum("nc,nc->c", squared, squared)
        )

    @classmethod
    def none(cls, columns: int) -> Tails:
        """Of no rows."""
        return cls(0, *(np.zeros(columns) for _ in range(4)))

    def merged(self, other: Tails) -> Tails:
        """Sums about the common mean, by the binomial theorem: P. Pébay 2008 (SAND2008-6212)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return other if not self.count else self
        mean = self.mean + (other.mean - self.mean) * (other.count / count)
        moved = [part._about(mean) for part in (self, other)]
        return Tails(count, mean, *(own + theirs for own, theirs in zip(*moved, strict=True)))

    def _about(self, centre: Array) -> tuple[Array, Array, Array]:
        """Sums of powers about another centre."""
        off = self.mean - centre
        return (
            self.squares + self.count * off**2,
            self.cubes + 3.0 * off * self.squares + self.count * off**3,
            self.fourths + 4.0 * off * self.cubes + 6.0 * off**2 * self.squares + self.count * off**4,
        )

    @property
    def support(self) -> Array:
        """``m = n / (kurtosis - 1)``: n rows tell the variance of a column up to a relative variance of 1/m.

        It is n/2 for Gaussian columns, and k for one that is zero but for k of many rows. A column that does not vary has
        infinitely many.
        """
        squared = self.squares**2
        surplus = self.count * self.fourths - squared
        return np.divide(self.count * squared, surplus, out=np.full_like(squared, np.inf), where=surplus > 0.0)
