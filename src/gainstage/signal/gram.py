"""Gram: what each pair of positions shares, where positions are not alike.

Under a causal mask row t averages t + 1 values: early rows are louder, and rows t and t' share ``1 / max(t, t')``. A table
holds the average over pairs; the Gram matrix holds each pair's share of it, so that an average over the first rows alone, which
is what the next causal layer takes, is right. Pairs are resolved between groups of positions: single ones first, then wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gainstage.signal import levels as profiles
from gainstage.signal.axes import Axis
from gainstage.signal.quadrature import Array

_CANCELS = 0.1  # of the sizes of terms: as much of their sum says nothing of its parts
SINGLE, GROWTH = 64, 1.08  # positions that are a group of their own; ratio of the widths that follow


@dataclass(frozen=True, slots=True, eq=False)
class Gram:
    """``E[x_s x_t]`` for two positions in these groups, over its average over all pairs of different positions.

    ``across``: the same for one position of two entries that differ along the axis ``over`` alone, such as samples.
    """

    axis: Axis
    factors: Array
    over: Axis | None = None
    across: Array | None = None


@lru_cache(maxsize=256)
def starts(size: int) -> tuple[int, ...]:
    """First position of each group."""
    found, width = [0], 1.0
    while found[-1] + int(width) < size:
        found.append(found[-1] + int(width))
        if len(found) > SINGLE:
            width = max(width * GROWTH, width + 0.25)
    return tuple(found)


def widths(size: int) -> Array:
    """Number of positions in each group."""
    return np.diff(np.array([*starts(size), size])).astype(float)


def grouped(along: Array) -> Array:
    """Average over each group of a quantity that is given for each position (its first dimension)."""
    totals = np.add.reduceat(along, np.array(starts(len(along))), axis=0)
    return np.asarray(totals / widths(len(along)).reshape(-1, *[1] * (along.ndim - 1)))


def ungrouped(groups: Array, size: int) -> Array:
    """One number, or one row, for each position."""
    return np.repeat(groups, widths(size).astype(int), axis=0)


def pairs(size: int) -> Array:
    """Number of pairs of different positions between any two groups."""
    width = widths(size)
    return np.asarray(np.outer(width, width) - np.diag(width))


def relative(matrix: Array, size: int) -> tuple[Array, float]:
    """Matrix over its average over pairs of different positions, and that average."""
    count = pairs(size)
    mean = float((matrix * count).sum() / count.sum()) if count.sum() > 0 else 0.0
    return (matrix / mean, mean) if mean != 0.0 else (np.ones_like(matrix), 0.0)


def along(levels: Array | None, position: int, size: int) -> Array:
    """Mean square of each group, over that of the whole."""
    return grouped(profiles.over(levels, position, size) ** 2)


def factors_of(gram: Gram | None, axis: Axis, levels: Array | None, position: int) -> Array | None:
    """Share of each pair along an axis; where only levels differ, by them; None where all pairs are alike."""
    if gram is not None and gram.axis is axis:
        return gram.factors
    if levels is None or levels.shape[position] == 1:
        return None
    root = grouped(profiles.over(levels, position, axis.size))
    return relative(np.outer(root, root), axis.size)[0]


def between_places(factors: Array, size: int) -> Array:
    """Share of each pair of positions, of a short sequence."""
    return ungrouped(ungrouped(factors, size).T, size).T


def between_groups(matrix: Array) -> tuple[Array, float]:
    """Factors of what pairs of positions share [position, position], and its average over pairs of different ones."""
    size = len(matrix)
    apart = matrix * (1.0 - np.eye(size))
    sums = np.add.reduceat(np.add.reduceat(apart, starts(size), axis=0), starts(size), axis=1)
    count = pairs(size)
    return relative(np.divide(sums, count, out=np.zeros_like(sums), where=count > 0.0), size)


def of_sum(terms: Sequence[tuple[Array | None, float]], axis: Axis) -> Gram | None:
    """Gram matrix of a sum of independent tensors: each term's, by its share of what two positions have in common."""
    if all(factors is None for factors, _ in terms) or sum(weight for _, weight in terms) <= 0.0:
        return None
    return Gram(axis, mixture(terms, np.ones(next(factors.shape for factors, _ in terms if factors is not None))))


def mixture(terms: Sequence[tuple[Array | None, float]], even: Array) -> Array:
    """Shares in a sum of independent tensors, ``even`` where a term has all alike: each term's, by what it has of the sum.

    Terms that nearly cancel count by their sizes.
    """
    sizes = sum(abs(weight) for _, weight in terms)
    if sizes <= 0.0:
        return even
    total = sum(weight for _, weight in terms)
    if abs(total) < _CANCELS * sizes:
        terms, total = [(factors, abs(weight)) for factors, weight in terms], sizes
    return np.asarray(sum(weight * (even if factors is None else factors) for factors, weight in terms) / total)


def modulated(factors: Array | None, scale: Array, axis: Axis) -> tuple[Gram, float]:
    """Gram matrix after position t is multiplied by scale[t], and what becomes of the average over pairs."""
    root = grouped(scale)
    found, mean = relative(np.outer(root, root) * (1.0 if factors is None else factors), axis.size)
    return Gram(axis, found), mean
