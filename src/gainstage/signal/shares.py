"""Shares of something about vectors along some axes: how much less their norms stray, how much of a direction is gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gainstage.signal.axes import Axis


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """A share of something about vectors along some axes; ``of_sum``: of a direction that is gone, that of the sum of entries."""

    axes: frozenset[Axis]
    share: float
    of_sum: float = 0.0

    def over(self, axes: Sequence[Axis]) -> float:
        """The share for vectors along these axes; nothing is known of others."""
        return self.share if self.axes == frozenset(axes) else 0.0


def gone(part: Share | None, axes: Sequence[Axis]) -> tuple[float, float]:
    """The share of a direction for vectors along these axes, and that of the sum; 1 at most."""
    if part is None or part.axes != frozenset(axes):
        return 0.0, 0.0
    return min(part.share, 1.0), min(part.of_sum, 1.0)


def times(part: Share | None, factor: float) -> Share | None:
    """The share, times a number."""
    return None if part is None else Share(part.axes, part.share * factor, part.of_sum * factor)


def added(x_axes: Sequence[Axis], y_axes: Sequence[Axis], of_x: Share | None, of_y: Share | None) -> Share | None:
    """Sum of the shares of two aligned tensors, along the axes for which it is the largest, as the first names them."""
    found: dict[frozenset[Axis], tuple[float, float]] = {}
    names = dict(zip(y_axes, x_axes, strict=True))
    for part in (of_x, of_y):
        if part is not None:
            axes = frozenset(names.get(axis, axis) for axis in part.axes)
            share, of_sum = found.get(axes, (0.0, 0.0))
            found[axes] = share + part.share, of_sum + part.of_sum
    largest = max(found, key=lambda axes: found[axes][0], default=None)
    return None if largest is None else Share(largest, *found[largest])


def steady_after_dropout(part: Share | None, keep: float) -> Share | None:
    """Of the variance of squared norms that was missing, what still is.

    Dropout brings ``(1/keep - 1) E[x^4]`` for each entry, where free entries have ``2 E[x^2]^2``.
    """
    return None if part is None else Share(part.axes, max(part.share - 1.5 * (1.0 / keep - 1.0), 0.0))
