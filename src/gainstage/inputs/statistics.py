"""What a data set says of a model's input: the table of the input, and the moments of what a first layer multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch

from gainstage.errors import InputError, NonFiniteError
from gainstage.inputs.moments import FOLDS, Gathered, Moments
from gainstage.inputs.rows import Features, Rows
from gainstage.inputs.tails import Tails
from gainstage.signal import Value, gaussian
from gainstage.signal.axes import axes_of, new_dims
from gainstage.signal.quadrature import Array

_ASYMMETRY = 1e-6  # relative to the largest entry: of a covariance that was computed in single precision


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class InputStatistics:
    """Mean, second moments and covariance of one floating-point input over a data set.

    Made by :func:`gainstage.measure_inputs`, or from a covariance that is known. All expectations are over samples and places.

    Args:
        shape: of one sample.
        samples: how many were seen; None for moments that are known exactly.
        mean: over samples, in their shape.
        squares: choice of the sample's dimensions -> mean square of the averages over the others.
        rows: how a sample becomes the rows that a first layer multiplies.
        folds: moments of the rows of every fourth sample, beginning with the first, second, third and fourth.
        tails: of the rows; None for moments that are known exactly.
        places: moments of rows that were averaged over places.
    """

    shape: tuple[int, ...]
    samples: int | None
    mean: Array
    squares: Mapping[tuple[bool, ...], float]
    rows: Rows
    folds: tuple[Moments, ...]
    tails: Tails | None
    places: Mapping[tuple[bool, ...], Moments]

    @classmethod
    def of(cls, gathered: Gathered) -> InputStatistics:
        """Of all that was gathered.

        Raises:
            InputError: fewer than eight samples, as parts of the data are held against the others.
        """
        if gathered.samples < 2 * FOLDS:
            raise InputError(
                f"{gathered.samples} samples are too few for a covariance; give at least {2 * FOLDS}, best many times the columns"
            )
        return cls(
            shape=gathered.shape,
            samples=gathered.samples,
            mean=gathered.mean,
            squares=dict(gathered.squares),
            rows=gathered.rows,
            folds=tuple(gathered.folds),
            tails=gathered.tails,
            places=dict(gathered.places),
        )

    @classmethod
    def from_covariance(cls, covariance: Any, mean: Any = 0.0) -> InputStatistics:
        """Of features whose covariance is known.

        Args:
            covariance: [features, features], symmetric, no negative eigenvalues.
            mean: [features], or one number.

        Raises:
            NonFiniteError: NaN or infinity.
            InputError: another shape, not symmetric, or with a negative eigenvalue.

        Example::

            stats = gs.InputStatistics.from_covariance(torch.cov(x.T), x.mean(0))
        """
        matrix = np.asarray(torch.as_tensor(covariance).detach().cpu(), np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
            raise InputError(f"a covariance is a square matrix, not of shape {list(matrix.shape)}")
        size = len(matrix)
        centre = np.asarray(torch.as_tensor(mean).detach().cpu(), np.float64)
        if centre.shape not in {(), (size,)}:
            raise InputError(f"the mean has shape {list(centre.shape)}, the covariance is for {size} features")
        if not (np.isfinite(matrix).all() and np.isfinite(centre).all()):
            raise NonFiniteError("NaN or infinity in a covariance or a mean")
        centre, largest = np.broadcast_to(centre, (size,)), float(np.abs(matrix).max())
        if float(np.abs(matrix - matrix.T).max()) > _ASYMMETRY * largest:
            raise InputError("a covariance is symmetric; this matrix is not")
        lowest = float(np.linalg.eigvalsh((matrix + matrix.T) / 2.0)[0])
        if lowest < -_ASYMMETRY * largest:
            raise InputError(f"a covariance has no negative eigenvalue; this matrix has {lowest:.3g}")
        known = Moments(1, centre, (matrix + matrix.T) / 2.0)
        second = known.second()
        squares: dict[tuple[bool, ...], float] = {(True,): float(np.trace(second)) / size, (False,): float(second.mean())}
        return cls(
            shape=(size,), samples=None, mean=centre, squares=squares, rows=Features(size), folds=(known,), tails=None, places={}
        )

    @property
    def second_moment(self) -> float:
        """``E[x^2]`` of an entry."""
        return self.squares[(True,) * len(self.shape)]

    @property
    def all_rows(self) -> Moments:
        """Moments of all rows."""
        return reduce(Moments.merged, self.folds)

    @property
    def covariance(self) -> Array:
        """[columns, columns]: of the rows."""
        return self.all_rows.second(self.all_rows.mean)

    def value(self, shape: tuple[int, ...]) -> Value:
        """The input as the solver sees it: [batch, shape...].

        Raises:
            InputError: the model is given samples of another shape.
        """
        if shape[1:] != self.shape:
            raise InputError(
                f"inputs: samples of shape {list(self.shape)} were measured, the example given has {list(shape[1:])} behind its "
                "batch dimension. Give an example batch as the data set yields it."
            )
        table = np.empty((2,) * len(shape))
        for kept, square in self.squares.items():
            table[(1, *map(int, kept))] = square
            averaged = self.mean.mean(axis=tuple(dim for dim, keep in enumerate(kept) if not keep), keepdims=True)
            table[(0, *map(int, kept))] = float(np.square(averaged).mean())
        return value_of(table, self.sizes(self.shape), shape, float(self.mean.mean()))

    def sizes(self, places: tuple[int, ...]) -> tuple[float, ...]:
        """How many samples there are, and how many of everything else."""
        return (np.inf if self.samples is None else self.samples, *places)

    def __str__(self) -> str:
        """One line."""
        count = "moments that are known" if self.samples is None else f"{self.samples:,} samples"
        return f"{count} of shape {list(self.shape)}, E[x^2] = {self.second_moment:.4g}; rows of {self.rows}"

    __repr__ = __str__


def value_of(averaged: Array, sizes: tuple[float, ...], shape: tuple[int, ...], mean: float) -> Value:
    """Gaussian tensor of a table in which index 0 of a dimension stands for the average over all pairs along it."""
    table = averaged
    for dim, size in enumerate(sizes):
        if size > 1:
            same, mixed = np.take(table, 1, axis=dim), np.take(table, 0, axis=dim)
            other = mixed if np.isinf(size) else mixed + (mixed - same) / (size - 1)
            table = np.stack([other, same], axis=dim)
    dims = new_dims(shape)
    for dim in reversed([dim for dim, axes in enumerate(dims) if not axes]):
        table = np.take(table, 1, axis=dim)
    assert table.ndim == len(axes_of(dims))
    return gaussian(dims, mean, table)


@dataclass(frozen=True, slots=True, eq=False)
class TokenStatistics:
    """How often each token stands in a data set."""

    counts: torch.Tensor

    @property
    def collision(self) -> float:
        """``sum p_t^2``: the probability that two places hold the same token."""
        shares = self.counts.double() / self.counts.sum()
        return float(shares.square().sum())

    def drawn(self, example: torch.Tensor) -> torch.Tensor:
        """Tokens in the shape of an example, in proportion to their frequencies; always the same for one shape."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.multinomial(self.counts.double(), max(1, example.numel()), replacement=True, generator=generator)
        return tokens[: example.numel()].reshape(example.shape).to(example.dtype)

    def __str__(self) -> str:
        """One line."""
        seen, known = int((self.counts > 0).sum()), len(self.counts)
        return f"{int(self.counts.sum()):,} tokens, {seen:,} of {known:,} different ones, two alike with {self.collision:.3g}"

    __repr__ = __str__
