"""Softmaxes over logits that are not alike: of queries and keys with levels of their own, beside what is known beforehand.

Where windows are padded, rows of zeros stand among the queries and keys. For independent logits ``l_s`` of variances ``v_s``,
with weights ``a_s`` known beforehand, and ``1/Z^k`` by the gamma integral,

    E[p_s]      = int_0^inf E[a e^(l_s) exp(-t a e^(l_s))] prod over r != s of E[exp(-t a_r e^(l_r))] dt
    E[p_s^2]    = int_0^inf t E[a^2 e^(2 l_s) exp(-t a e^(l_s))] prod over r != s of (the same) dt
    E[p_s p_s'] = int_0^inf t E[a e^(l_s) ..] E[a e^(l_s') ..] prod over the others dt,

averaged over what keys of one query have in common: it lifts loud keys above quiet ones. Of two rows whose logits correlate by
rho, with ``m = E[p]``, one key has

    E[p_s p'_s] = m_s m'_s exp(rho sqrt(g_s g'_s)),   g_s = log(E[p_s^2] / m_s^2):

exact for a row with itself and for rows that have nothing to do with each other, and to first order in the variance between. What
two keys share is interpolated; of two kinds it is the geometric mean of what two keys of each share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.signal.axes import Axis
from gainstage.signal.patterns import pairs_of
from gainstage.signal.quadrature import Array, nodes, over_norm, weights

MOST = 2**21  # logits that are looked at one by one
FINE = 24  # levels that are told apart
KINDS = 96  # kinds of keys, by level and by what is known of them
STEP = 0.4  # of log t: the trapezoid rule errs by exp(-pi^2 / STEP), as integrands are like those of gamma functions
COMMON = 9  # points of an integral over what keys have in common
TERMS = 40  # of a power series
VANISHES = 50.0  # below the highest: a logit of which nothing is left


def of_one(variance: float, tau: Array, flatness: float, powers: range) -> tuple[Array, dict[int, Array]]:
    """``E[exp(-t e^l)]`` and ``t^k E[exp(k l - t e^l)]`` at ``t = e^tau``, for a logit of this variance."""
    weight = weights()[::4] / weights()[::4].sum()
    logits = variance**0.5 * (nodes() if flatness >= 3.0 else over_norm(flatness))[::4]
    # Finite to the fourth power; nothing is left by what is larger. Exponentials by torch, in half of the time.
    heights = torch.from_numpy(np.minimum(tau[:, None] + logits[None, :], 170.0)).exp()
    grown, left = heights.numpy(), (-heights).exp().numpy()
    found, power = {}, left * grown**powers.start
    for k in powers:
        found[k] = np.vecdot(power, weight)
        power *= grown
    return np.maximum(np.vecdot(left, weight), 1e-300), found


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Unlike:
    """Weights of a softmax by row and key, [*axes] of size 1 where they do not vary; the last axis is that of the keys.

    ``mean``: ``E[p]``. ``square``: ``E[p^2]``. ``pair``: root of ``E[p_s p_s']`` for two keys of a kind. ``logits``: root
    mean square of the logits, over that of all. ``rho``: correlation of the logits of two rows, by what these share.
    """

    axes: tuple[Axis, ...]
    mean: Array
    square: Array
    pair: Array
    logits: Array
    rho: Array

    def table(self, factor: Array | float = 1.0) -> Array:
        """What pairs of weights share, each times a known factor."""
        return np.stack([self._of_two_keys(factor), self._of_one_key(factor)], axis=-1)

    def leaning(self, factor: Array) -> Array:
        """``E[p_s p'_s'] sqrt(v_s v'_s') rho`` of two different keys, each times a known factor; 0 for the same key."""
        left = 1.0 - self.square.sum(axis=-1, keepdims=True)  # of few keys the mean has a part
        found = self.rho * self._of_two_keys(factor * self.logits * np.maximum(left, 0.0) ** 0.5)
        return np.stack([found, np.zeros_like(found)], axis=-1)

    def counted(self) -> Array:
        """1 for rows that are more than padding: of zeros the softmax is even, and often nobody reads it."""
        return np.asarray(self.logits.max(axis=-1, keepdims=True) > 0.0, dtype=np.float64)

    def rows(self, factor: Array | float, same: float, other: float) -> Array:
        """``same sum of E[p_s^2] f_s^2 + other sum over s != s' of E[p_s p_s'] f_s f_s'`` of each row; f a known factor."""
        pair = self.pair * factor
        pairs = pair.sum(axis=-1, keepdims=True) ** 2 - (pair**2).sum(axis=-1, keepdims=True)
        return np.asarray(same * (self.square * factor**2).sum(axis=-1, keepdims=True) + other * pairs)

    def _of_two_keys(self, factor: Array | float) -> Array:
        apart, alike = (np.take(pairs_of(np.asarray(part * factor)), 0, axis=-1) for part in (self.mean, self.pair))
        return np.asarray((1.0 - self.rho) * apart + self.rho * alike)

    def _of_one_key(self, factor: Array | float) -> Array:
        """``sum over k of rho^k / k! times what pairs share of m g^(k/2)``."""
        ratio = np.divide(self.square, self.mean**2, out=np.ones_like(self.mean), where=self.mean > 0.0)
        root, term = np.sqrt(np.log(np.maximum(ratio, 1.0))), np.asarray(self.mean * factor)
        total, top = np.zeros_like(self.rho), float(root.max()) ** 2
        for k in range(TERMS):
            pairs = np.take(pairs_of(term), term.shape[-1] > 1, axis=-1)
            total = total + self.rho**k / math.factorial(k) * pairs
            if top <= 0.0 or (k > top and top ** (k + 1) / math.factorial(k + 1) < 1e-6 * math.exp(top)):
                break
            term = term * root
        return total


