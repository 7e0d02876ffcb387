"""Calibration against LSUV: seconds, forward passes and achieved levels, on the same models, draws and data.

python -m benchmarks.calibrate

Every method starts from ``gs.initialize`` with the same seed, so that no draw is timed. ``gs.calibrate`` is timed with all that
it does: capture, roles, the plan's predictions, the pass, the write. LSUV is the package ``lsuv``, at its own tolerance (of the
standard deviation) and at one of a hundredth. Levels are measured afterwards with hooks on the same batch, and each method is
held to its own goals: planned second moments here, variance 1 there. Passes are contractions executed on real tensors over those
of one pass, counted in a run of their own.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.measure import one_thread
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

import gainstage as gs

RESULTS = Path(__file__).with_name("results") / "calibrate.json"
WIDTH, BATCH, CLASSES = 512, 1024, 10
DEPTH, CALLS = 50, 8
Method = Callable[[nn.Module, gs.Plan, torch.Tensor], Sequence[float] | None]  # returns planned levels


class Repeated(nn.Module):
    """One layer, called CALLS times, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        for _ in range(CALLS):
            x = torch.relu(self.layer(x))
        output: torch.Tensor = self.head(x)
        return output


def plain() -> nn.Module:
    """DEPTH layers with ReLU, no norms, no skips."""
    hidden = [layer for _ in range(DEPTH - 1) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method on one network; errors are relative, of second moments or variances. None: not finite."""

    network: str
    method: str
    seconds: float
    passes: float
    first_calls: float | None  # worst error where a layer is called for the first time
    all_calls: float | None  # worst error anywhere
    levels: tuple[float | None, ...]  # second moments of all contractions, in order


def main() -> None:
    """Measure, print the table, write the results."""
    import lsuv  # noqa: F401  (not while the clock runs)

    one_thread()
    networks = {f"{DEPTH} layers": plain, f"one layer, {CALLS} calls": Repeated}
    rows = [row_of(network, build, method) for network, build in networks.items() for method in METHODS]
    RESULTS.parent.mkdir(exist_ok=True)
    found = {"width": WIDTH, "samples": BATCH, "threads": torch.get_num_threads(), "rows": [asdict(row) for row in rows]}
    RESULTS.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    headings, lines = calibration_table(found["rows"])
    shown = Table(title=f"Calibration of {WIDTH}-wide ReLU networks on {BATCH} samples, {found['threads']} thread")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in {"network", "method"} else "right")
    for line in lines:
        shown.add_row(*line)
    Console(width=110).print(shown)


def ours(model: nn.Module, plan: gs.Plan, x: torch.Tensor) -> Sequence[float] | None:
    """Calibrate; returns the planned levels of the contractions."""
    return [row.planned for row in gs.calibrate(model, plan, (x,)).rows]


def theirs(tolerance: float) -> Method:
    """LSUV at this tolerance; its goal is variance 1 everywhere."""

    def run(model: nn.Module, _plan: gs.Plan, x: torch.Tensor) -> Sequence[float] | None:
        import lsuv

        lsuv.lsuv_with_singlebatch(model, x, std_tol=tolerance, do_orthonorm=False, verbose=False)
        return None

    return run


METHODS: dict[str, Method] = {"gs.calibrate": ours, "lsuv": theirs(0.1), "lsuv, tolerance 0.01": theirs(0.01)}


def row_of(network: str, build: Callable[[], nn.Module], method: str) -> Row:
    """Time one method on a fresh draw, look at what it achieved, and count its passes on another."""
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0))
    model = build()
    plan = gs.initialize(model, (x,), seed=0)
    start = time.perf_counter()
    goals = METHODS[method](model, plan, x)
    seconds = time.perf_counter() - start
    levels, variances, is_first = achieved(model, x)
    if goals is None:
        errors = [error(variance, 1.0) for variance in variances]
    else:
        errors = [error(level, goal) for level, goal in zip(levels, goals, strict=True)]
    gs.apply(model, plan, seed=0)
    with Contractions() as spent:
        METHODS[method](model, plan, x)
    return Row(
        network=network,
        method=method,
        seconds=seconds,
        passes=spent.count / len(levels),
        first_calls=finite(max(one for one, first in zip(errors, is_first, strict=True) if first)),
        all_calls=finite(max(errors)),
        levels=tuple(finite(level) for level in levels),
    )


def error(level: float, goal: float) -> float:
    """Relative error; infinite for what is no number."""
    return abs(level / goal - 1.0) if math.isfinite(level) else math.inf


def finite(number: float) -> float | None:
    """None for what JSON cannot say."""
    return number if math.isfinite(number) else None


def achieved(model: nn.Module, x: torch.Tensor) -> tuple[list[float], list[float], list[bool]]:
    """Second moment and variance of the output of every call of a linear layer, and whether that was its first call."""
    levels: list[float] = []
    variances: list[float] = []
    callers: list[nn.Module] = []

    def look(module: nn.Module, _args: object, output: torch.Tensor) -> None:
        levels.append(float(output.double().square().mean()))
        variances.append(float(output.double().var()))
        callers.append(module)

    handles = [module.register_forward_hook(look) for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return levels, variances, [module not in callers[:position] for position, module in enumerate(callers)]


class Contractions(TorchDispatchMode):
    """Counts matrix products on real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count."""
        result = func(*args, **(kwargs or {}))
        is_product = func in {torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.linear.default}
        self.count += is_product and not (isinstance(result, FakeTensor) or result.is_meta)
        return result


def calibration_table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows."""
    return ("network", "method", "seconds", "passes", "worst error", "with repeated calls", "last hidden level"), [
        (
            row["network"],
            row["method"],
            f"{row['seconds']:.2f}",
            f"{row['passes']:.0f}",
            *("not finite" if row[name] is None else f"{row[name]:.2%}" for name in ("first_calls", "all_calls")),
            "not finite" if row["levels"][-2] is None else f"{row['levels'][-2]:.3g}",
        )
        for row in rows
    ]


if __name__ == "__main__":
    main()
