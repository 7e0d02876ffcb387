"""Known arrays: what pairs of their entries share, by coordinates that are equal."""

from __future__ import annotations

import math

import numpy as np

from gainstage.signal.quadrature import Array


def spread_pairs(pairs: Array, sizes: tuple[int, ...]) -> Array:
    """Turn averages over all pairs into averages over pairs that differ.

    In ``pairs`` index 0 of an axis means "averaged over all pairs of coordinates", equal ones included, which is
    ``K[0] + (K[1] - K[0]) / n``; solved for ``K[0]`` along each axis of size n.
    """
    table = pairs.copy()
    for position, size in enumerate(sizes):
        same, mixed = np.take(table, 1, axis=position), np.take(table, 0, axis=position)
        table = np.stack([(size * mixed - same) / (size - 1), same], axis=position)
    return table


def pairs_of(known: Array, draws: int = 0) -> Array:
    """``E[x_i x_j]`` of a known array by the axes on which i and j are equal; axes of size 1 stay as they are.

    Zeros where there is no entry. ``draws``: how many axes in front are averaged over.
    """
    shape = known.shape[draws:]
    if known.size == 0:
        return np.zeros([1 if size == 1 else 2 for size in shape])
    varying = tuple(size for size in shape if size > 1)
    table = spread_pairs(_over_pairs(known.reshape(known.shape[:draws] + varying), draws), varying)
    return table.reshape([2 if size > 1 else 1 for size in shape])


def averaged(known: Array, axis: int) -> Array:
    """Mean over an axis, which stays with size 1: numpy's own goes entry by entry where little lies behind the axis."""
    size, behind = known.shape[axis], math.prod(known.shape[axis + 1 :])
    each = np.full((1, size), 1.0 / size)
    blocks = known.reshape(-1, size) @ each.T if behind == 1 else each @ known.reshape(-1, size, behind)
    return np.asarray(blocks.reshape((*known.shape[:axis], 1, *known.shape[axis + 1 :])))


def _over_pairs(known: Array, position: int = 0) -> Array:
    """Averages over all pairs of entries that are equal on some of the axes from a position on, and on all before it."""
    if position == known.ndim:
        return np.asarray(np.vdot(known, known) / known.size)
    return np.stack([_over_pairs(averaged(known, position), position + 1), _over_pairs(known, position + 1)])
