"""Predicted second moment of every module output against the mean over draws of the real model.

python -m benchmarks.accuracy [--only resnet] [--part default] [--most 64]

Four parts: ``default``, at the initialization that the modules do by themselves, where the prediction is the mean of those
from the parameters' moments in 8 draws; ``unit``, after ``gainstage.apply`` of that policy; ``gradients``, at the modules' own
initialization, of module outputs and parameters, but for those that vanish; ``unit-gradients``, the same after ``unit``.
Error: ``|log(predicted / mean over draws of measured)|``. What has a mean over draws that is not known to 3 % is listed apart,
with the spread that was predicted and the one that was measured. "In band" is the share of single draws, of all outputs, that
lie in the predicted 95 % band, see :func:`covered`. Writes benchmarks/results/accuracy.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.measure import MOST, Measured, backward_pass, forward_pass, measured, one_thread
from benchmarks.zoo.reference import Example, reference_models
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import gainstage as gs

RESULTS = Path(__file__).with_name("results") / "accuracy.json"
PARTS = {
    "default": "forward second moments, as the modules initialise themselves",
    "unit": "forward second moments, after applying the policy 'unit'",
    "gradients": "second moments of gradients of module outputs and parameters, as the modules initialise themselves",
    "unit-gradients": "second moments of gradients of module outputs and parameters, after applying the policy 'unit'",
}
LARGEST_ERROR = 0.03  # of the mean over draws: a module with more is listed apart
INSPECTED = 8
LISTED = 20  # of those apart, in the results
INSPECTED_BACKWARD = 2  # with a backward pass it is slower
RESOLUTION = 0.003  # deviation of the log that a band has at least: what norms put out strays by their epsilons alone
CONTRACTIONS = ("Linear", "Conv", "NonDynamicallyQuantizableLinear")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One module output: prediction, mean over draws, its relative standard error, spreads."""

    module: str
    module_type: str
    predicted: float
    measured: float
    standard_error: float
    predicted_spread: float
    measured_spread: float
    covered: float

    @property
    def error(self) -> float:
        """``|log(predicted / measured)|``; 0 where both are nothing, infinite where one is."""
        if max(self.predicted, self.measured) < 1e-30:
            return 0.0
        return abs(math.log(self.predicted / self.measured)) if min(self.predicted, self.measured) > 0 else math.inf

    @property
    def spread_ratio(self) -> float:
        """Predicted over measured spread, both widened by RESOLUTION."""
        return math.hypot(self.predicted_spread, RESOLUTION) / math.hypot(self.measured_spread, RESOLUTION)

    @property
    def is_settled(self) -> bool:
        """The mean over draws is known well enough to judge by it."""
        return self.standard_error <= LARGEST_ERROR

    @property
    def is_contraction(self) -> bool:
        """A linear layer or a convolution."""
        return self.module_type.startswith(CONTRACTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One model under one policy."""

    model: str
    policy: str
    draws: int
    rows: tuple[Row, ...]
    failure: str = ""

    def quantiles(self) -> tuple[float, float, float]:
        """p50, p90, p99 of the error over settled modules."""
        return quantiles([self])

    def in_bounds(self) -> float:
        """Share of contraction outputs whose mean over draws is within [0.8, 1.25] of the prediction."""
        return in_bounds([self])


def quantiles(scores: list[Score]) -> tuple[float, float, float]:
    """p50, p90, p99 of the error over the settled modules of several models."""
    errors = [row.error for score in scores for row in score.rows if row.is_settled]
    p50, p90, p99 = np.quantile(errors, [0.5, 0.9, 0.99]) if errors else (math.nan,) * 3
    return float(p50), float(p90), float(p99)


def in_bounds(scores: list[Score]) -> float:
    """Share of the contraction outputs of several models within [0.8, 1.25] of their prediction."""
    ratios = [row.measured / row.predicted for score in scores for row in score.rows if row.is_contraction and row.predicted > 0]
    return float(np.mean([0.8 <= ratio <= 1.25 for ratio in ratios])) if ratios else math.nan


def covered(predicted: float, spread: float, moments: Sequence[float]) -> float:
    """Share of single draws in ``predicted exp(-s^2/2 +- 1.96 s)``, ``s^2 = spread^2 + RESOLUTION^2``.

    A level is a product of many factors, so its log is near normal; a log-normal variable of mean m has the median
    ``m exp(-s^2 / 2)``, about which 95 % of it lie within 1.96 s.
    """
    found = np.array(moments)
    if predicted <= 0.0:
        return float(np.mean(found <= 0.0))
    s = math.hypot(spread, RESOLUTION)
    positive = found > 0.0  # the others, of branches that were dropped in all samples, lie outside
    off = np.log(found[positive] / predicted) + 0.5 * s**2
    return float(np.sum(np.abs(off) <= 1.96 * s)) / len(found)


def bands(scores: list[Score]) -> dict[str, float]:
    """Share of draws within the predicted 95 % bands, and quantiles over outputs of predicted over measured spread.

    ``loose``: outputs whose spread is more than 1 %, where RESOLUTION plays no part.
    """
    rows = [row for score in scores for row in score.rows if not math.isnan(row.predicted_spread)]
    if not rows:
        return {}
    loose = [row for row in rows if max(row.predicted_spread, row.measured_spread) > 0.01]
    p10, p50, p90 = (float(value) for value in np.quantile([row.spread_ratio for row in rows], [0.1, 0.5, 0.9]))
    return {
        "coverage": float(np.mean([row.covered for row in rows])),
        "coverage_loose": float(np.mean([row.covered for row in loose])) if loose else math.nan,
        "spread_p10": p10,
        "spread_p50": p50,
        "spread_p90": p90,
    }


def score(name: str, policy: str, most: int) -> Score:
    """Predict, draw, compare."""
    build = reference_models()[name]
    if policy == "default":
        predictions = _inspected(build)
        draws = measured(name, build, forward_pass, most=most)
    elif policy == "gradients":
        predictions = _inspected_gradients(build)
        draws = _present(predictions, measured(f"{name}.gradients", build, backward_pass, most=most))
    elif policy == "unit-gradients":
        plan, drawn = _planned(build, "unit")
        predictions = _inspected_gradients(drawn)
        draws = _present(predictions, measured(f"{name}.{policy}.{_digest(plan)}", drawn, backward_pass, most=most))
    else:
        plan, drawn = _planned(build, policy)
        spreads = plan.spreads
        predictions = {key: (m[0], spreads[key][0] if key in spreads else math.nan) for key, m in plan.predictions.items() if m}
        draws = measured(f"{name}.{policy}.{_digest(plan)}", drawn, forward_pass, most=most)
    return Score(model=name, policy=policy, draws=_count(draws), rows=tuple(compared(predictions, draws)))


def _planned(build: Callable[[int], Example], policy: str) -> tuple[gs.Plan, Callable[[int], Example]]:
    """A plan for one draw of the model, and a builder of the model with weights drawn from it."""
    first = build(0)
    plan = gs.plan(first.model, first.args, first.kwargs, policy=policy)

    def drawn(seed: int) -> Example:
        example = build(seed)
        gs.apply(example.model, plan, seed=seed)
        return example

    return plan, drawn


def _inspected(build: Callable[[int], Example]) -> dict[str, tuple[float, float]]:
    """Mean prediction over models that differ by their draw: a small parameter's own moments stray."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(INSPECTED):
        example = build(seed)
        for call in gs.inspect(example.model, example.args, example.kwargs, gradients=False).calls:
            if call.outputs:
                signal = call.outputs[0]
                found.setdefault(f"{call.path}@{call.call}", []).append((signal.second_moment, signal.spread))
    return {key: (float(np.mean([m for m, _ in pairs])), float(np.mean([s for _, s in pairs]))) for key, pairs in found.items()}


def _inspected_gradients(build: Callable[[int], Example]) -> dict[str, tuple[float, float]]:
    """As :func:`_inspected`, for the gradients of module outputs and parameters; their spread is not predicted."""
    found: dict[str, list[float]] = {}
    for seed in range(INSPECTED_BACKWARD):
        example = build(seed)
        trace = gs.inspect(example.model, example.args, example.kwargs)
        for call in trace.calls:
            if call.outputs and call.outputs[0].gradient is not None:
                found.setdefault(f"{call.path}@{call.call}", []).append(call.outputs[0].gradient.second_moment)
        for name, statistics in trace.parameters.items():
            if statistics.gradient_second_moment is not None:
                found.setdefault(name, []).append(statistics.gradient_second_moment)
    return {key: (float(np.mean(moments)), math.nan) for key, moments in found.items()}


def _present(predictions: Mapping[str, tuple[float, float]], draws: dict[str, Measured]) -> dict[str, Measured]:
    """Without gradients that vanish as predicted: behind a head or branch that starts at zero, or cancelled to rounding."""
    nothing = float(np.finfo(np.float32).eps) ** 2 * max(item.mean for item in draws.values())
    unknown = (math.inf, math.nan)
    return {key: item for key, item in draws.items() if max(item.mean, predictions.get(key, unknown)[0]) > nothing}


def _digest(plan: gs.Plan) -> str:
    """Draws of another plan are other draws."""
    distributions = [
        (p.name, str(p.distribution), [str(b) + str(b.distribution) for b in p.blocks]) for p in plan.parameters.values()
    ]
    return hashlib.sha256(repr(distributions).encode()).hexdigest()[:12]


def _count(draws: Mapping[str, Measured]) -> int:
    return max((len(item.moments) for item in draws.values()), default=0)


def compared(predictions: Mapping[str, tuple[float, float]], draws: Mapping[str, Measured]) -> list[Row]:
    """Each measured output that has a prediction."""
    return [
        Row(
            module=key,
            module_type=item.module_type,
            predicted=predictions[key][0],
            measured=item.mean,
            standard_error=item.error,
            predicted_spread=predictions[key][1],
            measured_spread=item.spread,
            covered=covered(*predictions[key], item.moments),
        )
        for key, item in draws.items()
        if key in predictions
    ]


def table(scores: list[Score], policy: str) -> Table:
    """One line for each model, one for all together."""
    shown = Table(title=f"{PARTS[policy]}: error against the mean over draws, %", title_justify="left")
    shown.add_column("model")
    for heading in ("draws", "modules", "p50", "p90", "p99", "apart", "in bounds", "in band", "spread p10", "p50", "p90"):
        shown.add_column(heading, justify="right")
    shown.add_column("worst settled module")
    for item in scores:
        if item.failure:
            shown.add_row(item.model, *["-"] * 11, item.failure)
            continue
        settled = [row for row in item.rows if row.is_settled]
        worst = max(settled, key=lambda row: row.error, default=None)
        place = "-" if worst is None else f"{worst.module} {100 * worst.error:.1f}"
        figures = [f"{100 * value:.2f}" for value in item.quantiles()]
        apart = str(len(item.rows) - len(settled))
        figures += [apart, f"{100 * item.in_bounds():.1f}", *_band_figures([item])]
        shown.add_row(item.model, str(item.draws), str(len(item.rows)), *figures, place)
    count = sum(len(item.rows) for item in scores)
    shown.add_section()
    figures = [f"{100 * value:.2f}" for value in quantiles(scores)]
    shown.add_row("all", "", str(count), *figures, "", f"{100 * in_bounds(scores):.1f}", *_band_figures(scores), "")
    return shown


def _band_figures(scores: list[Score]) -> list[str]:
    found = bands(scores)
    if not found:
        return ["-"] * 4
    return [f"{100 * found['coverage']:.1f}", *(f"{found[key]:.2f}" for key in ("spread_p10", "spread_p50", "spread_p90"))]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose names contain this")
    parser.add_argument("--part", choices=list(PARTS), help="one part (default: all)")
    parser.add_argument("--most", type=int, default=MOST, help="draws at most (default: %(default)s)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the model libraries, about themselves
    one_thread()
    names = [name for name in reference_models() if options.only in name]
    policies = [options.part] if options.part else list(PARTS)
    console = Console(width=None if Console().is_terminal else 140)
    found: dict[str, list[Score]] = {policy: [] for policy in policies}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names) * len(policies))
        for policy in policies:
            for name in names:
                progress.update(task, description=f"{name}, {policy}")
                try:
                    found[policy].append(score(name, policy, options.most))
                except gs.GainstageError as error:
                    reason = str(error).splitlines()[0]
                    found[policy].append(Score(model=name, policy=policy, draws=0, rows=(), failure=reason))
                progress.advance(task)
    for policy, scores in found.items():
        console.print(table(scores, policy))
    if not options.only:
        write(found)


def write(found: Mapping[str, list[Score]]) -> None:
    """Results as JSON; a policy that was not run keeps what stood there."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for policy, scores in found.items():
        models = [_summary(item) for item in scores]
        kept[policy] = {"all": dict(zip(("p50", "p90", "p99"), quantiles(scores), strict=True)), "models": models}
        kept[policy]["all"] |= {"in_bounds": in_bounds(scores), **bands(scores)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _summary(item: Score) -> dict[str, Any]:
    """A model in the results: its quantiles, its five worst modules, and of those apart the ones least known."""
    settled = sorted((row for row in item.rows if row.is_settled), key=lambda row: -row.error)
    apart = sorted((row for row in item.rows if not row.is_settled), key=lambda row: -row.standard_error)
    return {
        "model": item.model,
        "draws": item.draws,
        "modules": len(item.rows),
        "settled": len(settled),
        "failure": item.failure,
        **dict(zip(("p50", "p90", "p99"), item.quantiles(), strict=True)),
        "in_bounds": item.in_bounds(),
        **bands([item]),
        "worst": [asdict(row) for row in settled[:5]],
        "apart": [asdict(row) for row in apart[:LISTED]],
    }


if __name__ == "__main__":
    main()
