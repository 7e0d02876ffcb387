"""Seconds and memory of every stage, fills against ``torch.nn.init``, and plans of models too large to build.

python -m benchmarks.speed [--only stages|fills|large]

Every model runs in a process of its own, one after another, with as many threads as OMP_NUM_THREADS says. Writes
benchmarks/results/speed.json; what is left out by --only stays there as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks import large, stages
from benchmarks.fills import SIZE
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).with_name("results") / "speed.json"


def main() -> None:
    """Measure, print, write."""
    measurements: Mapping[str, Callable[[], Any]] = {
        "fills": lambda: _in_process("benchmarks.fills"),
        "stages": lambda: [_in_process("benchmarks.stages", name) for name in stages.MODELS],
        "large": lambda: [_in_process("benchmarks.large", name) for name in large.MODELS],
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=measurements)
    only = parser.parse_args().only
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if only and RESULTS.exists() else {}
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100)
    for name, measure in measurements.items():
        if only in (None, name):
            results[name] = {"machine": _machine(), "rows": measure()}
            console.print(_TABLES[name](results[name]["rows"]), "")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")


def _in_process(module: str, *arguments: str) -> Any:
    """What a module prints as JSON. This process stays small: a child's peak memory starts at that of its parent."""
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return json.loads(result.stdout.splitlines()[-1])


def _machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def fills_table(fills: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows."""
    return ("distribution", "type", "threads", "gainstage, ms", "torch, ms", "times faster"), [
        (
            fill["family"].replace("_", " "),
            fill["dtype"],
            str(fill["threads"]),
            f"{fill['ours_ms']:.0f}",
            f"{fill['torch_ms']:.0f}",
            f"{fill['torch_ms'] / fill['ours_ms']:.1f}",
        )
        for fill in fills
    ]


def stages_table(timings: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows: a row for each stage of each model. Ratios are of processor time."""
    return ("model", "stage", "seconds", "processor s", "/ forward pass", "/ constructor", "peak + MB"), [
        (
            timing["model"],
            stage["name"],
            f"{stage['seconds']:.2f}",
            f"{stage['processor_seconds']:.2f}",
            f"{stage['processor_seconds'] / timing['forward']['processor_seconds']:.2f}",
            f"{stage['processor_seconds'] / timing['build']['processor_seconds']:.2f}",
            f"{stage['megabytes']:.0f}",
        )
        for timing in timings
        for stage in (*timing["stages"], timing["forward"], timing["build"])
    ]


def large_table(plans: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows."""
    return ("model, on meta", "parameters", "plan, seconds", "processor s", "peak MB", "of that libraries"), [
        (
            plan["model"],
            f"{plan['parameters'] / 1e9:.0f} billion",
            f"{plan['seconds']:.1f}",
            f"{plan['processor_seconds']:.1f}",
            f"{plan['peak_megabytes']:.0f}",
            f"{plan['libraries_megabytes']:.0f}",
        )
        for plan in plans
    ]


_TABLES: Mapping[str, Callable[[Any], Table]] = {
    "fills": lambda fills: _table(f"Drawing {SIZE} x {SIZE} in place, best of several", *fills_table(fills)),
    "stages": lambda timings: _table("Stages, training mode, best of several", *stages_table(timings)),
    "large": lambda plans: _table("Planning without weights", *large_table(plans)),
}


if __name__ == "__main__":
    main()