def unlike(
    axes: tuple[Axis, ...], table: Array, profile: Array, prior: Array | None, flatness: float
) -> tuple[Unlike, float] | None:
    """What the weights of each row are, and the variance over keys of logits of average level; the last axis is that of keys.

    ``table``: of the logits; ``profile``: their levels; ``prior``: what is known of them, as the profile. None where there are
    too many to be looked at, or where levels do not tell what pairs share.
    """
    shape = np.broadcast_shapes(profile.shape[:-1], () if prior is None else prior.shape[:-1])
    size = axes[-1].size
    if math.prod(shape) * size > MOST:
        return None
    even = table / np.where(pairs_of(profile) > 0.0, pairs_of(profile), np.inf)
    within = even[..., 1] - even[..., 0]
    full = (1,) * within.ndim
    variance, common = float(within[full]), max(float(even[..., 0][full]), 0.0)
    if variance <= 0.0:
        return None
    rho = np.clip(within / variance, -1.0, 1.0)
    rows = np.broadcast_to(profile, (*shape, size)).reshape(-1, size)
    known = np.zeros_like(rows) if prior is None else np.broadcast_to(prior, (*shape, size)).reshape(-1, size)
    mean, square, pair = (part.reshape(*shape, size) for part in _weights(rows, known, variance, common, flatness))
    return Unlike(axes=axes, mean=mean, square=square, pair=np.sqrt(pair), logits=profile, rho=rho), variance


def _weights(levels: Array, known: Array, variance: float, common: float, flatness: float) -> tuple[Array, Array, Array]:
    """``E[p]``, ``E[p^2]`` and ``E[p p']`` for two keys of a kind, [rows, keys], of logits with these levels."""
    kinds, sizes, priors = _kinds(levels, known)
    counts = np.zeros((len(kinds), len(sizes) + 1))
    np.add.at(counts, (np.arange(len(kinds))[:, None], kinds), 1.0)
    different, index = np.unique(counts[:, :-1], axis=0, return_inverse=True)
    found = np.zeros((3, len(different), len(sizes) + 1))  # the last for keys that are excluded
    lifts = bool(np.any((different > 0).sum(1) > 1)) and common > 0.0 and np.ptp(sizes) > 0.0
    points, mass = np.polynomial.hermite_e.hermegauss(COMMON if lifts else 1)
    for point, share in zip(points, mass / mass.sum(), strict=True):
        found[:, :, :-1] += share * _by_kind(different, sizes**2 * variance, priors + sizes * common**0.5 * point, flatness)
    mean, square, pair = (part[index.ravel()[:, None], kinds] for part in found)
    return mean, square, pair


def _kinds(levels: Array, known: Array) -> tuple[NDArray[np.int64], Array, Array]:
    """Kind of each key [rows, keys], the last for those that are excluded; level and known part of each kind."""
    highest = known.max(axis=1, keepdims=True)
    known = np.where(np.isfinite(highest), known - np.where(np.isfinite(highest), highest, 0.0), 0.0)
    levels, excluded = np.where(np.isfinite(highest), levels, 0.0), known <= -VANISHES
    fine = FINE
    while True:
        steps = np.round(levels / levels.max() * fine), np.round(np.where(excluded, 0.0, known) * fine / 3.0)
        both = np.stack([step[~excluded] for step in steps], axis=1)
        found, index = np.unique(both, axis=0, return_inverse=True)
        if len(found) <= KINDS or fine <= 2:
            break
        fine //= 2
    kinds = np.full(levels.shape, len(found))
    kinds[~excluded] = index.ravel()
    amounts = np.bincount(index.ravel(), minlength=len(found))
    sizes = np.sqrt(np.bincount(index.ravel(), weights=levels[~excluded] ** 2) / amounts)
    return kinds, sizes, np.bincount(index.ravel(), weights=known[~excluded]) / amounts


def _by_kind(counts: Array, variances: Array, priors: Array, flatness: float) -> Array:
    """``E[p]``, ``E[p^2]``, ``E[p p']`` [3, rows, kinds] for so many keys of each kind in a row."""
    most, top = float(np.log(max(counts.sum(1).max(), 2.0))), float(variances.max())
    low = -float(priors.max()) - (2.0 * top * most) ** 0.5 - 4.0 * top**0.5 - most - 8.0
    tau = np.arange(low, 4.0 * top**0.5 + 4.0 - float(priors.min()), STEP)
    made = [of_one(float(v), tau + a, flatness, range(1, 3)) for v, a in zip(variances, priors, strict=True)]
    single = np.array([one for one, _ in made])
    once, twice = (np.array([powers[k] for _, powers in made]) / single for k in (1, 2))
    every = np.exp(counts @ np.log(single))
    once[:, 0] /= -math.expm1(-STEP)  # below the lowest it falls as t does
    return STEP * np.stack([every @ once.T, every @ twice.T, every @ (once**2).T])
