"""Mean and covariance of rows that come one part after another: one pass, float64, any order of merging."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.inputs.rows import Rows, subsets
from gainstage.inputs.tails import Tails
from gainstage.signal.quadrature import Array

# Parts of the data that are held against the others.
FOLDS = 4

# Entries of rows that are held at a time, in float64: 64 MB.
_AT_ONCE = 2**23


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and scatter ``sum (x - mean)(x - mean)^T`` of rows."""

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, rows: Array) -> Moments:
        """Of rows [count, columns]."""
        mean = rows.mean(axis=0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    @classmethod
    def none(cls, columns: int) -> Moments:
        """Of no rows."""
        return cls(0, np.zeros(columns), np.zeros((columns, columns)))

    def merged(self, other: Moments) -> Moments:
        """``S = S_a + S_b + (m_b - m_a)(m_b - m_a)^T n_a n_b / n`` (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return other if not self.count else self
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(step, step * (self.count * other.count / count))
        return Moments(count, self.mean + step * (other.count / count), scatter)

    def second(self, about: Array | float = 0.0) -> Array:
        """``E[(x - about)(x - about)^T]``."""
        off = self.mean - about
        return self.scatter / self.count + np.outer(off, off)


@dataclass(slots=True)
class Gathered:
    """What was gathered of a data set so far.

    ``mean``: over samples, in their shape. ``squares``: for each choice of the sample's dimensions that are kept apart, the mean
    over samples of the square of the average over the others. ``folds``: moments of the rows of every fourth sample.
    ``tails``: of all rows. ``places``: of rows that were averaged over the dimensions of places that are not kept apart.
    """

    shape: tuple[int, ...]
    rows: Rows
    samples: int = 0
    mean: Array = field(init=False)
    squares: dict[tuple[bool, ...], float] = field(default_factory=dict)
    folds: list[Moments] = field(init=False)
    tails: Tails = field(init=False)
    places: dict[tuple[bool, ...], Moments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start from nothing."""
        self.mean = np.zeros(self.shape)
        self.folds = [Moments.none(self.rows.columns)] * FOLDS
        self.tails = Tails.none(self.rows.columns)

    def add(self, samples: NDArray[np.float64]) -> None:
        """Take in samples [count, shape...], finite."""
        size = self.rows.of(torch.zeros(1, *self.shape)).numel()
        step = max(FOLDS, _AT_ONCE // size)
        for start in range(0, len(samples), step):
            part = samples[start : start + step]
            rows = self.rows.of(torch.from_numpy(part)).numpy()
            self._add(part, rows)

    def _add(self, samples: Array, rows: Array) -> None:
        before, count = self.samples, len(samples)
        share = count / (before + count)
        self.mean = self.mean + (samples.mean(axis=0) - self.mean) * share
        for kept in subsets(samples.ndim - 1):
            averaged = samples.mean(axis=_dropped(kept), keepdims=True)
            old = self.squares.get(kept, 0.0)
            self.squares[kept] = old + (float(np.square(averaged).mean()) - old) * share
        columns = rows.shape[-1]
        self.tails = self.tails.merged(Tails.of(rows.reshape(-1, columns)))
        for offset in range(FOLDS):
            fold = rows[offset::FOLDS].reshape(-1, columns)
            which = (before + offset) % FOLDS
            if len(fold):
                self.folds[which] = self.folds[which].merged(Moments.of(fold))
        for kept in subsets(rows.ndim - 2):
            if not all(kept):
                averaged = rows.mean(axis=_dropped(kept)).reshape(-1, columns)
                self.places[kept] = self.places.get(kept, Moments.none(columns)).merged(Moments.of(averaged))
        self.samples = before + count

    def merge(self, other: Gathered) -> None:
        """Take in what another process gathered."""
        if not other.samples:
            return
        share = other.samples / (self.samples + other.samples)
        self.mean = self.mean + (other.mean - self.mean) * share
        for kept, square in other.squares.items():
            old = self.squares.get(kept, 0.0)
            self.squares[kept] = old + (square - old) * share
        self.folds = [own.merged(theirs) for own, theirs in zip(self.folds, other.folds, strict=True)]
        self.tails = self.tails.merged(other.tails)
        for kept, moments in other.places.items():
            self.places[kept] = self.places.get(kept, Moments.none(self.rows.columns)).merged(moments)
        self.samples += other.samples


def _dropped(kept: tuple[bool, ...]) -> tuple[int, ...]:
    """Dimensions to average over; the first is that of the samples."""
    return tuple(dim for dim, keep in enumerate(kept, 1) if not keep)
