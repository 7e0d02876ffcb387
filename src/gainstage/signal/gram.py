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

SINGLE, GROWTH = 64, 1.08  # positions that are a group of their own; ratio of the widths that follow


@dataclass(frozen=True, slots=True, eq=False)
class Gram:
    """``E[x_s x_t]`` for two positions in these groups, over its average over all pairs of different positions."""

    axis: Axis
    factors: Array


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
    """One number for each position."""
    return np.repeat(groups, widths(size).astype(int))


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


def of_sum(terms: Sequence[tuple[Array | None, float]], axis: Axis) -> Gram | None:
    """Gram matrix of a sum of independent tensors: each term's, by its share of what two positions have in common."""
    total = sum(weight for _, weight in terms)
    if all(factors is None for factors, _ in terms) or total <= 0.0:
        return None
    shape = next(factors.shape for factors, _ in terms if factors is not None)
    mixed = sum(weight * (np.ones(shape) if factors is None else factors) for factors, weight in terms)
    return Gram(axis, np.asarray(mixed / total))


def modulated(factors: Array | None, scale: Array, axis: Axis) -> tuple[Gram, float]:
    """Gram matrix after position t is multiplied by scale[t], and what becomes of the average over pairs."""
    root = grouped(scale)
    found, mean = relative(np.outer(root, root) * (1.0 if factors is None else factors), axis.size)
    return Gram(axis, found), mean
