"""Cyclic shifts. Positions get other names; windows of positions get other members."""

from __future__ import annotations

import numpy as np

from gainstage.signal.axes import Axis
from gainstage.signal.copies import replace
from gainstage.signal.movement import map_tables, merge_dim
from gainstage.signal.quadrature import Array
from gainstage.signal.value import Value


def roll(x: Value, dim: int, shift: int) -> Value:
    """Cyclic shift along a dimension; shifting back restores its axes.

    A dimension of windows and places in a window keeps both: of two places in one window after the shift, a share f was in one
    window before, the rest in two.
    """
    axes = x.dims[dim]
    if len(axes) > 2:
        x = merge_dim(x, dim)
        axes = x.dims[dim]
    if not axes or shift % x.shape[dim] == 0:
        return x
    made = tuple(_rolled(axis, shift % x.shape[dim], x.shape[dim]) for axis in axes)
    dims = tuple(made if d == dim else kept for d, kept in enumerate(x.dims))
    position = x.axes.index(axes[0])
    profile = _rolled_levels(x.levels, position, tuple(axis.size for axis in axes), shift)
    if len(axes) == 1:
        return map_tables(x, dims, lambda table: table, profile)
    together = _kept_together(axes[1].size, shift)

    def change(table: Array) -> Array:
        return _regrouped(table, position, axes[0].size, together)

    moved = map_tables(replace(x, amplitude=None, tilt=None), dims, change, profile)
    return replace(moved, source=object(), gram=None)


def _rolled_levels(levels: Array | None, position: int, sizes: tuple[int, ...], shift: int) -> Array | None:
    """Levels along an axis, or along windows and places in them, after a shift."""
    stop = position + len(sizes)
    if levels is None or levels.shape[position:stop] == (1,) * len(sizes):
        return levels
    before, after = levels.shape[:position], levels.shape[stop:]
    along = np.broadcast_to(levels, (*before, *sizes, *after)).reshape(*before, -1, *after)
    return np.roll(along, shift, axis=position).reshape(*before, *sizes, *after)


def _rolled(axis: Axis, shift: int, period: int) -> Axis:
    """Axis under another name for every shift; 0 is the axis itself."""
    origin, done = axis, 0
    parent = axis.parent
    for key, made in parent.steps.items() if parent else ():
        if key[0] == "rolled" and made[0] is axis and parent is not None:
            origin, done = parent, int(str(key[1]))
    total = (done + shift) % period
    return origin if total == 0 else origin.steps.setdefault(("rolled", total), (Axis(axis.size, parent=origin),))[0]


def _kept_together(size: int, shift: int) -> float:
    """Share of the pairs of places in one window that were in one window before."""
    first = shift % size
    pieces = (first, size - first)
    return sum(n * (n - 1) for n in pieces) / (size * (size - 1))


def _regrouped(table: Array, position: int, windows: int, together: float) -> Array:
    """Table over windows and places (two axes from ``position`` on) after a shift; averages over all pairs are kept."""
    moved = np.moveaxis(table, (position, position + 1), (0, 1))
    result = moved.copy()
    gone = (1.0 - together) / (windows - 1)
    result[1, 0] = together * moved[1, 0] + (1.0 - together) * moved[0, 0]
    result[0, 0] = gone * moved[1, 0] + (1.0 - gone) * moved[0, 0]
    return np.moveaxis(result, (0, 1), (position, position + 1))
