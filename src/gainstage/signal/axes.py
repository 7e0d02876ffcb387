"""Axes: the coordinates of a tensor, kept apart however the tensor is reshaped.

A dimension of a tensor is an ordered tuple of axes: ``channel = (heads, head_dim)`` after a view, ``()`` for size 1. An axis
is an identity with a size. Splitting, slicing or rolling the same axis the same way gives the same new axis, so
that two tensors that took equal steps still share their coordinates.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

Dim = tuple["Axis", ...]


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """One coordinate of a tensor: an identity, with the number of values it takes."""

    size: int
    parent: Axis | None = None
    steps: dict[tuple[object, ...], tuple[Axis, ...]] = field(default_factory=dict, repr=False)

    def split(self, sizes: tuple[int, ...]) -> tuple[Axis, ...]:
        """Axes of the given sizes (outermost first) whose product is this axis."""
        assert prod(sizes) == self.size, f"cannot split {self.size} into {sizes}"
        return self._step(("split", sizes), sizes)

    def part(self, start: int, stop: int, step: int) -> Axis:
        """Return the axis of a slice."""
        return self._step(("part", start, stop, step), (len(range(start, stop, step)),))[0]

    def reordered(self, key: object) -> Axis:
        """Axis with the same values in another order (roll, flip); ``key`` names the order."""
        return self._step(("order", key), (self.size,))[0]

    def twin(self) -> Axis:
        """Axis of the same size that stands beside this one in one tensor: queries and keys of the same positions."""
        return self._step(("twin",), (self.size,))[0]

    def crossed(self) -> Axis:
        """Axis of the same size for a tensor that meets this one's in rows and columns."""
        return self._step(("crossed",), (self.size,))[0]

    def _step(self, key: tuple[object, ...], sizes: tuple[int, ...]) -> tuple[Axis, ...]:
        if key not in self.steps:
            self.steps[key] = tuple(Axis(size, parent=self) for size in sizes)
        return self.steps[key]


def descends(axis: Axis, axes: Collection[Axis]) -> bool:
    """Tell whether an axis is one of these, or was made of one of them by splits, slices and the like."""
    origin: Axis | None = axis
    while origin is not None and origin not in axes:
        origin = origin.parent
    return origin is not None


def new_dims(shape: tuple[int, ...]) -> tuple[Dim, ...]:
    """Fresh axes, one for each dimension of a shape; none for a dimension of size 1."""
    return tuple((Axis(size),) if size != 1 else () for size in shape)


@lru_cache(maxsize=1024)  # dimensions are handed on from tensor to tensor, and asked for this at each step
def axes_of(dims: tuple[Dim, ...]) -> tuple[Axis, ...]:
    """All axes in order: the axes of a table."""
    return tuple(axis for dim in dims for axis in dim)


def distinct(dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Dimensions in which no axis stands twice."""
    seen: set[Axis] = set()
    result: list[Dim] = []
    for dim in dims:
        axes = []
        for axis in dim:
            while axis in seen:
                axis = axis.twin()  # noqa: PLW2901
            seen.add(axis)
            axes.append(axis)
        result.append(tuple(axes))
    return tuple(result)


@lru_cache(maxsize=1024)
def shape_of(dims: tuple[Dim, ...]) -> tuple[int, ...]:
    """Shape of a tensor with these dimensions."""
    return tuple(prod(axis.size for axis in dim) for dim in dims)
