"""Seconds and memory of every stage, and plans of models too large to build.

python -m benchmarks.speed [--only stages|large]

Every model runs in a process of its own, one after another, with as many threads as OMP_NUM_THREADS says. Writes
benchmarks/results/speed.json; what is left out by --only stays there as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import large, stages
from benchmarks.tables import RESULTS, machine, plain_table
from rich.console import Console
from rich.table import Table

SPEED = RESULTS / "speed.json"


def main() -> None:
    """Measure, print, write."""
    measurements: Mapping[str, Callable[[], Any]] = {
        "stages": lambda: [_in_process("benchmarks.stages", name) for name in stages.MODELS],
        "large": lambda: [_in_process("benchmarks.large", name) for name in large.MODELS],
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=measurements)
    only = parser.parse_args().only
    results = json.loads(SPEED.read_text(encoding="utf-8")) if only and SPEED.exists() else {}
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100)
    for name, measure in measurements.items():
        if only in (None, name):
            results[name] = {"machine": machine(), "rows": measure()}
            console.print(_TABLES[name](results[name]["rows"]), "")
    SPEED.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {SPEED.relative_to(Path.cwd()) if SPEED.is_relative_to(Path.cwd()) else SPEED}")


def _in_process(module: str, *arguments: str) -> Any:
    """What a module prints as JSON. This process stays small: a child's peak memory starts at that of its parent."""
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return json.loads(result.stdout.splitlines()[-1])


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
    return ("model, on meta", "parameters", "work", "seconds", "processor s", "peak MB", "of that libraries"), [
        (
            plan["model"],
            f"{plan['parameters'] / 1e9:.0f} billion",
            plan["work"] + (f": {plan['outcome']}" if plan["outcome"] else ""),
            f"{plan['seconds']:.1f}",
            f"{plan['processor_seconds']:.1f}",
            f"{plan['peak_megabytes']:.0f}",
            f"{plan['libraries_megabytes']:.0f}",
        )
        for plan in plans
    ]


_TABLES: Mapping[str, Callable[[Any], Table]] = {
    "stages": lambda timings: plain_table("Stages, training mode, best of several", *stages_table(timings)),
    "large": lambda plans: plain_table("Without weights", *large_table(plans)),
}


if __name__ == "__main__":
    main()
