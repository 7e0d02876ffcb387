"""From the covariance of a first layer's rows to the matrix that its weights are drawn through.

With ``F Sigma F^T = 1`` and orthogonal rows q of length sqrt(r), weights ``w = F^T q / sqrt(r)`` have ``Cov(w) = Sigma^-1 / r``;
every pre-activation ``w.x`` has variance 1, and up to r of them are uncorrelated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gainstage.errors import InputError
from gainstage.inputs.moments import FOLDS
from gainstage.inputs.shrinkage import NONE, NOTHING, TRIED, Shrinkage
from gainstage.inputs.statistics import InputStatistics, value_of
from gainstage.signal import Value
from gainstage.signal.quadrature import Array

# Rows for each column above which a direction without variance is one that the data do not have, not one that was not seen yet.
_ENOUGH = 2

# Rows that the variance of a column is to rest on, where there are the square of that many; no covariance is taken from fewer.
_LEAST = 2 * FOLDS

# Deviations of columns may differ by their units: by this much more than eigenvalues of one covariance may.
_RELATIVE = 2.0**-20

_TIE = 1e-6  # of two columns that are equally far from those chosen, the first


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Whitening:
    """The matrix, and what was found on the way.

    ``matrix``: [rank, columns], its columns of mean square length 1. ``centre``: what a bias takes off the rows; None without
    one. ``optimism``: second moments over rows that were not seen, over those of the rows that were. ``shrinkage``: of
    eigenvalues in units of ``target``, each column's own variance or the mean of all. ``silent``: columns that do not vary.
    ``rare``: columns whose variance rests on too few rows. ``condition``: of what is inverted.
    """

    matrix: Array
    centre: Array | None
    optimism: float
    shrinkage: Shrinkage
    target: str
    silent: int
    rare: int
    condition: float

    @property
    def rank(self) -> int:
        """Directions that are left."""
        return len(self.matrix)

    def level(self, second: Array) -> float:
        """``E[(w.x)(w.x')]`` for weights of variance 1, over rows that were not seen, of ``E[x x'^T]`` over those that were."""
        return self.optimism * float(np.einsum("kc,cd,kd->", self.matrix, second, self.matrix, optimize=True))


def whitening_of(statistics: InputStatistics, *, is_centred: bool) -> Whitening:
    """``F = B^T C^(-1/2) D^-1`` up to scale, C of ``D^-1 Sigma D^-1`` by a shrinkage: D deviations, B the directions that C has.

    How the eigenvalues are shrunk (see the classes of ``shrinkage.py``), and whether D is each column's own deviation or that of
    all, is what makes each part of the data likeliest as Gaussian, given the others. To the mean of all columns at least one row
    is added, as a column may vary in rows that were not seen yet. Where every direction has variance F is a symmetric root, a
    smooth function of the statistics.

    A column whose variance rests on fewer than eight of many rows is hardly known: what was seen once may be of any size the
    next time, and as many outputs as read it would have that in common. To its variance that of the average column of its kind
    is added.

    Args:
        statistics: of the input.
        is_centred: whether a bias takes the mean off; without one the mean is one more direction, and second moments take the
            place of covariances.

    Raises:
        InputError: nothing varies.
    """
    whole = statistics.all_rows
    about = whole.mean if is_centred else 0.0
    deviation = np.sqrt(np.diag(whole.second(about)))
    kept = deviation > NOTHING**0.5 * max(float(deviation.max()), 1e-300) * _RELATIVE
    if not kept.any():
        raise InputError("inputs: nothing varies in the rows that the first layer reads")
    seen, *folds = (moments.second(about)[np.ix_(kept, kept)] for moments in (whole, *statistics.folds))
    tails, few = statistics.tails, min(_LEAST, whole.count / _LEAST)
    rare = np.zeros(len(seen), bool) if tails is None else tails.support[kept] < few
    excess = np.where(rare, np.mean(np.diag(seen), where=rare) if rare.any() else 0.0, 0.0)
    second = seen + np.diag(excess)
    fit = _best_fit(statistics, second, folds, np.diag(excess))
    values, root = fit.scaled.root(second, fit.shrinkage, whole.count)
    matrix = np.zeros((fit.scaled.rank, len(deviation)))
    matrix[:, kept] = root @ fit.scaled.matrix
    matrix *= np.sqrt(matrix.shape[1] / np.square(matrix).sum())
    level = float(np.einsum("kl,lm,mk->", root, fit.scaled.apply(seen), root, optimize=True)) / fit.scaled.rank
    # Squares about the mean of n rows have the mean (1 - 1/n) v over these rows, and (1 + 1/n) v over others.
    has_error = is_centred and statistics.samples is not None
    about_mean = (whole.count + 1.0) / (whole.count - 1.0) if has_error else 1.0
    return Whitening(
        matrix=matrix,
        centre=whole.mean if is_centred else None,
        optimism=fit.optimism(level, whole.count) * about_mean,
        shrinkage=fit.shrinkage,
        target=fit.scaled.unit,
        silent=int((~kept).sum()),
        rare=int(rare.sum()),
        condition=float(values.max() / values.min()),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Scaled:
    """Rows in units of some deviations, along the directions that they have: ``z = matrix x``."""

    matrix: Array
    unit: str  # what the identity stands for

    @classmethod
    def of(cls, second: Array, deviations: Array, unit: str, *, can_drop: bool) -> _Scaled:
        """Along the directions of these second moments."""
        basis = _basis(second / np.outer(deviations, deviations), can_drop=can_drop)
        return cls(basis.T / deviations, unit)

    @property
    def rank(self) -> int:
        return len(self.matrix)

    @property
    def log_volume(self) -> float:
        """Log of the volume that it gives to a unit of the directions; up to a number that hangs on these alone."""
        return 0.5 * float(np.linalg.slogdet(self.matrix @ self.matrix.T)[1])

    def apply(self, second: Array) -> Array:
        """Second moments of z."""
        return np.asarray(self.matrix @ second @ self.matrix.T)

    def root(self, second: Array, shrinkage: Shrinkage, count: int) -> tuple[Array, Array]:
        """Eigenvalues of the shrunk second moments of z over that many rows, and their inverse root."""
        values, vectors = np.linalg.eigh(self.apply(second))
        values = shrinkage.applied(values, count)
        return values, (vectors / np.sqrt(values)) @ vectors.T


def _basis(correlations: Array, *, can_drop: bool) -> Array:
    """[columns, rank]: orthonormal, of the directions that have variance.

    Any basis would do. This one is the polar factor of the projections of some columns, so that it does not hang on the rounding
    of eigenvectors; where every direction has variance it is the identity.
    """
    size = len(correlations)
    values, vectors = np.linalg.eigh(correlations)
    present = values > NOTHING * values[-1]
    if present.all() or not can_drop:
        return np.eye(size)
    projection = vectors[:, present] @ vectors[:, present].T
    chosen: list[int] = []
    rest = projection.copy()
    for _ in range(int(present.sum())):
        left = np.diag(rest)
        pick = int(np.argmax(left > left.max() - _TIE))
        chosen.append(pick)
        rest -= np.outer(rest[:, pick], rest[pick]) / rest[pick, pick]
    chosen.sort()
    inner, turn = np.linalg.eigh(projection[np.ix_(chosen, chosen)])
    return np.asarray(projection[:, chosen] @ (turn / np.sqrt(inner)) @ turn.T)


@dataclass(frozen=True, slots=True)
class _Fit:
    """A way to shrink, its score, and ``tr(S^-1 T) / r`` over the rows that S is of and over those of another part."""

    scaled: _Scaled
    shrinkage: Shrinkage
    score: float
    seen: float
    unseen: float

    def optimism(self, seen: float, count: int) -> float:
        """``1 / (1 - c / n)``: second moments over new rows, over those of the n rows that S is of, added ones included.

        Taking a row out of S multiplies its own ``u = x^T S^-1 x`` by ``1 / (1 - u / n)``, so c goes as the mean of u. The
        parts show it for fewer rows.

        Args:
            seen: for S of all rows.
            count: of these.
        """
        fewer = 1.0 - self.shrinkage.seen(count) / FOLDS
        return 1.0 / (1.0 - (1.0 - self.seen / self.unseen) * fewer * seen / self.seen)


def _best_fit(statistics: InputStatistics, second: Array, folds: list[Array], excess: Array) -> _Fit:
    """In units of each column's deviation, or of one for all: under which each part is likelier given the others."""
    rows = statistics.all_rows.count
    can_drop = statistics.samples is None or rows >= _ENOUGH * len(second)
    own = np.sqrt(np.diag(second))
    units = _Scaled.of(second, own, "diag(Sigma)", can_drop=can_drop)
    if statistics.samples is None:
        return _Fit(units, NONE, 0.0, 1.0, 1.0)
    mean = np.full_like(own, float(np.sqrt(np.mean(own**2))))
    common = _Scaled.of(second, mean, "tr(Sigma) / d", can_drop=can_drop)
    parts = [(fold.count, moments) for fold, moments in zip(statistics.folds, folds, strict=True)]
    tried = [_fit(units, parts, excess, TRIED)]
    if common.rank == units.rank:
        tried.append(_fit(common, parts, excess, TRIED[1:]))
    return min(tried, key=lambda fit: fit.score)


def _fit(scaled: _Scaled, parts: list[tuple[int, Array]], excess: Array, tried: Sequence[Shrinkage]) -> _Fit:
    """The way under which each part is likeliest given the others, S: the least ``log det S + tr(S^-1 T)``."""
    scores, within, across = (np.zeros(len(tried)) for _ in range(3))
    rows, added = sum(count for count, _ in parts), scaled.apply(excess)
    applied = [(count / rows, scaled.apply(part)) for count, part in parts]
    total = sum(share * part for share, part in applied)
    for own, other in applied:
        rest = (total - own * other) / (1.0 - own)
        values, vectors = np.linalg.eigh(rest + added)
        seen, unseen = (np.einsum("ck,cd,dk->k", vectors, part, vectors, optimize=True) for part in (rest, other))
        for index, shrinkage in enumerate(tried):
            shrunk = shrinkage.applied(values, round((1.0 - own) * rows))
            if shrunk.min() <= NOTHING * shrunk.max():
                scores[index] = np.inf
                continue
            level = own * float((unseen / shrunk).sum())
            scores[index] += own * float(np.log(shrunk).sum()) + level
            within[index] += own * float((seen / shrunk).sum())
            across[index] += level
    best = int(np.argmin(scores))
    score = float(scores[best]) - 2.0 * scaled.log_volume
    return _Fit(scaled, tried[best], score, float(within[best]) / scaled.rank, float(across[best]) / scaled.rank)


def output_value(
    statistics: InputStatistics, whitening: Whitening, variance: float, batch: int, outputs: int, *, is_map: bool
) -> Value:
    """What the first layer returns, ``[batch, outputs, places...]`` for maps and ``[batch, places..., outputs]`` else.

    Weights have this variance, entry by entry on average; different outputs have nothing in common.
    """
    centre = 0.0 if whitening.centre is None else whitening.centre
    means = statistics.rows.of(torch.from_numpy(statistics.mean.copy())[None])[0].numpy() - centre
    places = means.shape[:-1]
    table = np.zeros((2,) * (2 + len(places)))
    for kept in np.ndindex(*(2,) * len(places)):
        moments = statistics.all_rows if all(kept) else statistics.places[tuple(map(bool, kept))]
        averaged = means.mean(axis=tuple(dim for dim, keep in enumerate(kept) if not keep)).reshape(-1, means.shape[-1])
        table[(1, 1, *kept)] = variance * whitening.level(moments.second(centre))
        table[(0, 1, *kept)] = variance * whitening.level(averaged.T @ averaged / len(averaged))
    if not is_map:
        table = np.moveaxis(table, 1, -1)
    shape = (batch, outputs, *places) if is_map else (batch, *places, outputs)
    count = np.inf if statistics.samples is None else statistics.samples
    sizes = (count, np.inf, *places) if is_map else (count, *places, np.inf)
    return value_of(table, sizes, shape, 0.0)
