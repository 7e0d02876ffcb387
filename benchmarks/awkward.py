"""The 34 awkward models: how each is captured, and what is predicted of a planned one against draws.

python -m benchmarks.awkward [--only moe] [--draws 16]

Error of a module output: ``|log(predicted / mean over draws of the mean square)|``; beside it the largest standard error of
these means. Draws are anew in weights (``gs.apply``) and in inputs.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from benchmarks.measure import forward_pass, one_thread
from benchmarks.zoo.awkward import awkward_models
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gainstage as gs
from gainstage.api.operations import operations
from gainstage.capture import capture
from gainstage.report.ops import count_ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One module output: predicted second moment and spread, and the mean square in each draw."""

    key: str
    predicted: float
    spread: float
    measured: tuple[float, ...]

    @property
    def error(self) -> float:
        """``|log(predicted / mean)|``; 0 where both are nothing."""
        mean = float(np.mean(self.measured))
        if max(self.predicted, mean) < 1e-30:
            return 0.0
        return abs(math.log(self.predicted / mean)) if min(self.predicted, mean) > 0.0 else math.inf

    @property
    def standard_error(self) -> float:
        """Of the log of the mean over draws: from the predicted spread or the draws themselves, whichever is more."""
        strays = float(np.std(self.measured, ddof=1) / max(np.mean(self.measured), 1e-300))
        return float(max(strays, self.spread) / len(self.measured) ** 0.5)


def compare(name: str, draws: int) -> list[Output]:
    """Plan a model, and compare what the plan predicts with draws of it; outputs that are missing in a draw are left out."""
    build = awkward_models()[name]
    first = build(0)
    plan = gs.plan(first.model, first.args, first.kwargs)
    passes: list[Mapping[str, tuple[str, float]]] = []
    for seed in range(1, draws + 1):
        example = build(seed)
        with torch.no_grad():
            example.model(*example.args, **(example.kwargs or {})) if name == "lazy" else None
        gs.apply(example.model, plan, seed=seed)
        with torch.compiler.set_stance("force_eager"):
            passes.append(forward_pass(example, with_grad=name == "pinn"))
    keys = [key for key, values in plan.predictions.items() if values and all(key in found for found in passes)]
    return [
        Output(
            key=key,
            predicted=plan.predictions[key][0],
            spread=plan.spreads[key][0],
            measured=tuple(found[key][1] for found in passes),
        )
        for key in keys
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a model's name")
    parser.add_argument("--draws", type=int, default=16)
    options = parser.parse_args()
    one_thread()
    warnings.simplefilter("ignore")
    headings = ("model", "rung", "nodes", "ruled", "sampled", "capture s", "outputs", "error p50", "largest", "standard error")
    table = Table(*headings, title=f"awkward models, planned with 'unit', {options.draws} draws")
    for name, build in track(
        [item for item in awkward_models().items() if options.only in item[0]], console=Console(stderr=True)
    ):
        example = build(0)
        start = time.perf_counter()
        graph = capture(example.model, example.args, example.kwargs)
        seconds = time.perf_counter() - start
        rows = count_ops(graph, operations(example.model, example.args, example.kwargs).sampled)
        treated = {kind: sum(row.count for row in rows if row.treatment == kind) for kind in ("ruled", "sampled")}
        outputs = compare(name, options.draws)
        errors = [output.error for output in outputs]
        stray = max(output.standard_error for output in outputs)
        table.add_row(
            name, graph.rung, str(len(graph.nodes)), str(treated["ruled"]), str(treated["sampled"]), f"{seconds:.1f}",
            str(len(outputs)), f"{np.median(errors):.1%}", f"{max(errors):.1%}", f"{stray:.1%}",
        )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
