"""Predicted cosines of every module output, between samples, positions and channels, against the mean over draws.

python -m benchmarks.cosines [--only resnet] [--most 16]

For each dimension of a module's output with more than one coordinate: ``E[x_i x_j] / E[x^2]`` over all pairs of entries that
differ in that dimension and in no other. In one draw it is ``((sum x)^2 - sum x^2) / (n (n - 1))``, averaged over the other
dimensions, over the mean square; where positions are not alike, both are averages over all pairs of them. Models as they
initialise themselves; a prediction is the mean of those from the parameters' moments in INSPECTED draws, of tokens
INSPECTED_TOKENS. Error: of the mean over draws, absolute; where that mean has a standard error above SETTLED, it says nothing and
is left out. Writes benchmarks/results/cosines.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.measure import FEWEST, Measured, measured, module_outputs, one_thread
from benchmarks.zoo.reference import Example, reference_models
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import gainstage as gs
from gainstage.propagate import Signal

RESULTS = Path(__file__).with_name("results") / "cosines.json"
WITHIN = 0.02
SETTLED = 0.007  # so that three standard errors are about WITHIN
INSPECTED, INSPECTED_TOKENS = 4, 64  # which tokens two samples share is another thing in each draw
KINDS = ("samples", "other dimensions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One dimension of one module output."""

    module: str
    dim: int
    predicted: float
    measured: float
    standard_error: float

    @property
    def error(self) -> float:
        """Absolute."""
        return abs(self.predicted - self.measured)

    @property
    def kind(self) -> str:
        """Samples lie along dimension 0 of what nearly all modules return."""
        return KINDS[0] if self.dim == 0 else KINDS[1]


def cosine_pass(example: Example) -> dict[str, tuple[str, float]]:
    """``"path@call dim"`` -> type and cosine of the call's first floating-point output in one forward pass."""
    found: dict[str, tuple[str, float]] = {}

    def note(key: str, module: nn.Module, tensor: torch.Tensor) -> None:
        for dim, value in cosines(tensor).items():
            found[f"{key} {dim}"] = (type(module).__name__, value)

    with torch.no_grad(), module_outputs(example.model, note):
        example.model(*example.args, **(example.kwargs or {}))
    return found


def cosines(tensor: torch.Tensor) -> dict[int, float]:
    """Cosine of entries that differ in one dimension only, for each dimension of more than one coordinate; none of a zero."""
    x = tensor.double()
    squares = float(x.square().mean())
    if squares <= 0.0:
        return {}
    return {
        dim: (float(x.sum(dim).square().mean()) / n - squares) / (n - 1) / squares for dim, n in enumerate(tensor.shape) if n > 1
    }


def predicted(build: Callable[[int], Example]) -> dict[str, float]:
    """As :func:`cosine_pass`, without a pass."""
    found: dict[str, list[float]] = {}
    first = build(0)
    tokens = any(not value.is_floating_point() for value in (*first.args, *(first.kwargs or {}).values()))
    for seed in range(INSPECTED_TOKENS if tokens else INSPECTED):
        example = build(seed)
        for call in gs.inspect(example.model, example.args, example.kwargs, gradients=False).calls:
            for dim, value in _of_signal(call.outputs[0]).items() if call.outputs else ():
                found.setdefault(f"{call.path}@{call.call} {dim}", []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def _of_signal(signal: Signal) -> dict[int, float]:
    return {dim: signal.cosine(dim) for dim, n in enumerate(signal.shape) if n > 1}


def rows_of(predictions: Mapping[str, float], draws: Mapping[str, Measured]) -> list[Row]:
    """One for each cosine that was both predicted and measured."""
    return [
        Row(
            module=key.rpartition(" ")[0],
            dim=int(key.rpartition(" ")[2]),
            predicted=predictions[key],
            measured=item.mean,
            standard_error=float(np.std(item.moments, ddof=1) / len(item.moments) ** 0.5),
        )
        for key, item in draws.items()
        if key in predictions
    ]


def figures(*results: Mapping[str, Any]) -> list[str]:
    """Cells of a table, of one model or several: for each kind p50, p90, p99 of the error, and % of it within bounds."""
    cells = []
    for kind in KINDS:
        errors = np.array([error for result in results for error in result["errors"][kind]])
        quantiles = np.quantile(errors, [0.5, 0.9, 0.99]) if errors.size else []
        cells += [f"{value:.3f}" for value in quantiles] or ["-"] * 3
        cells.append(f"{100 * np.mean(errors <= WITHIN):.1f}" if errors.size else "-")
    return cells


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose names contain one of these, separated by commas")
    parser.add_argument("--most", type=int, default=FEWEST, help="draws (default: %(default)s)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the model libraries, about themselves
    one_thread()
    models = {n: build for n, build in reference_models().items() if any(part in n for part in options.only.split(","))}
    shown = Table("model", *(f"{kind[:7]} {key}" for kind in KINDS for key in ("p50", "p90", "p99", "%")), "worst")
    with Progress(console=Console(stderr=True)) as progress:
        for name, build in progress.track(list(models.items())):
            rows = rows_of(predicted(build), measured(f"{name}.cosines", build, cosine_pass, most=options.most))
            result = model_result(name, rows)
            write(result)
            worst = result["worst"][0]
            place = f"{worst['module']} {worst['dim']}: {worst['predicted']:.3f}, not {worst['measured']:.3f}"
            shown.add_row(name, *figures(result), place)
    Console(width=None if Console().is_terminal else 170).print(shown)


def model_result(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """A model in the results: how many cosines, its errors, and its worst."""
    settled = [row for row in rows if row.standard_error <= SETTLED]
    return {
        "model": name,
        "cosines": len(rows),
        "settled": len(settled),
        "errors": {kind: sorted(round(row.error, 5) for row in settled if row.kind == kind) for kind in KINDS},
        "worst": [asdict(row) for row in sorted(settled or rows, key=lambda row: -row.error)[:5]],
    }


def write(result: Mapping[str, Any]) -> None:
    """A model's result among those that are there, in the order of the reference models."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["models"] if RESULTS.exists() else []
    by_name = {one["model"]: one for one in kept} | {result["model"]: result}
    models = [by_name[name] for name in reference_models() if name in by_name]
    RESULTS.write_text(json.dumps({"models": models}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
