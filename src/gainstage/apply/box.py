"""Which entries of a parameter a process holds, and where: boxes of the whole, in its own memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a parameter's entries, and their place in the contiguous memory of this process.

    Args:
        bounds: first index and one past the last, for each dimension of the whole parameter; a scalar has the one (0, 1).
        offset: element of the memory that holds the first entry.
        strides: elements from one entry to the next, for each dimension.
    """

    bounds: tuple[tuple[int, int], ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries along each dimension."""
        return tuple(stop - start for start, stop in self.bounds)

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The entries, as a view of contiguous memory."""
        return memory.as_strided(self.sizes, self.strides, memory.storage_offset() + self.offset)

    def part(self, dim: int, start: int, stop: int) -> Box | None:
        """What lies at ``start <= index < stop`` along ``dim``; None where nothing does."""
        low, high = max(self.bounds[dim][0], start), min(self.bounds[dim][1], stop)
        if low >= high:
            return None
        bounds = (*self.bounds[:dim], (low, high), *self.bounds[dim + 1 :])
        return Box(bounds, self.offset + (low - self.bounds[dim][0]) * self.strides[dim], self.strides)

    def runs(self, shape: Sequence[int]) -> tuple[NDArray[np.int64], int]:
        """Runs of entries that are neighbours in the row-major order of the whole, in the row-major order of the box.

        Args:
            shape: of the whole parameter.

        Returns:
            index of the first entry of each run in the whole, ascending; length of every run.
        """
        full = len(shape)
        while full and self.sizes[full - 1] == shape[full - 1]:
            full -= 1
        whole = row_major_strides(shape)
        outer = max(0, full - 1)
        starts = np.array([sum(low * step for (low, _), step in zip(self.bounds, whole, strict=True))], np.int64)
        for (low, high), step in zip(self.bounds[:outer], whole, strict=False):
            starts = np.add.outer(starts, np.arange(high - low, dtype=np.int64) * step).ravel()
        return starts, math.prod(self.sizes[outer:])


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one entry to the next along each dimension of contiguous memory."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def grid_boxes(ranges: Sequence[Sequence[tuple[int, int]]]) -> list[Box]:
    """Boxes of a memory that holds, along each dimension, some ranges of the whole's indices, one after another."""
    strides = row_major_strides([sum(stop - start for start, stop in along) for along in ranges])
    placed = []
    for along in ranges:
        ends = list(itertools.accumulate((stop - start for start, stop in along), initial=0))
        placed.append(list(zip(along, ends, strict=False)))
    return [
        Box(
            tuple(bounds for bounds, _ in chosen),
            sum(place * step for (_, place), step in zip(chosen, strides, strict=True)),
            strides,
        )
        for chosen in itertools.product(*placed)
    ]


def whole_box(shape: Sequence[int]) -> Box:
    """All entries, in contiguous memory."""
    shape = tuple(shape) or (1,)
    return Box(tuple((0, size) for size in shape), 0, row_major_strides(shape))


def run_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Boxes of a memory that holds the entries ``start <= k < stop`` of the row-major order, side by side."""
    shape = tuple(shape) or (1,)
    boxes, offset = [], 0
    for bounds in _run_bounds(shape, start, stop):
        sizes = [high - low for low, high in bounds]
        boxes.append(Box(bounds, offset, row_major_strides(sizes)))
        offset += math.prod(sizes)
    return boxes


def _run_bounds(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """The end of a first row, whole rows, the beginning of a last row; rows are cut the same way."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # both ends in one row
        for bounds in _run_bounds(shape[1:], start - last * row, stop - last * row):
            yield ((last, last + 1), *bounds)
        return
    for bounds in _run_bounds(shape[1:], start - (first - 1) * row, row) if start < first * row else ():
        yield ((first - 1, first), *bounds)
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
    for bounds in _run_bounds(shape[1:], 0, stop - last * row):
        yield ((last, last + 1), *bounds)
