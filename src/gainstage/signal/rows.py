"""Rows of attention: weighted sums over keys with a pattern of weights that differs from query to query.

A mask gives the weights p a pattern A [query, key] (their levels). What the exchangeable formula takes as averages over all keys
is here summed as it stands, by query and by pair of queries: ``sum_s A_ts A_us K_v[s, s]`` for the same key, and
``sum_{s != s'} A_ts A_us' K_v[s, s']`` for two keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gainstage.signal import levels as profiles
from gainstage.signal.axes import Dim, axes_of, descends
from gainstage.signal.between import shared
from gainstage.signal.gram import Gram, along, grouped, of_sum, pairs, starts, ungrouped, widths
from gainstage.signal.overlap import Tilt
from gainstage.signal.patterns import pairs_of
from gainstage.signal.quadrature import Array, matmul
from gainstage.signal.spread import by_chance
from gainstage.signal.value import Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """How a weighted sum over keys with a pattern of weights differs from one over exchangeable keys.

    ``query``, ``key``: axes of the weights. ``ratios[same query, same key]``: of the sums of what the keys share. ``own``,
    ``common``: each query's (each pair of queries') part of the sum, for two keys and for the same key, over its mean.
    """

    query: int
    key: int
    size: int
    ratios: Array
    own: tuple[Array, Array]
    common: tuple[Array, Array]

    def weighted(self, table: Array) -> Array:
        """Table of the weights, so that the exchangeable formula gives the sums as they are."""
        shape = [2 if p in (self.query, self.key) else 1 for p in range(table.ndim)]
        ratios = self.ratios if self.query < self.key else self.ratios.T
        return np.asarray(table * ratios.reshape(shape))

    def between_keys(self, table: Array) -> Array:
        """The part of a table that is about two different keys."""
        part = table.copy()
        np.moveaxis(part, self.key, 0)[1] = 0.0
        return part

    def rows(self, table: Array, between: Array, dims: Sequence[Dim], position: int) -> tuple[Array | None, Gram | None]:
        """Levels and Gram matrix of the result along its axis of queries."""
        axis = axes_of(tuple(dims))[position]
        full = (1,) * table.ndim
        apart = tuple(0 if p == position else 1 for p in range(table.ndim))
        square = between[full] * self.own[0] + (table[full] - between[full]) * self.own[1]
        shape = [self.size if p == position else 1 for p in range(table.ndim)]
        profile = profiles.normalised(np.sqrt(np.maximum(ungrouped(square, self.size), 0.0)).reshape(shape))
        weights = (max(float(between[apart]), 0.0), max(float(table[apart] - between[apart]), 0.0))
        return profile, of_sum([(self.common[0], weights[0]), (self.common[1], weights[1])], axis)


def pattern_of(a: Value, b: Value, index_a: Sequence[int], index_b: Sequence[int], summed: Sequence[int]) -> Pattern | None:
    """Pattern of the weights a of a sum over keys of b, where a has one. ``summed``: the axes that are, by their numbers."""
    if a.levels is None:
        return None
    varying = [position for position, size in enumerate(a.levels.shape) if size > 1]
    keys = [position for position in varying if index_a[position] in summed]
    queries = [position for position in varying if index_a[position] not in index_b]
    if len(keys) != 1 or len(queries) != 1 or len(varying) > 2:
        return None
    (key,), (query,) = keys, queries
    if a.gram is not None and a.gram.axis is a.axes[query]:
        return None  # no weights of keys, which two queries share by their levels
    mean, square = a.levels, a.levels**2
    if a.tilt is not None:  # the weights of a softmax have means, which are smaller than the roots of their mean squares
        mean, square = a.leaning() * a.mean, square * a.second_moment
    mean, square = (part.reshape(a.levels.shape[min(key, query)], -1) for part in (mean, square))
    position = index_b.index(index_a[key])
    axis = b.axes[position]
    squares, factors = along(b.levels, position, axis.size), shared(b, position)
    mean, square = (mean, square) if query < key else (mean.T, square.T)
    return attend(_Weights(mean, square), squares, factors, (query, key))


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """A weighted sum over keys that are not alike, with weights that are not: tables for the exchangeable formula.

    ``weights``, ``leaning``: of the weights, and of what they lean by, with the levels of the values, over the rows that are no
    padding. ``values``: at equal levels. ``profile``: levels of the result by row, with the axes of the weights. ``spread``: what
    makes of the table of those rows that of all; the rest, which is about to be cut off, shares as much as they do.
    """

    weights: Array
    leaning: Array
    values: Array
    profile: Array
    spread: Array

    def over_all(self, table: Array, index: Sequence[int], out_index: Sequence[int]) -> Array:
        """Table of the result; ``index``: of the axes of the weights, ``out_index``: of its own."""
        kept = [n for n in index if n in out_index]
        part = self.spread[tuple(slice(None) if n in out_index else 0 for n in index)]
        operands: list[object] = [table, out_index, np.broadcast_to(part, (2,) * len(kept)), kept]
        return np.asarray(np.einsum(*operands, out_index))  # type: ignore[call-overload]


def apart_of(a: Value, b: Value, index_a: Sequence[int], index_b: Sequence[int]) -> Apart | None:
    """Where the weights a of a sum over keys of b are those of a softmax over logits that are not alike."""
    tilt = a.tilt
    rows = None if tilt is None else tilt.unlike
    if tilt is None or rows is None or b.gram is not None or any(axis not in a.axes for axis in rows.axes):
        return None
    order = [rows.axes.index(axis) for axis in a.axes]
    key = order.index(len(order) - 1)
    if index_a[key] not in index_b:
        return None
    even, factor = _at_equal_levels(b, index_a, index_b)
    factor = factor.transpose(np.argsort(order))
    seen = rows.counted()
    pairs = pairs_of(seen)
    among = 1.0 / np.where(pairs > 0.0, pairs, np.inf)
    plain, weighted = rows.table(), rows.table(factor * seen) * among
    ratio = np.divide(weighted, plain, out=np.ones_like(plain), where=plain > 0.0).transpose(order)
    full = (1,) * even.ndim
    another = tuple(0 if n == index_a[key] else 1 for n in index_b)
    squares = rows.rows(factor, float(even[full]), float(even[another]))
    profile = np.sqrt(np.maximum(squares, 0.0))
    loud = pairs_of(profile * seen) * among
    variance = float(tilt.table[(1,) * a.table.ndim])
    return Apart(
        weights=a.table * ratio,
        leaning=variance * (rows.leaning(factor * seen) * among).transpose(order),
        values=even,
        profile=profile.transpose(order),
        spread=np.divide(pairs_of(profile), loud, out=np.ones_like(loud), where=loud > 0.0).transpose(order),
    )


def _at_equal_levels(b: Value, index_a: Sequence[int], index_b: Sequence[int]) -> tuple[Array, Array]:
    """Table of b before its levels along axes of a act on it, and these levels, with the axes of a."""
    if b.levels is None:
        return b.table, np.ones((1,) * len(index_a))
    own = tuple(p for p, n in enumerate(index_b) if n not in index_a)
    along = np.sqrt((b.levels**2).mean(axis=own, keepdims=True))
    pairs = pairs_of(along)
    shape = [along.shape[index_b.index(n)] if n in index_b else 1 for n in index_a]
    common = sorted(set(range(along.ndim)) - set(own), key=lambda p: index_a.index(index_b[p]))
    return b.table / np.where(pairs > 0.0, pairs, np.inf), along.transpose([*common, *own]).reshape(shape)


def tilted(
    a: Value, b: Value, index_a: Sequence[int], index_b: Sequence[int], kept_index: Sequence[int], *, apart: Apart | None = None
) -> tuple[Array, Array] | None:
    """Tables of what attention gains because keys and values read the same tensor: ``Cov(l_s, l_s') K_v cos^2(x_s, x_s')``.

    A query leans its weights towards keys along one direction, and values along it agree. Given two tokens at the cosine c, the
    logits of one query have covariance ``s^2 c`` and the values ``K_v c``, over the weights: to first order two different
    keys add ``p_s p_s' s^2 K_v E[c^2]``, with ``E[c^2]`` one over the number of channels that the weights read. What all keys
    have in common a softmax does not see: K_v is about the rest, and so is ``E[c^2]`` (the overlap has ``1 + rho^2`` times that);
    of few keys that is their own mean, so that ``1 - sum p^2`` of the lean is left.
    """
    keys = [n for n in index_a if n in index_b and n not in kept_index]
    if a.tilt is None or len(keys) != 1:
        return None
    alike = _alike(a, a.tilt, b, [p for p, n in enumerate(index_b) if n not in index_a])
    if alike <= 0.0:
        return None
    where = index_a.index(keys[0])
    if b.uneven is not None and descends(b.axes[index_b.index(keys[0])], b.uneven.axes):
        return None  # the keys are channels: each has weights of its own, and none of them reads what another key reads
    size = a.axes[where].size
    weights = a.table * a.tilt.table * (1.0 - size * a.second_moment) if apart is None else apart.leaning
    np.moveaxis(weights, where, 0)[1] = 0.0
    place = index_b.index(keys[0])
    even = b.table if apart is None else apart.values
    other = float(even[tuple(0 if p == place else 1 for p in range(even.ndim))])
    square = float(even[(1,) * even.ndim])
    values = np.zeros_like(even)
    index = tuple(0 if p == place else slice(None) if n in index_a else 1 for p, n in enumerate(index_b))
    values[index] = max(square - other, 0.0) * alike / (1.0 + (other / square) ** 2)
    return weights, values


def _alike(a: Value, tilt: Tilt, b: Value, channels: Sequence[int]) -> float:
    """``E[c c']``, c the cosine between what the logits read of two keys, c' that of their values; of few keys with their mean.

    Where values are what the logits were made of, at once or by way of hidden layers, c' is that of independent entries.
    """
    own = tilt.overlap.of_entries(b.marginal.latent)
    is_memory = b.is_weight and bool(a.lineage & b.lineage)
    reads = [read for name, read in a.read if name in b.names]
    is_direct = is_memory or any(all(descends(b.axes[p], read) for p in channels) for read in reads)
    if is_direct or own > 0.0:
        chance = by_chance(b, {p: float(b.axes[p].size) for p in channels})
        return b.overlap.variance + chance if is_direct else tilt.overlap.shared(b.overlap) + own * chance**0.5
    are_strangers = bool(a.read) and bool(b.read) and not a.read & b.read
    return 0.0 if are_strangers else b.overlap.variance


@dataclass(frozen=True, slots=True)
class _Weights:
    """Means of the weights [query, key], and their mean squares, which are more where weights are random."""

    mean: Array
    square: Array

    def twice(self) -> Array:
        """What the square of the sum over keys has of a key twice: the rows of a softmax have the sum 1, whatever is drawn."""
        sums = self.mean.sum(1)
        return self.square if np.ptp(sums) <= 1e-9 * float(sums.max()) else self.mean**2


def attend(weights: _Weights, squares: Array, factors: Array | None, axes: tuple[int, int]) -> Pattern:
    """Sums over keys of weights A: ``sum_s A_ts A_us q_s`` and ``sum_{s != s'} A_ts A_us' G_ss'``, with and without q and G."""
    queries, keys = weights.mean.shape
    width = widths(keys)
    mass, square, twice = (
        grouped(np.add.reduceat(part, np.array(starts(keys)), axis=1)) for part in (weights.mean, weights.square, weights.twice())
    )
    gram = np.ones((len(width), len(width))) if factors is None else factors
    same, same_weighted = _over_keys(mass, square, width, np.ones_like(width)), _over_keys(mass, square, width, squares)
    inner = mass / width  # of one key
    alike = np.diag(gram) * width
    every = np.outer(mass.sum(1), mass.sum(1))
    other = (every - same[0], every.diagonal() - twice.sum(1))
    whole = matmul(matmul(mass, gram), mass.T)
    weighted = whole - matmul(inner * alike, inner.T)
    corrected = np.diag(whole) - np.vecdot(twice, np.diag(gram))
    other_weighted = (weighted, corrected)
    ratios = np.ones((2, 2))
    own: list[Array] = []
    common: list[Array] = []
    count, rows = pairs(queries), widths(queries)
    for key, (plain, found) in enumerate(((other, other_weighted), (same, same_weighted))):
        for query, number, weight in ((0, 0, count), (1, 1, rows)):
            base, mean = float((plain[number] * weight).sum()), float((found[number] * weight).sum())
            ratios[query, key] = mean / base if base > 0.0 else 1.0
            share = found[number] * weight.sum() / mean if mean > 0.0 else np.ones_like(found[number])
            (common if query == 0 else own).append(share)
    return Pattern(query=axes[0], key=axes[1], size=queries, ratios=ratios, own=(own[0], own[1]), common=(common[0], common[1]))


def _over_keys(mass: Array, square: Array, width: Array, squares: Array) -> tuple[Array, Array]:
    """The same key for two queries, and for one query twice."""
    return matmul(mass * (squares / width), mass.T), np.vecdot(square, squares)
