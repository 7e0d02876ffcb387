"""Elements per second of drawing: every distribution and element type, shards, matrices; against torch and against memory.

python -m benchmarks.apply [--only fills|numpy|shards]

Ours, torch's and plain writing (``Tensor.fill_``) take turns in one process, so that whatever else the machine does meets all
three. Shards and matrices are drawn on one thread, without saving old values, as ``materialize`` does. Writes
benchmarks/results/apply.json; what is left out by --only stays there as it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from benchmarks.fills import MATRIX, SIZE, STD, measure_by_numpy, measure_fills
from benchmarks.tables import RESULTS, machine, plain_table
from rich.console import Console

from gainstage.apply.box import Box, grid_boxes, whole_box
from gainstage.apply.stage import drawing_tasks
from gainstage.plan import Distribution, Family, ParameterPlan

REPETITIONS = 5
DRAWING = RESULTS / "apply.json"


def main() -> None:
    """Measure, print, write."""
    measurements: Mapping[str, Callable[[], list[dict[str, Any]]]] = {
        "fills": lambda: [asdict(fill) for fill in measure_fills()],
        "numpy": lambda: [asdict(fill) for fill in measure_by_numpy()],
        "shards": lambda: list(measure_shards()),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=measurements)
    only = parser.parse_args().only
    results = json.loads(DRAWING.read_text(encoding="utf-8")) if only and DRAWING.exists() else {}
    console = Console(width=100)
    for name, measure in measurements.items():
        if only in (None, name):
            results[name] = {"machine": machine(), "rows": measure()}
            title, layout = TABLES[name]
            console.print(plain_table(title, *layout(results[name]["rows"])), "")
            console.print(f"load average at the start: {results[name]['machine']['load']}\n")
            DRAWING.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure_shards() -> Iterator[dict[str, Any]]:
    """Milliseconds for parts of a parameter."""
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
        for name, taken in times.items():
            yield {"family": family.value, "size": size, "part": name, "ms": taken, "share": taken / times["the whole"]}


def _drawing(planned: ParameterPlan, boxes: Sequence[Box]) -> Callable[[], None]:
    memory = torch.zeros(sum(torch.Size(box.sizes).numel() for box in boxes))

    def draw() -> None:
        for tasks in drawing_tasks(planned, 0, boxes, memory):
            for task in tasks:
                task.draw()

    return draw


def _best(call: Callable[[], None]) -> float:
    """Processor time in milliseconds, which other programs disturb least."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = []
    for _ in range(REPETITIONS):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    torch.set_num_threads(before)
    return 1e3 * min(taken)


def fills_table(fills: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows: millions of elements per second, and how many times torch's."""
    headings = ("distribution", "type", "threads", "gainstage", "torch", "writing", "times faster", "median", "processor")
    return headings, [
        (
            fill["family"].replace("_", " "),
            fill["dtype"],
            str(fill["threads"]),
            *(f"{fill['size'] ** 2 / 1e3 / fill[time]:.0f}" for time in ("ours", "torch", "memory")),
            f"{fill['torch'] / fill['ours']:.2f}",
            f"{fill['ratio']:.2f}",
            f"{fill['ours_processor'] / fill['torch_processor']:.2f}",
        )
        for fill in fills
    ]


def shards_table(shards: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows."""
    return ("parameter", "part", "processor ms", "of the whole"), [
        (f"{row['family']}, {row['size']} x {row['size']}", row["part"], f"{row['ms']:.1f}", f"{row['share']:.0%}")
        for row in shards
    ]


TABLES: Mapping[str, tuple[str, Callable[[Any], tuple[Sequence[str], Sequence[Sequence[str]]]]]] = {
    "fills": (f"Millions of elements per second: {SIZE} x {SIZE} in place, orthogonal {MATRIX} x {MATRIX}", fills_table),
    "numpy": ("The same by NumPy alone, as where numba is not installed", fills_table),
    "shards": ("Parts of a parameter", shards_table),
}


if __name__ == "__main__":
    main()
