"""Drawing one parameter: which parts it has, and in which pieces they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.apply import device
from gainstage.apply.box import Box, whole_box
from gainstage.apply.draw import draw_matrix, draw_mixed, draw_runs
from gainstage.apply.law import TYPES
from gainstage.apply.runs import CONVERSION, pieces
from gainstage.apply.stream import Stream, stream_of
from gainstage.plan import Distribution, Family, ParameterPlan

# Entries per task: long enough (10 ms) to hide what a task costs, short enough to share among threads.
_TASK = 2**21

# Entries that are drawn before they are converted into another type: they stay in the cache.
_DRAWN = 2**18

_UNIT_NORMAL = Distribution(family=Family.NORMAL, std=1.0)


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work: ``draw`` fills ``targets``, views of the parameter's values that no other task touches."""

    targets: tuple[torch.Tensor, ...]
    draw: Callable[[], None]


def drawing_tasks(planned: ParameterPlan, seed: int, boxes: Sequence[Box], memory: torch.Tensor) -> tuple[list[Task], list[Task]]:
    """Tasks that draw the values of one parameter, or of a shard. Entries that are to be kept belong to none.

    Args:
        planned: what to draw.
        seed: any integer.
        boxes: which entries the memory holds.
        memory: where to; contiguous, in the parameter's type, on the CPU or where :func:`gainstage.apply.device.draws_on` says.

    Returns:
        tasks that need linear algebra, and tasks that do not. All are independent of each other.
    """
    stream = stream_of(seed, planned.name)
    matrices: list[Task] = []
    ranges: list[Task] = []
    for dim, start, stop, distribution in _parts(planned):
        if distribution.family is Family.KEEP:
            continue
        held = [part for box in boxes if (part := box.part(dim, start, stop)) is not None]
        if not held:
            continue
        if distribution.family.is_matrix:
            matrices.append(_matrix_task(planned, seed, (dim, start, stop, distribution), held, memory))
        elif distribution.mixing is not None:
            matrices += [_mixed_task(planned, seed, distribution, box, box.view(memory)) for box in held]
        else:
            ranges += [task for box in held for task in _box_tasks(stream, distribution, box, planned.shape, box.view(memory))]
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
    planned: ParameterPlan, seed: int, part: tuple[int, int, int, Distribution], held: Sequence[Box], memory: torch.Tensor
) -> Task:
    """The whole matrix is drawn wherever a part of it is held: its entries depend on one another."""
    dim, start, stop, distribution = part
    targets = tuple(box.view(memory) for box in held)
    matrix = whole_box(planned.shape).part(dim, start, stop)
    assert matrix is not None

    def draw() -> None:
        normals = torch.empty(matrix.sizes, dtype=_compute_type(memory.dtype))
        for task in _box_tasks(stream_of(seed, planned.name), _UNIT_NORMAL, matrix, planned.shape, normals):
            task.draw()
        drawn = draw_matrix(distribution, normals, planned.output_dims)
        for box, target in zip(held, targets, strict=True):
            spans = zip(box.bounds, matrix.bounds, strict=True)
            target.copy_(drawn[tuple(slice(low - first, high - first) for (low, high), (first, _) in spans)])

    return Task(targets, draw)


def _mixed_task(planned: ParameterPlan, seed: int, distribution: Distribution, box: Box, target: torch.Tensor) -> Task:
    """Rows are drawn where a part of them is held; their columns depend on one another."""
    mixing, output = distribution.mixing, planned.output_dims[0]
    assert mixing is not None

    def draw() -> None:
        rows, outputs = box.bounds[output], planned.shape[output]
        drawn = draw_mixed(mixing, stream_of(seed, mixing.stream), rows, outputs, _compute_type(target.dtype))
        others = [size for dim, size in enumerate(planned.shape) if dim != output]
        whole = (distribution.std * drawn).view(-1, *others).movedim(0, output)
        cut = [slice(None) if dim == output else slice(low, high) for dim, (low, high) in enumerate(box.bounds)]
        target.copy_(whole[tuple(cut)])

    return Task((target,), draw)


def _compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _box_tasks(
    stream: Stream, distribution: Distribution, box: Box, shape: Sequence[int], values: torch.Tensor
) -> Iterator[Task]:
    """Entries of one box, in pieces; ``values`` is where they go, in the shape of the box."""
    starts, length = box.runs(shape or (1,))
    try:
        rows = values.view(starts.size, length)
    except RuntimeError:  # two dimensions of the memory are held in part: no single stride leads from run to run
        dim = next(d for d, size in enumerate(values.shape) if size > 1)
        for index in range(values.shape[dim]):
            low = box.bounds[dim][0] + index
            part = box.part(dim, low, low + 1)
            assert part is not None
            yield from _box_tasks(stream, distribution, part, shape, values.narrow(dim, index, 1))
        return
    for some, columns in pieces((starts.size, length), _TASK):
        yield _runs_task(stream, distribution, starts[some] + columns.start, rows[some, columns])


def _runs_task(stream: Stream, distribution: Distribution, starts: NDArray[np.int64], target: torch.Tensor) -> Task:
    def draw() -> None:
        if target.device.type != "cpu":
            device.draw_runs(distribution, stream, starts, target)
            return
        if target.dtype in TYPES and target.is_contiguous():
            draw_runs(distribution, stream, starts, target)
            return
        room = torch.empty(min(_DRAWN, target.numel()), dtype=_compute_type(target.dtype))
        for rows, columns in pieces(target.shape, _DRAWN):
            part = target[rows, columns]
            drawn = room[: part.numel()].view(part.shape)
            draw_runs(distribution, stream, starts[rows] + columns.start, drawn)
            for piece in pieces(part.shape, CONVERSION):
                part[piece].copy_(drawn[piece])  # rounds once

    return Task((target,), draw)
