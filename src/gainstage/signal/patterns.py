"""Known arrays: what pairs of their entries share, by coordinates that are equal."""

from __future__ import annotations

import numpy as np

from gainstage.signal.quadrature import Array


def spread_pairs(averaged: Array, sizes: tuple[int, ...]) -> Array:
    """Turn averages over all pairs into averages over pairs that differ.

    In ``averaged`` index 0 of an axis means "averaged over all pairs of coordinates", equal ones included, which is
    ``K[0] + (K[1] - K[0]) / n``; solved for ``K[0]`` along each axis of size n.
    """
    table = averaged.copy()
    for position, size in enumerate(sizes):
        same, mixed = np.take(table, 1, axis=position), np.take(table, 0, axis=position)
        table = np.stack([(size * mixed - same) / (size - 1), same], axis=position)
    return table


def pairs_of(known: Array) -> Array:
    """``E[x_i x_j]`` of a known array by the axes on which i and j are equal; axes of size 1 stay as they are.

    Zeros where there is no entry.
    """
    if known.size == 0:
        return np.zeros([1 if size == 1 else 2 for size in known.shape])
    varying = tuple(size for size in known.shape if size > 1)
    table = spread_pairs(_over_pairs(known.reshape(varying)), varying)
    return table.reshape([2 if size > 1 else 1 for size in known.shape])


def _over_pairs(known: Array, position: int = 0) -> Array:
    """Averages over all pairs of entries that are equal on some of the axes from a position on, and on all before it."""
    if position == known.ndim:
        return np.asarray(np.vdot(known, known) / known.size)
    others = known.mean(axis=position, keepdims=True)
    return np.stack([_over_pairs(others, position + 1), _over_pairs(known, position + 1)])
