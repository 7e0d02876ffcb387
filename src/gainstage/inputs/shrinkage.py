"""Eigenvalues of the second moments of n rows, and where those of the population are expected."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gainstage.signal.quadrature import Array

# Of eigenvalues: below this share of the largest they are what rounding leaves of a direction that is not there.
NOTHING = 2.0**-43

_EDGE = math.sqrt(5.0)  # of a parabola with variance 1


@dataclass(frozen=True, slots=True)
class Added:
    """``(n l + k) / (n + k)``: as if k rows more had been seen, that vary by 1 in every direction (O. Ledoit & M. Wolf 2004)."""

    rows: float

    def said(self, target: str) -> str | None:
        """In words, of what varies by 1; None of none."""
        if self.rows == 0.0:
            return None
        return f"Sigma <- {target}" if math.isinf(self.rows) else f"Sigma has {self.rows:g} rows more, which vary as {target}"

    def seen(self, count: int) -> float:
        """Share that the rows which were seen have in all."""
        return count / (count + self.rows)

    def applied(self, values: Array, count: int) -> Array:
        """To eigenvalues in rising order, of that many rows."""
        seen = self.seen(count)
        return seen * np.maximum(values, 0.0) + (1.0 - seen)


@dataclass(frozen=True, slots=True)
class Moved:
    """``l / ((pi c l f(l))^2 + (1 - c - pi c l H(l))^2)``, ``c = d / n``: each by those near to it, which repel each other.

    f is the density of the d eigenvalues, H its Hilbert transform, both smoothed by parabolas of deviation ``l n^(-1/3)``:
    O. Ledoit & M. Wolf 2020 (Annals of Statistics 48), section 4. It is ``v^T Sigma v``, v the eigenvectors that the rows have,
    in the limit of large d and n; assumed are independent rows with light tails, and more of them than columns.
    """

    def seen(self, count: int) -> float:  # noqa: ARG002  (as of the other)
        """All."""
        return 1.0

    def said(self, target: str) -> str:
        """In words, of what varies by 1."""
        return f"eigenvalues of Sigma in units of {target}, each where the population's is expected"

    def applied(self, values: Array, count: int) -> Array:
        """To eigenvalues in rising order, of that many rows; they are left as they are where a direction is missing."""
        if values[0] <= NOTHING * values[-1] or count <= len(values):
            return values
        width = values * count ** (-1.0 / 3.0)
        z = (values[:, None] - values) / width
        parabola = 0.75 / _EDGE * (1.0 - z * z / 5.0)
        near = np.abs(_EDGE - np.abs(z)) < 1e-12  # of the edge, where the parabola is zero and the logarithm is not finite
        ratio = np.where(near, 1.0, np.abs((_EDGE - z) / np.where(near, 1.0, _EDGE + z)))
        density = np.mean(np.maximum(parabola, 0.0) / width, axis=1)
        transform = np.mean((-0.3 * z + parabola * np.log(ratio)) / (math.pi * width), axis=1)
        c = len(values) / count
        moved = values / ((math.pi * c * values * density) ** 2 + (1.0 - c - math.pi * c * values * transform) ** 2)
        return np.asarray(moved)


Shrinkage = Added | Moved

# Those that are tried, none first.
NONE = Added(0.0)
TRIED: tuple[Shrinkage, ...] = (NONE, Moved(), *(Added(2.0**step) for step in range(21)), Added(math.inf))
