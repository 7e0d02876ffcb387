"""Drawing one parameter: which parts it has, and in which pieces they are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gainstage.apply.draw import draw_matrix, draw_range
from gainstage.apply.stream import Stream, stream_of
from gainstage.plan import Distribution, Family, ParameterPlan

# Entries per task: long enough (5 ms) to hide what a task costs, short enough to share among threads.
_TASK = 2**20

# Entries per conversion into another type: below torch's limit for going parallel, as the caller's threads are parallel.
_CONVERSION = 2**15

_UNIT_NORMAL = Distribution(family=Family.NORMAL, std=1.0)


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work: ``draw`` fills ``target``, a view of the parameter's values that no other task touches."""

    target: torch.Tensor
    draw: Callable[[], None]


def drawing_tasks(planned: ParameterPlan, seed: int, values: torch.Tensor) -> tuple[list[Task], list[Task]]:
    """Tasks that draw the values of one parameter. Entries that are to be kept belong to none.

    Args:
        planned: what to draw.
        seed: any integer.
        values: where to; contiguous, on the CPU, in the parameter's shape and type.

    Returns:
        tasks that need linear algebra, and tasks that do not. All are independent of each other.
    """
    stream = stream_of(seed, planned.name)
    matrices: list[Task] = []
    ranges: list[Task] = []
    for dim, start, stop, distribution in _parts(planned):
        if distribution.family is Family.KEEP:
            continue
        if distribution.family.is_matrix:
            part = values.narrow(dim, start, stop - start)
            matrices.append(_matrix_task(planned, stream, distribution, part, (dim, start, stop)))
        else:
            ranges += _range_tasks(stream, distribution, values, (dim, start, stop))
    return matrices, ranges


def _parts(planned: ParameterPlan) -> Iterator[tuple[int, int, int, Distribution]]:
    """Blocks and the gaps between them: dimension, start, stop, distribution."""
    dim = planned.blocks[0].dim if planned.blocks else 0
    end = 0
    for block in planned.blocks:
        if end < block.start:
            yield dim, end, block.start, planned.distribution
        yield dim, block.start, block.stop, block.distribution
        end = block.stop
    size = planned.shape[dim] if planned.shape else 1
    if end < size:
        yield dim, end, size, planned.distribution


def _matrix_task(
    planned: ParameterPlan, stream: Stream, distribution: Distribution, part: torch.Tensor, place: tuple[int, int, int]
) -> Task:
    dim, start, stop = place

    def draw() -> None:
        normals = torch.empty(planned.shape, dtype=_compute_type(part.dtype))
        for task in _range_tasks(stream, _UNIT_NORMAL, normals, place):
            task.draw()
        part.copy_(draw_matrix(distribution, normals.narrow(dim, start, stop - start), planned.output_dims))

    return Task(part, draw)


def _compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _range_tasks(stream: Stream, distribution: Distribution, values: torch.Tensor, place: tuple[int, int, int]) -> Iterator[Task]:
    """Entries of ``start <= index < stop`` along ``dim``, for [outer, size, inner] the values tensor."""
    dim, start, stop = place
    shape = values.shape or (1,)
    outer, size, inner = math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])
    if outer == 1 or stop - start == size:
        flat = values.view(-1)
        first, last = (start * inner, stop * inner) if outer == 1 else (0, flat.numel())
        for begin in range(first, last, _TASK):
            yield _run_task(stream, distribution, flat, begin, min(begin + _TASK, last))
        return
    rows = max(1, _TASK // (size * inner))
    for row in range(0, outer, rows):
        yield _strip_task(stream, distribution, values.view(outer, size, inner), (row, min(row + rows, outer)), (start, stop))


def _run_task(stream: Stream, distribution: Distribution, flat: torch.Tensor, begin: int, end: int) -> Task:
    """A run of entries that lie side by side."""
    target = flat[begin:end]

    def draw() -> None:
        if target.dtype == _compute_type(target.dtype):
            draw_range(distribution, stream, begin, end, target.numpy())
        else:
            _convert(torch.from_numpy(draw_range(distribution, stream, begin, end)), target)

    return Task(target, draw)


def _strip_task(
    stream: Stream, distribution: Distribution, values: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]
) -> Task:
    """Some columns of some rows of [outer, size, inner]. All columns are drawn: short runs would cost more than they save."""
    (top, bottom), (start, stop) = rows, columns
    target = values[top:bottom, start:stop]

    def draw() -> None:
        strip = torch.empty((bottom - top, *values.shape[1:]), dtype=_compute_type(values.dtype))
        row = strip[0].numel()
        draw_range(distribution, stream, top * row, bottom * row, strip.view(-1).numpy())
        for index in range(bottom - top):
            _convert(strip[index, start:stop].view(-1), target[index].view(-1))

    return Task(target, draw)


def _convert(drawn: torch.Tensor, target: torch.Tensor) -> None:
    """Round once, into the parameter's type."""
    for offset in range(0, drawn.numel(), _CONVERSION):
        target[offset : offset + _CONVERSION].copy_(drawn[offset : offset + _CONVERSION])
