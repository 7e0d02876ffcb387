"""The abstract value of a tensor at initialization: second moments by what two entries share.

For a tensor x with axes A the table is, for each subset S of the axes,

    K[S] = E[x_i x_j],   i and j equal on the axes in S and different on all others,

over weights, inputs and positions. It is stored as an array with one dimension of length 2 for each axis, in the order of the
axes: index 1 means "same coordinate", index 0 "another one". ``K[1, 1, ..., 1]`` is the second moment.

Beside the table a value knows its marginal distribution, as a function g of a standard normal variable (the *latent*):
``x = g(z)``, with the correlations of z between two entries. Gaussian tensors have ``g(z) = mean + std z``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.axes import Axis, Dim, axes_of, new_dims, shape_of
from gainstage.signal.copies import replace
from gainstage.signal.gram import Gram
from gainstage.signal.marginal import Marginal, gaussian_marginal
from gainstage.signal.neighbours import Neighbours, far_of, write
from gainstage.signal.overlap import NONE, Overlap, Tilt
from gainstage.signal.quadrature import (
    Array,
    cumulative,
    evaluate_series,
    flattened,
    invert_series,
)
from gainstage.signal.recurrent import Unrolled
from gainstage.signal.shares import Share
from gainstage.signal.stray import Stray
from gainstage.signal.traits import Added, Drawn, Edges, Given, Joined, Largest, Lean, Logits, Origin, Statistic, Sum, Uneven

if TYPE_CHECKING:
    from gainstage.signal.filtered import Filtered


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Value:
    """What is known of one tensor. Immutable; made by the functions of this package only.

    ``source`` and ``amplitude``: the tensor's linear part in an earlier tensor (often itself): its component in each subspace of
    the axes, see :func:`gainstage.signal.pairing.cross_table`. ``stray``: what the level of one draw strays by, beyond what the
    table shows. ``overlap``: how the cosine between what two places hold strays. ``lineage``: bit mask of the
    parameters it depends on. ``levels``: where some coordinates are louder than others by design (the query, key and value rows
    of one projection; the parts of a concatenation), the root mean square of each over that of the whole, with one dimension for
    each axis, of size 1 where it does not vary. ``lean``: how each of those coordinates leans on the average over all, where this
    is not in proportion to its level. ``edges``: where on a map lies what all samples share at a place. ``joined``: the tensors
    that were laid one after the other to make this one. ``near``: what
    places of a map that lie near each other share beyond the table's average. ``gram``: how the table's average over two
    positions of a sequence is spread over pairs of them. ``prior``: the known part of logits, apart from the table: minus
    infinity where a mask excludes. ``fields``: draws of what was added to it, [draws, query, key]; ``drawn``: of the tensor
    itself, by few random weights that all its entries share. ``tilt``: of the weights that a softmax makes, what they lean by.
    ``read``: the tensors (latent or source, axes) that weights were multiplied with to make this one, where known. ``logits``,
    ``largest``: what the tensor is the softmax or the maximum of. ``added``: a known tensor that the table includes. ``given``:
    what a gradient knows of the tensor that it belongs to. ``uneven``: how the variances of channels differ. ``flatness``:
    kurtosis of what the entries of a vector that was divided by its norm have in common, and of products of two such vectors
    along either of their axes. ``against``: of a gradient g, how far it is turned away from what its tensor x varies by: in one
    draw of the weights two channels have ``E[g_c g_d] = -against E[g^2] rho_cd``, rho their correlation in x over places.
    ``steady``: of the variance of the squared norms of vectors, the share that is missing: all of it where each was divided by
    its own norm. ``across``: of a gradient's part along its own tensor, the share that is missing, as a norm takes it.
    ``origin``, ``sum``: how it came about, and the terms of a sum, in networks that use weights more than once. ``unrolled``: the
    steps of a recurrent cell that it is the state of. ``filtered``: the linear maps along axes that made it of another tensor.
    """

    dims: tuple[Dim, ...]
    mean: float
    table: Array
    marginal: Marginal
    rho: Array | None = None
    source: object = None
    amplitude: Array | None = None
    statistic: Statistic | None = None
    prior: torch.Tensor | None = None
    fields: torch.Tensor | None = None
    drawn: Drawn | None = None
    lineage: int = 0
    stray: Stray = field(default_factory=Stray)
    overlap: Overlap = NONE
    constant: torch.Tensor | None = None
    is_weight: bool = False
    levels: Array | None = None
    lean: Lean | None = None
    edges: Edges | None = None
    joined: Joined | None = None
    near: Neighbours | None = None
    gram: Gram | None = None
    tilt: Tilt | None = None
    read: frozenset[tuple[object, frozenset[Axis]]] = frozenset()
    logits: Logits | None = None
    largest: Largest | None = None
    added: Added | None = None
    given: Given | None = None
    uneven: Uneven | None = None
    flatness: float = 3.0
    against: float = 0.0
    steady: Share | None = None
    across: Share | None = None
    origin: Origin | None = None
    sum: Sum | None = None
    unrolled: Unrolled | None = None
    filtered: Filtered | None = None
    axes: tuple[Axis, ...] = field(init=False)  # of the table, in order
    # Correlations of the latent and of squares, and the fluctuation, once asked for: with what they were found from.
    _latent: tuple[tuple[object, ...], Array] | None = field(init=False, repr=False, default=None)
    _squares: tuple[tuple[object, ...], Array] | None = field(init=False, repr=False, default=None)
    _fluctuation: tuple[tuple[object, ...], float] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        """List the axes, and check that the table has one dimension for each."""
        object.__setattr__(self, "axes", axes_of(self.dims))
        assert self.table.shape == (2,) * len(self.axes), (self.table.shape, self.dims)
        assert self.levels is None or self.levels.ndim == self.table.ndim, (self.levels, self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return shape_of(self.dims)

    @property
    def second_moment(self) -> float:
        """``E[x^2]``."""
        return float(self.table[(1,) * self.table.ndim])

    @property
    def variance(self) -> float:
        """``E[x^2] - E[x]^2``, never negative."""
        return max(self.second_moment - self.mean**2, 0.0)

    @property
    def covariance(self) -> Array:
        """Table less the square of the mean."""
        return self.table - self.mean**2

    @property
    def names(self) -> frozenset[object]:
        """What it is known by to all that is made of it: its latent, and, as a norm called twice on it has two, its source."""
        return frozenset(name for name in (self.marginal.latent, self.source) if name is not None)

    def steps_of_cell(self) -> Unrolled | None:
        """The steps of a recurrent cell that it is the hidden or cell state of, if nothing was done to it since."""
        return self.unrolled if self.unrolled is not None and self.unrolled.table is self.table else None

    def correlation(self) -> Array:
        """Correlations of the latent between two entries, by what they share."""
        if self.rho is not None:
            return self.rho
        if self._latent is None or not self._is_of(self._latent[0]):
            rho = invert_series(self.marginal.series, self.covariance)
            rho[(1,) * rho.ndim] = 1.0
            rho.flags.writeable = False
            object.__setattr__(self, "_latent", (self._distribution(), rho))
        assert self._latent is not None
        return self._latent[1]

    def square_covariance(self) -> Array:
        """``Cov(x_i^2, x_j^2) / E[x^2]^2``, by what two entries share."""
        if self._squares is None or not self._is_of(self._squares[0]):
            series = self.marginal.square_series
            found = np.zeros_like(self.table) if series is None else evaluate_series(series, self.correlation())
            found.flags.writeable = False
            object.__setattr__(self, "_squares", (self._distribution(), found))
        assert self._squares is not None
        return self._squares[1]

    def _distribution(self) -> tuple[object, ...]:
        return self.table, self.rho, self.marginal, self.mean

    def _is_of(self, distribution: tuple[object, ...]) -> bool:
        """Whether that is the distribution still: copies with changes take along what was found."""
        table, rho, marginal, mean = distribution
        return table is self.table and rho is self.rho and marginal is self.marginal and mean == self.mean

    @property
    def log_variance(self) -> float:
        """Variance over draws of the log of the level, beyond what the table shows."""
        return self.stray.variance

    def average(self, table: Array) -> float:
        """Average over all pairs of entries of what is given by what they share."""
        for axis in self.axes:
            table = table[0] + (table[1] - table[0]) / axis.size
        return float(table)

    def fluctuation(self) -> float:
        """Variance of the mean of x^2 over all entries, relative to its square: how far one draw's level strays.

        ``average over pairs (i, j) of Cov(x_i^2, x_j^2) / E[x^2]^2``: 2/n for n independent Gaussian entries, 5/n after ReLU;
        and what channels of different shapes add, and places of a map that lie near each other.
        """
        of = (*self._distribution(), self.dims, self.uneven, self.near, self.levels)
        if self._fluctuation is None or any(one is not other for one, other in zip(self._fluctuation[0], of, strict=True)):
            uneven = 0.0 if self.uneven is None else self.uneven.stray
            found = max(self.average(self.square_covariance()), 0.0) + uneven + self._near_squares()
            object.__setattr__(self, "_fluctuation", (of, found))
        assert self._fluctuation is not None
        return self._fluctuation[1]

    def _near_squares(self) -> float:
        """What squares of what near places share are on average above the square of its average, which the table has."""
        near, series = self.neighbours(), self.marginal.square_series
        if near is None or series is None or self.variance <= 0.0:
            return 0.0
        own, far = self.apart(near)
        rest = float(np.prod([axis.size for axis in self.axes if axis not in near.axes]))
        return float(series[2]) * ((own - far) / self.variance) ** 2 * near.variance() / rest

    def leaning(self) -> Array:
        """``E[x_i mean(x)] / E[mean(x)^2]`` of each coordinate; its mean is 1."""
        if self.levels is None:
            return np.ones((1,) * self.table.ndim)
        lean = self.valid_lean()
        return np.asarray(self.levels / self.levels.mean()) if lean is None else lean.profile

    def valid_lean(self) -> Lean | None:
        """How coordinates lean on the average over all, where it was noted for these levels."""
        return self.lean if self.lean is not None and self.lean.levels is self.levels else None

    def unevenness(self) -> Uneven | None:
        """How the variances of channels differ, if their axes are still there."""
        return self.uneven if self.uneven is not None and all(axis in self.axes for axis in self.uneven.axes) else None

    def valid_draws(self) -> torch.Tensor | None:
        """Draws of the tensor, if nothing was done to it since they were made."""
        return self.drawn.draws if self.drawn is not None and self.drawn.table is self.table else None

    def neighbours(self) -> Neighbours | None:
        """What near places share, if the axes of the map are still there."""
        axes = self.axes
        return self.near if self.near is not None and all(axis in axes for axis in self.near.axes) else None

    def near_without_common(self) -> Neighbours | None:
        """What near places share apart from what all places have in common."""
        lean, axes = self.valid_lean(), self.axes
        near = self.near if lean is None else lean.near
        return near if near is not None and all(axis in axes for axis in near.axes) else None

    def apart(self, near: Neighbours) -> tuple[float, float]:
        """Second moments of an entry, and of two far apart on the map, at equal levels."""
        positions = [self.axes.index(axis) for axis in near.axes]
        return far_of(near, levels.evened(self.table, self.levels, positions), self.axes)

    def lagged(self, axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Array, float]:
        """Second moments of entries that differ by each lag along some axes only, and of such far apart; at equal levels."""
        near = self.neighbours() or Neighbours((), np.array(1.0))
        for axis in axes:
            near = near.with_axis(axis)
        own, far = self.apart(near)
        return far + (own - far) * near.over(tuple(axes), shape), far

    def with_neighbours(self, near: Neighbours | None, own: float, far: float) -> Value:
        """The same with what near places share, and with the averages that follow in the table; moments at equal levels."""
        if near is None:
            return self
        sizes = [(self.axes.index(axis), axis.size) for axis in near.axes]
        factors = [levels.pair_factor(levels.over(self.levels, position, size)) for position, size in sizes]
        return replace(self, near=near, table=write(near, self.table, self.axes, (own, far), factors))

    def centres(self) -> Array:
        """Values of a statistic without its fluctuation, one for each coordinate along which they differ."""
        assert self.statistic is not None
        return self.statistic.centre * (np.ones((1,) * self.table.ndim) if self.levels is None else self.levels)


def gaussian(dims: tuple[Dim, ...], mean: float, table: Array, profile: Array | None = None, **extra: object) -> Value:
    """Gaussian tensor with the given mean, table of raw second moments, and profile of levels."""
    variance = max(float(table[(1,) * table.ndim]) - mean**2, 0.0)
    rho = (table - mean**2) / variance if variance > 0.0 else np.zeros_like(table)
    rho = np.array(np.clip(rho, -1.0, 1.0))
    rho[(1,) * rho.ndim] = 1.0
    marginal = gaussian_marginal(mean, variance**0.5, profile)
    return Value(dims=dims, mean=mean, table=table, marginal=marginal, rho=rho, source=object(), levels=profile, **extra)  # type: ignore[arg-type]


def independent(shape: tuple[int, ...], mean: float, std: float, *, kurtosis: float = 3.0, **extra: object) -> Value:
    """Tensor of independent entries; Gaussian, or between that and a uniform distribution by their kurtosis."""
    dims = new_dims(shape)
    table = np.full((2,) * len(axes_of(dims)), mean**2)
    table[(1,) * table.ndim] += std**2
    made = gaussian(dims, mean, table, None, **extra)
    if kurtosis >= 3.0 or std <= 0.0:
        return made
    return replace(made, marginal=Marginal(made.marginal.latent, lambda: mean + std * flattened(kurtosis)), rho=None)


def coins(shape: tuple[int, ...], p: float) -> Value:
    """Tensor of independent entries that are 1 with probability p, else 0."""
    x = independent(shape, p, (p * (1.0 - p)) ** 0.5)
    return replace(x, marginal=Marginal(object(), lambda: np.asarray(cumulative() > 1.0 - p, dtype=np.float64)))
