"""Softmax and attention.

For n independent Gaussian logits of variance s^2 the expected sum of squared probabilities is, exactly
(the gamma integral of 1/Z^2),

    E sum p^2 = n  int_0^inf t E[exp(2 l - t e^l)] E[exp(-t e^l)]^(n-1) dt,

right at any s, where ``exp(s^2) / n`` is right for small s only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.copies import replace
from gainstage.signal.known import measured
from gainstage.signal.marginal import Marginal
from gainstage.signal.movement import expand, full_prior, merge_dim, refine
from gainstage.signal.overlap import Tilt
from gainstage.signal.patterns import pairs_of
from gainstage.signal.quadrature import Array, between_nodes, nodes, over_norm, standardised
from gainstage.signal.traits import Lean, Logits
from gainstage.signal.unlike import Unlike, of_one, unlike
from gainstage.signal.value import Value, gaussian

ALIKE = 0.01  # levels of logits that differ by less are one


@lru_cache(maxsize=4096)
def participation(variance: float, count: float, flatness: float = 3.0) -> float:
    """``E sum p^2`` of a softmax over ``count`` independent logits: 1/count when they are equal, 1 when one wins.

    Gaussian, or, where their kurtosis is less, with something in common that norms were divided by.
    """
    if count <= 1 or variance <= 0.0:
        return 1.0 / max(count, 1)
    tau, single, powers = _integrand(variance, count, flatness, 2)
    total = float(np.trapezoid(powers[2] * single ** (count - 1.0), tau)) * count
    return min(max(total, 1.0 / count), 1.0)


def _integrand(variance: float, count: float, flatness: float, most: int) -> tuple[Array, Array, dict[int, Array]]:
    """Logs of t, ``E[exp(-t e^l)]``, and ``t^k E[exp(k l - t e^l)]`` for k from 2 on, for the integrals over ``log t``."""
    top = np.sqrt(2.0 * variance * np.log(count)) + 4.0 * np.sqrt(variance) + np.log(count)
    tau = np.linspace(-top - 8.0, 4.0 * np.sqrt(variance) + 4.0, 600)
    return tau, *of_one(variance, tau, flatness, range(2, most + 1))


@dataclass(frozen=True, slots=True)
class Powers:
    """Sums over the keys of a softmax, on average: of p^2, p^3, p^4, and the square of that of p^2."""

    square: float
    cube: float
    fourth: float
    both: float

    def slope(self) -> float:
        """``E sum_s a_s^2`` of ``a_s = p_s (d_s - sum p d)``, d independent: ``sum p^2 - 2 sum p^3 + (sum p^2)^2``."""
        return self.square - 2.0 * self.cube + self.both

    def between(self) -> float:
        """Of two different keys: ``sum of da_s/dd_s da_s'/dd_s' + da_s/dd_s' da_s'/dd_s``, so much of what d has in common."""
        return 1.0 - self.square - 2.0 * (self.square - self.cube) + 2.0 * (self.both - self.fourth)

    def lean(self) -> float:
        """``E sum of d^2 (p_s p_s') / dl_s dl_s'``: so much of what logits have in common, by Price's theorem."""
        return 1.0 - self.square - 4.0 * (self.square - self.cube) + 6.0 * (self.both - self.fourth)


@lru_cache(maxsize=4096)
def powers_of(variance: float, count: float, flatness: float = 3.0) -> Powers:
    """Of n independent logits, by the integrals of :func:`participation` for ``1/Z^3`` and ``1/Z^4``."""
    n = max(count, 1.0)
    if n <= 1.0 or variance <= 0.0:
        return Powers(1.0 / n, n**-2.0, n**-3.0, n**-2.0)
    tau, single, t = _integrand(variance, n, flatness, 4)
    alone, pair = n * single ** (n - 1.0), n * (n - 1.0) * single ** max(n - 2.0, 0.0)
    square, cube, fourth = (float(np.trapezoid(t[k] * alone, tau)) / math.factorial(k - 1) for k in (2, 3, 4))
    return Powers(square, cube, fourth, fourth + float(np.trapezoid(t[2] ** 2 * pair, tau)) / 6.0)


@lru_cache(maxsize=4096)
def entropy(variance: float, count: float) -> float:
    """``E[-sum p log p] = log n + int_0^s t (1 - P(t)) dt - s^2 (1 - P(s))`` for n independent logits of variance s^2.

    P is the participation. By Stein's lemma ``E[sum p l] = s^2 (1 - P(s))`` and ``d E[log sum exp l] / d s = s (1 - P(s))``.
    """
    if count <= 1.0:
        return 0.0
    std = max(variance, 0.0) ** 0.5
    points, mass = np.polynomial.legendre.leggauss(12)
    t = 0.5 * std * (points + 1.0)
    grown = sum(0.5 * std * m * s * (1.0 - participation(float(s**2), count)) for s, m in zip(t, mass, strict=True))
    return float(np.log(count) + grown - variance * (1.0 - participation(variance, count)))


def relative_entropy(x: Value, variance: float) -> float:
    """Entropy of a softmax over the last dimension over that of equal ones, averaged over rows that see two keys or more.

    Logits of this variance; what is known of them beforehand counts as in :func:`softmax`: weights a of entropy H act like
    ``1 / sum a^2`` equal keys, to the difference of their logarithm and H.
    """
    dim = len(x.dims) - 1
    if x.fields is not None:
        share = known_shares(x, dim)
        seen = (share > 1e-9).sum(-1)
        each = torch.special.entr(_with_logits(share, variance, x.flatness)).sum(-1) / seen.clamp_min(2).log()
        return float(each[seen > 1].mean()) if bool((seen > 1).any()) else 1.0
    if x.prior is None:
        return entropy(variance, x.shape[dim]) / float(np.log(x.shape[dim])) if x.shape[dim] > 1 else 1.0
    share = known_shares(x, dim).reshape(-1, x.shape[dim])
    seen = (share > 1e-9).sum(1).double()
    known, sizes = torch.special.entr(share).sum(1), 1.0 / share.square().sum(1)
    rows = torch.unique(
        torch.stack([seen, known.double(), sizes.double()], 1)[seen > 1].round(decimals=3), dim=0, return_counts=True
    )
    if not len(rows[1]):
        return 1.0
    picked = np.unique(np.round(np.geomspace(float(rows[0][:, 2].min()), float(rows[0][:, 2].max()), 24), 3))
    lost = np.interp(rows[0][:, 2].numpy(), picked, [np.log(n) - entropy(variance, float(n)) for n in picked])
    found = (rows[0][:, 1].numpy() - lost) / np.log(rows[0][:, 0].numpy())
    return float(np.average(np.maximum(found, 0.0), weights=rows[1].numpy()))


def softmax(x: Value, dim: int) -> Value:
    """Probabilities along a dimension, given what is known beforehand of the logits (a mask, a bias).

    Two rows whose logits correlate by rho overlap by ``U (E sum p^2 / U_same)^rho``, U the overlap of their known
    distributions: exact for rho = 0 and 1, and to first order in the variance of the logits between.
    """
    dim %= len(x.dims)
    x = merge_dim(apart(x), dim)
    if not x.dims[dim]:
        return replace(_constant_like(x, 1.0), lineage=x.lineage)
    if found := _unlike(x, dim):
        return _of_rows(x, dim, *found)
    size = x.shape[dim]
    position = sum(len(d) for d in x.dims[:dim])
    same = np.take(x.covariance, 1, axis=position)
    other = np.take(x.covariance, 0, axis=position)
    within = same - other
    full = (1,) * within.ndim
    variance = max(float(within[full]), 0.0)
    rho = np.clip(within / variance, -1.0, 1.0) if variance > 0.0 else np.zeros_like(within)
    uniform, gain, lean, x = _uniform(x, dim, variance)
    position = sum(len(d) for d in x.dims[:dim])
    if uniform is None:
        overlap = np.full_like(within, 1.0 / size**2)
    else:
        overlap = np.take(uniform, 1, axis=position)
        rho = _fit(x, position, variance)
    if x.fields is not None:
        ratio, gain = _of_fields(x, dim, variance)
        overlap = overlap * ratio
    matched = overlap * gain**rho
    rest = (1.0 - size * matched) / (size * (size - 1.0)) if size > 1 else matched
    return _probabilities(x, dim, np.stack([rest, matched], axis=position), (variance, rho), lean)


def _probabilities(
    x: Value, dim: int, table: Array, logits: tuple[float, Array], lean: Lean | None, *, rows: Unlike | None = None
) -> Value:
    """A softmax with this table; ``logits``: their variance over keys, and their correlations from row to row."""
    variance, rho = logits
    size, position = x.shape[dim], sum(len(d) for d in x.dims[:dim])
    of_rest = (x.variance / variance) ** 2 if variance > 0.0 else 1.0  # what keys do not have in common
    of = Logits(table, x, dim)
    tilt = Tilt(np.stack([rho * variance] * 2, axis=position), x.overlap.times(of_rest), of, rows)
    std = max(float(table[(1,) * table.ndim]) - size**-2.0, 0.0) ** 0.5

    def values() -> Array:
        return standardised(np.exp(np.clip(variance**0.5, 0, 6) * nodes()), 1.0 / size, std)

    return Value(
        dims=x.dims, mean=1.0 / size, table=table, marginal=Marginal(object(), values), source=object(), lineage=x.lineage,
        levels=None if lean is None else lean.levels, lean=lean, tilt=tilt, read=x.read, logits=of,
    )  # fmt: skip


def _unlike(x: Value, dim: int) -> tuple[Unlike, float] | None:
    """The weights of each row, and the variance of the logits over keys, where levels of queries or keys differ."""
    if x.levels is None or np.ptp(x.levels) <= ALIKE * float(x.levels.max()):
        return None
    position = sum(len(d) for d in x.dims[:dim])
    prior = None
    if x.fields is not None:
        x = replace(x, prior=x.fields[0] if x.prior is None else full_prior(x) + x.fields[0])
    if x.prior is not None:
        known = full_prior(x)
        prior = known.reshape([axis.size if known.shape[d] > 1 else 1 for d, axes in enumerate(x.dims) for axis in axes]).numpy()
    last = [None if part is None else np.moveaxis(part, position, -1) for part in (x.covariance, x.levels, prior)]
    axes = (*x.axes[:position], *x.axes[position + 1 :], x.axes[position])
    assert last[0] is not None
    assert last[1] is not None
    return unlike(axes, last[0], last[1], last[2], x.flatness)


def _of_rows(x: Value, dim: int, rows: Unlike, variance: float) -> Value:
    """Probabilities along a dimension, of rows and keys that are not alike."""
    position, size = sum(len(d) for d in x.dims[:dim]), x.shape[dim]
    matched = rows.table()[..., 1]
    table = np.stack([(1.0 - size * matched) / (size * (size - 1)), matched], axis=position)
    square, mean = (np.moveaxis(part, -1, position) for part in (rows.square, rows.mean))
    profile = levels.normalised(square**0.5)
    lean = None if profile is None else Lean(profile, mean / mean.mean())
    return _probabilities(x, dim, table, (variance, rows.rho), lean, rows=rows)


def apart(x: Value) -> Value:
    """Logits, with a known tensor that was added to them moved from the table to what is known beforehand."""
    added = x.added
    if added is None or added.table is not x.table or added.of.axes != x.axes:
        return x
    if added.drawn:
        return replace(added.of, dims=x.dims, prior=x.prior, fields=added.known)
    known = added.known if added.of.shape == x.shape else torch.broadcast_to(added.known, added.of.shape).reshape(x.shape)
    return replace(added.of, dims=x.dims, prior=known if x.prior is None else x.prior + known)


def _fit(x: Value, position: int, variance: float) -> Array:
    within = np.take(x.covariance, 1, axis=position) - np.take(x.covariance, 0, axis=position)
    return np.clip(within / variance, -1.0, 1.0) if variance > 0.0 else np.zeros_like(within)


def _pattern(x: Value, dim: int, share: torch.Tensor, gains: torch.Tensor) -> Lean | None:
    """Levels of the probabilities by query and key, and their means, as the prior makes them."""
    if dim == 0 or not x.dims[dim - 1]:
        return None
    others = [d for d in range(share.dim()) if d not in (dim - 1, dim)]
    square, mean = (part.mean(dim=others, keepdim=True) if others else part for part in (share.square() * gains, share))
    if square.shape[dim - 1] == 1:
        return None
    shape = [n for d, axes in enumerate(x.dims) for n in ([a.size for a in axes] if d in (dim - 1, dim) else [1] * len(axes))]
    profile = levels.normalised(square.sqrt().numpy().reshape(shape))
    return None if profile is None else Lean(profile, (mean / mean.mean()).numpy().reshape(shape))


def known_shares(x: Value, dim: int) -> torch.Tensor:
    """Softmax of what is known beforehand of each row; nothing for a row without keys.

    Of draws [draws, query, key], each with one of the masks.
    """
    if x.fields is not None:
        return (x.fields if x.prior is None else x.fields + _masks(x)).softmax(-1).nan_to_num(0.0)
    assert x.prior is not None
    prior = x.prior.reshape((1,) * (len(x.dims) - x.prior.dim()) + tuple(x.prior.shape))
    prior = torch.broadcast_to(prior, [n if d == dim else m for d, (m, n) in enumerate(zip(prior.shape, x.shape, strict=True))])
    return prior.softmax(dim).nan_to_num(0.0)


def _masks(x: Value) -> torch.Tensor:
    """What is known beforehand of each row, [draws, query, key], as often as it occurs."""
    assert x.fields is not None
    known = full_prior(x)
    known = known.expand(*known.shape[:-2], *x.fields.shape[-2:]).flatten(0, -3)
    return known[torch.linspace(0, len(known) - 1, len(x.fields)).round().long()]


def _with_logits(share: torch.Tensor, variance: float, flatness: float) -> torch.Tensor:
    """Weights that are known beforehand, times the exponential of logits of this variance, over their sum: by a draw of these."""
    normal = np.random.default_rng(share.shape).standard_normal(tuple(share.shape))
    made = normal if flatness >= 3.0 else between_nodes(normal, over_norm(flatness))
    logits = share.log() + variance**0.5 * torch.from_numpy(made)
    found: torch.Tensor = logits.softmax(-1).nan_to_num(0.0)
    return found


def _of_fields(x: Value, dim: int, variance: float) -> tuple[Array, float]:
    """What rows share of weights that were drawn, over what they do without, by whether they are one; how much logits add to it.

    Rows of one draw: windows and samples meet the same weights, and what heads share is of no account.
    """
    share = known_shares(x, dim)
    plain = torch.full_like(share, 1.0 / share.shape[-1]) if x.prior is None else _masks(x).softmax(-1).nan_to_num(0.0)
    queries = [axis.size for axis in x.dims[dim - 1]]
    pairs, before = (pairs_of(part.reshape(-1, *queries, x.shape[dim]).numpy(), draws=1)[..., -1] for part in (share, plain))
    ratio = (pairs / before).reshape([1] * sum(len(axes) for axes in x.dims[: dim - 1]) + list(pairs.shape))
    gain = _with_logits(share, variance, x.flatness).square().sum() / share.square().sum()
    return ratio, float(gain)


def _uniform(x: Value, dim: int, variance: float) -> tuple[Array | None, float, Lean | None, Value]:
    """Table of the distribution that is known beforehand, how much louder the softmax is than it, and its levels and means.

    A softmax of random logits on top of weights a is taken to concentrate like one over ``1 / sum a^2`` equal keys, row by row:
    the first row of a causal mask has one key, whatever its logits are.
    """
    size = x.shape[dim]
    if x.prior is None:
        return None, participation(round(variance, 9), size, x.flatness) * size, None, x
    share = known_shares(replace(x, fields=None), dim)
    flat = expand(measured(share), x.shape)
    for d in range(len(x.dims)):
        x, flat = refine(x, flat, d, d)
    squares = share.square().sum(dim, keepdim=True)
    counts = np.round(1.0 / np.maximum(squares.numpy(), 1e-300), 3)
    sizes = np.unique(counts[squares.numpy() > 0.0])
    picked = sizes if len(sizes) <= 24 else np.geomspace(sizes[0], sizes[-1], 24)
    found = [participation(round(variance, 9), float(n), x.flatness) * float(n) for n in picked]
    gains = torch.from_numpy(np.interp(counts, picked, found))
    return flat.table, float((squares * gains).sum() / squares.sum()), _pattern(x, dim, share, gains), x


def _constant_like(x: Value, value: float) -> Value:
    return gaussian(x.dims, value, np.full_like(x.table, value**2))
