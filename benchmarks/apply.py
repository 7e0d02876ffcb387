"""Elements per second of drawing: every distribution and element type, shards, matrices; against torch and against memory.

python -m benchmarks.apply

Torch's fills and ours are measured in turn, in one process. "memory" is the speed of ``Tensor.fill_``: what writing the same
bytes costs at all. Shards and matrices are drawn on one thread, without saving old values, as ``materialize`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from benchmarks.fills import SIZE, STD, Fill, measure_fills, seconds
from rich.console import Console
from rich.table import Table

from gainstage.apply.box import Box, grid_boxes, whole_box
from gainstage.apply.stage import drawing_tasks
from gainstage.plan import Distribution, Family, ParameterPlan

REPETITIONS = 5
MATRIX = 1024  # an orthogonal matrix takes the cube of its size


def main() -> None:
    """Print the tables."""
    console = Console(width=100)
    memory = {(dtype, threads): memory_speed(dtype, threads) for dtype in ("float32", "bfloat16") for threads in (1, 2)}
    fills = Table(title=f"Millions of elements per second, {SIZE} x {SIZE} in place, best of several")
    for column in ("distribution", "type", "threads", "gainstage", "torch.nn.init", "ratio", "memory"):
        fills.add_column(column, justify="left" if column in {"distribution", "type"} else "right")
    for fill in measure_fills():
        fills.add_row(*fill_row(fill, memory[fill.dtype, fill.threads]))
    console.print(fills)
    shards = Table(title="Part of a parameter: milliseconds, and share of what the whole takes")
    for column in ("parameter", "part", "ms", "of the whole"):
        shards.add_column(column, justify="left" if column in {"parameter", "part"} else "right")
    for row in shard_rows():
        shards.add_row(*row)
    console.print(shards)


def fill_row(fill: Fill, memory: float) -> Sequence[str]:
    """A row of the first table."""
    ours, theirs = (SIZE**2 / 1e3 / milliseconds for milliseconds in (fill.ours_ms, fill.torch_ms))
    name = fill.family.replace("_", " ")
    return name, fill.dtype, str(fill.threads), f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}", f"{memory:.0f}"


def memory_speed(dtype: str, threads: int) -> float:
    """Millions of elements per second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    tensor = torch.empty(SIZE, SIZE, dtype=getattr(torch, dtype))
    best = min(seconds(lambda: tensor.fill_(1.0)) for _ in range(REPETITIONS + 1))  # the first also maps the memory
    torch.set_num_threads(before)
    return SIZE**2 / 1e6 / best


def shard_rows() -> Iterator[Sequence[str]]:
    """Rows of the second table."""
    for family, size in ((Family.NORMAL, SIZE), (Family.ORTHOGONAL, MATRIX)):
        planned = ParameterPlan(
            name="w", shape=(size, size), dtype="float32", role="", distribution=Distribution(family=family, std=STD)
        )
        everything = [(0, size)]
        parts: dict[str, list[Box]] = {
            "the whole": [whole_box((size, size))],
            "an eighth of the rows": grid_boxes([[(0, size // 8)], everything]),
            "an eighth of the columns": grid_boxes([everything, [(0, size // 8)]]),
            "one column": grid_boxes([everything, [(0, 1)]]),
        }
        times = {name: _best(_drawing(planned, boxes)) for name, boxes in parts.items()}
        for name, time in times.items():
            yield f"{family.value}, {size} x {size}", name, f"{1e3 * time:.1f}", f"{time / times['the whole']:.0%}"


def _drawing(planned: ParameterPlan, boxes: Sequence[Box]) -> Callable[[], None]:
    count = sum(torch.Size(box.sizes).numel() for box in boxes)

    def draw() -> None:
        memory = torch.empty(count)
        for tasks in drawing_tasks(planned, 0, boxes, memory):
            for task in tasks:
                task.draw()

    return draw


def _best(call: Callable[[], None]) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    best = min(seconds(call) for _ in range(REPETITIONS))
    torch.set_num_threads(before)
    return best


if __name__ == "__main__":
    main()
