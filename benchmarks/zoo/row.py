"""What is found out about one model of a zoo: a line of JSON."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from benchmarks.accuracy import Row, compared
from benchmarks.measure import collected, forward_pass
from benchmarks.stages import peak_megabytes
from benchmarks.zoo.load import Loaded
from benchmarks.zoo.reference import Example

import gainstage as gs
from gainstage.capture import capture
from gainstage.graph import Graph, Node
from gainstage.propagate import has_rule
from gainstage.propagate.sample import sample_node
from gainstage.report.ops import count_ops

ENOUGH = 16  # draws
PATIENCE = 4.0  # processor seconds of drawing, after which fewer must do
FEW = 8  # of fewer a standard error says little: outputs settle by chance
LONGEST = 60.0  # processor seconds of drawing, after which even fewer must do
FEWEST = 2  # a standard error needs them
WORST = 3  # outputs that are named


@dataclass(slots=True, kw_only=True)
class ZooRow:
    """One model; what comes after the stage that failed keeps its default.

    ``errors``: ``|log(predicted / mean over draws)|`` of each module output whose mean is known to 3 %; ``apart`` counts the
    others. ``megabytes``: by how much capture and plan raised the peak of the resident set. Seconds are the processor's.
    """

    zoo: str
    model: str
    failure: str = ""  # stage, class and first line of the exception
    rung: str = ""
    nodes: int = 0
    ruled: int = 0
    sampled_ops: dict[str, int] = field(default_factory=dict)
    capture_seconds: float = 0.0
    plan_seconds: float = 0.0  # with the capture
    forward_seconds: float = 0.0
    megabytes: float = 0.0
    draws: int = 0
    errors: list[float] = field(default_factory=list)
    apart: int = 0
    worst: list[tuple[str, float]] = field(default_factory=list)

    @property
    def sampled(self) -> int:
        """Nodes that were run on samples."""
        return sum(self.sampled_ops.values())

    @property
    def is_slow(self) -> bool:
        """Planning takes more than 3 s and more than three forward passes."""
        return self.plan_seconds > max(3.0, 3 * self.forward_seconds)

    def with_draws_of(self, other: ZooRow) -> ZooRow:
        """With what draws of the model found before: those of a plan that may have been another."""
        failure = self.failure or (other.failure if other.failure.startswith("draws") else "")
        return replace(self, failure=failure, draws=other.draws, errors=other.errors, apart=other.apart, worst=other.worst)


def examine(zoo: str, model: str, build: Callable[[], Loaded], draws: int = ENOUGH) -> ZooRow:
    """Build, capture, plan, apply and compare, as far as it goes."""
    row = ZooRow(zoo=zoo, model=model)
    torch.manual_seed(0)
    with failing(row, "build"):
        loaded = build()
    if not row.failure:
        _examined(row, loaded, draws)
    return row


def _examined(row: ZooRow, loaded: Loaded, draws: int) -> None:
    args, kwargs = loaded.arguments(0)
    before = _fresh_peak()
    plan = None
    with failing(row, "plan"), watched(row):
        start = time.process_time()
        plan = gs.plan(loaded.model, args, kwargs)
        row.plan_seconds = time.process_time() - start
        row.megabytes = _peak() - before
    if plan is None:
        return
    with failing(row, "draws"), torch.compiler.set_stance("force_eager"):
        _compare(row, loaded, plan, draws)


@contextmanager
def watched(row: ZooRow) -> Iterator[None]:
    """Note what the first capture of a plan finds, and what is sampled on the way: also where there is a rule that gave up."""
    sampled: dict[str, tuple[str, bool]] = {}

    def captured(*args: Any, **kwargs: Any) -> Graph:
        start = time.process_time()
        graph = capture(*args, **kwargs)
        if not row.rung:
            row.capture_seconds = time.process_time() - start
            row.rung, row.nodes = graph.rung, len(graph.nodes)
            row.ruled = sum(each.count for each in count_ops(graph) if each.treatment == "ruled")
        return graph

    def noted(node: Node, *args: Any) -> Any:
        sampled[node.name] = node.op_name, has_rule(node)
        return sample_node(node, *args)

    try:
        with patch("gainstage.api.planning.capture", captured), patch("gainstage.propagate.interpret.sample_node", noted):
            yield
    finally:
        row.sampled_ops = dict(Counter(op for op, _ in sampled.values()).most_common())
        row.ruled -= sum(ruled for _, ruled in sampled.values())


def compare(loaded: Loaded, plan: gs.Plan, draws: int, patience: Callable[[int], float] | None = None) -> tuple[list[Row], int]:
    """What a plan predicts of module outputs, held against draws of parameters and inputs; and how many draws there were.

    ``patience``: processor seconds of drawing within which another one begins, after so many.
    """

    def one_pass(seed: int) -> dict[str, tuple[str, float]]:
        args, kwargs = loaded.arguments(seed)
        return forward_pass(Example(loaded.model, args, kwargs), with_grad=loaded.differentiates)

    began = time.process_time()
    passes: list[dict[str, tuple[str, float]]] = []
    while len(passes) < draws and (patience is None or time.process_time() - began < patience(len(passes))):
        gs.apply(loaded.model, plan, seed=1 + len(passes))
        passes.append(one_pass(1 + len(passes)))
    predictions = {
        key: (values[0], plan.spreads[key][0] if key in plan.spreads else math.nan)
        for key, values in plan.predictions.items()
        if values
    }
    return compared(predictions, collected(passes)), len(passes)


def _compare(row: ZooRow, loaded: Loaded, plan: gs.Plan, draws: int) -> None:
    """Time a pass; draw until there are enough, or time is up."""
    args, kwargs = loaded.arguments(0)
    began = time.process_time()
    forward_pass(Example(loaded.model, args, kwargs), with_grad=loaded.differentiates)  # lazy parameters get their shapes
    row.forward_seconds = time.process_time() - began
    if not draws:
        return
    outputs, row.draws = compare(loaded, plan, draws, _patience)
    settled = sorted((output for output in outputs if output.is_settled), key=lambda output: -output.error)
    row.apart = len(outputs) - len(settled)
    row.errors = [float(f"{min(output.error, 99.0):.2g}") for output in settled]
    row.worst = [(output.module, float(f"{min(output.error, 99.0):.2g}")) for output in settled[:WORST]]


def _patience(drawn: int) -> float:
    """Processor seconds of drawing within which another one begins, after so many."""
    if drawn < FEWEST:
        return math.inf
    return LONGEST if drawn < FEW else PATIENCE


@contextmanager
def failing(row: ZooRow, stage: str) -> Iterator[None]:
    """Note an exception in the row, whatever it is: the benchmark goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        row.failure = f"{stage if row.rung or stage != 'plan' else 'capture'}: {type(error).__name__}: {reason[:800]}"


def quantiles(errors: list[float]) -> tuple[float, float, float]:
    """p50, p90, p99."""
    if not errors:
        return (math.nan,) * 3
    p50, p90, p99 = np.quantile(errors, [0.5, 0.9, 0.99])
    return float(p50), float(p90), float(p99)


def _fresh_peak() -> float:
    """Set the peak of the resident set back to what is resident now, where the system allows it; megabytes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _peak()


def _peak() -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return peak_megabytes()
