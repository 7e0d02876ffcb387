"""From the covariance of a first layer's rows to the matrix that its weights are drawn through.

With ``F Sigma F^T = 1`` and orthogonal rows q of length sqrt(r), weights ``w = F^T q / sqrt(r)`` have ``Cov(w) = Sigma^-1 / r``;
every pre-activation ``w.x`` has variance 1, and up to r of them are uncorrelated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gainstage.errors import InputError
from gainstage.inputs.statistics import InputStatistics, value_of
from gainstage.signal import Value
from gainstage.signal.quadrature import Array

# Of a correlation matrix: eigenvalues below this share of the largest are what rounding leaves of a direction that is not there.
_NOTHING = 2.0**-43

# Rows for each column above which a direction without variance is one that the data do not have, not one that was not seen yet.
_ENOUGH = 2

# Shares of the identity that are tried: none, and half decades.
_SHARES = (0.0, *(10.0 ** (step / 2.0) for step in range(-16, 0)), 1.0)

# Deviations of columns may differ by their units: by this much more than eigenvalues of one covariance may.
_RELATIVE = 2.0**-20

_TIE = 1e-6  # of two columns that are equally far from those chosen, the first


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Whitening:
    """The matrix, and what was found on the way.

    ``matrix``: [rank, columns], its columns of mean square length 1. ``centre``: what a bias takes off the rows; None without
    one. ``optimism``: second moments over rows that were not seen, over those of the rows that were. ``share``: of the target,
    each column's own variance or the mean of all. ``silent``: columns that do not vary. ``condition``: of what is inverted.
    """

    matrix: Array
    centre: Array | None
    optimism: float
    share: float
    target: str
    silent: int
    condition: float

    @property
    def rank(self) -> int:
        """Directions that are left."""
        return len(self.matrix)

    def level(self, second: Array) -> float:
        """``E[(w.x)(w.x')]`` for weights of variance 1, over rows that were not seen, of ``E[x x'^T]`` over those that were."""
        return self.optimism * float(np.einsum("kc,cd,kd->", self.matrix, second, self.matrix, optimize=True))


def whitening_of(statistics: InputStatistics, *, is_centred: bool) -> Whitening:
    """``F = B^T ((1 - a) C + a)^(-1/2) D^-1`` up to scale, ``C = D^-1 Sigma D^-1``: D deviations, B the directions that C has.

    The share a of the identity, and whether D is each column's own deviation or that of all, are those under which each part of
    the data is likeliest as Gaussian, given the others: shrinkage to the diagonal or to the identity (O. Ledoit & M. Wolf 2004,
    section 2) as far as the data ask for it. Where every direction has variance F is a symmetric root, a smooth function of the
    statistics.

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
    kept = deviation > _NOTHING**0.5 * max(float(deviation.max()), 1e-300) * _RELATIVE
    if not kept.any():
        raise InputError("inputs: nothing varies in the rows that the first layer reads")
    second, *folds = (moments.second(about)[np.ix_(kept, kept)] for moments in (whole, *statistics.folds))
    counts = [fold.count for fold in statistics.folds]
    can_drop = statistics.samples is None or whole.count >= _ENOUGH * len(second)
    own = deviation[kept]
    found = units = _Scaled.of(second, own, can_drop=can_drop)
    share, unseen = 0.0, 1.0
    if statistics.samples is not None:
        common = _Scaled.of(second, np.full_like(own, float(np.sqrt(np.mean(own**2)))), can_drop=can_drop)
        tried = [(*_shrinkage(scaled, folds, counts), scaled) for scaled in (units, common) if scaled.rank == units.rank]
        _, share, unseen, found = min(tried, key=lambda each: each[0])
    values, root = found.root(second, share)
    matrix = np.zeros((found.rank, len(deviation)))
    matrix[:, kept] = root @ found.matrix
    matrix *= np.sqrt(matrix.shape[1] / np.square(matrix).sum())
    return Whitening(
        matrix=matrix,
        centre=whole.mean if is_centred else None,
        optimism=unseen * found.rank / float(np.einsum("kl,lm,mk->", root, found.apply(second), root, optimize=True)),
        share=share,
        target="diag(Sigma)" if found is units else "tr(Sigma) / d",
        silent=int((~kept).sum()),
        condition=float(values[-1] / values[0]),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Scaled:
    """Rows in units of some deviations, along the directions that they have: ``z = matrix x``."""

    matrix: Array

    @classmethod
    def of(cls, second: Array, deviations: Array, *, can_drop: bool) -> _Scaled:
        """Along the directions of these second moments."""
        basis = _basis(second / np.outer(deviations, deviations), can_drop=can_drop)
        return cls(basis.T / deviations)

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

    def root(self, second: Array, share: float) -> tuple[Array, Array]:
        """Eigenvalues of the shrunk second moments of z, and their inverse root."""
        values, vectors = np.linalg.eigh((1.0 - share) * self.apply(second) + share * np.eye(self.rank))
        return values, (vectors / np.sqrt(values)) @ vectors.T


def _basis(correlations: Array, *, can_drop: bool) -> Array:
    """[columns, rank]: orthonormal, of the directions that have variance.

    Any basis would do. This one is the polar factor of the projections of some columns, so that it does not hang on the rounding
    of eigenvectors; where every direction has variance it is the identity.
    """
    size = len(correlations)
    values, vectors = np.linalg.eigh(correlations)
    present = values > _NOTHING * values[-1]
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


def _shrinkage(scaled: _Scaled, folds: list[Array], counts: list[int]) -> tuple[float, float, float]:
    """The best score, its share of the target, and ``tr(S^-1 T) / r`` for rows that were not seen.

    Each part is scored under the others: ``log det S + tr(S^-1 T)``. A matrix from n rows makes the second moments of others
    larger by a factor f with ``1 - 1/f = (r + 1) / n`` (mean of an inverse Wishart matrix); the parts show it for fewer rows.
    """
    scores, unseen = np.zeros(len(_SHARES)), np.zeros(len(_SHARES))
    parts = [scaled.apply(fold) for fold in folds]
    shares = [count / sum(counts) for count in counts]
    total = sum(share * part for share, part in zip(shares, parts, strict=True))
    for own, other in zip(shares, parts, strict=True):
        values, vectors = np.linalg.eigh((total - own * other) / (1.0 - own))
        across = np.einsum("ck,cd,dk->k", vectors, other, vectors, optimize=True)
        for index, share in enumerate(_SHARES):
            shrunk = (1.0 - share) * np.maximum(values, 0.0) + share
            if shrunk[0] <= _NOTHING * shrunk[-1]:
                scores[index] = np.inf
                continue
            level = float((across / shrunk).sum())
            scores[index] += own * (float(np.log(shrunk).sum()) + level)
            unseen[index] += own * level / scaled.rank
    best = int(np.argmin(scores))
    excess = (1.0 - 1.0 / unseen[best]) * (1.0 - 1.0 / len(folds))
    return float(scores[best]) - 2.0 * scaled.log_volume, _SHARES[best], float(1.0 / (1.0 - excess))


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
