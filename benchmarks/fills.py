"""Time to draw one large weight in place: Gainstage against ``torch.nn.init``: ``python -m benchmarks.fills`` prints JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import nn

from gainstage.apply import apply
from gainstage.plan import Distribution, Family, ParameterPlan, Plan

SIZE = 4096
REPETITIONS = 7
STD = 0.02

_TORCH: Mapping[Family, Callable[[torch.Tensor], object]] = {
    Family.NORMAL: lambda tensor: nn.init.normal_(tensor, std=STD),
    Family.TRUNCATED_NORMAL: lambda tensor: nn.init.trunc_normal_(tensor, std=STD, a=-2 * STD, b=2 * STD),
    Family.UNIFORM: lambda tensor: nn.init.uniform_(tensor, -STD, STD),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """Best times of one family, element type and number of threads, ours and torch's measured in turn."""

    family: str
    dtype: str
    threads: int
    ours_ms: float
    torch_ms: float


def measure_fills(size: int = SIZE, repetitions: int = REPETITIONS) -> list[Fill]:
    """Families, single precision and bfloat16, one thread and two."""
    before = torch.get_num_threads()
    fills = []
    try:
        for dtype in (torch.float32, torch.bfloat16):
            model = nn.Linear(size, size, bias=False, dtype=dtype)
            for family, by_torch in _TORCH.items():
                plan = _plan(family, model.weight)
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    times = [
                        (seconds(lambda: apply(model, plan)), seconds(lambda: by_torch(model.weight)))  # noqa: B023
                        for _ in range(repetitions)
                    ]
                    ours, torchs = (1e3 * min(column) for column in zip(*times, strict=True))
                    fills.append(
                        Fill(
                            family=family.value,
                            dtype=plan.parameters["weight"].dtype,
                            threads=threads,
                            ours_ms=ours,
                            torch_ms=torchs,
                        )
                    )
    finally:
        torch.set_num_threads(before)
    return fills


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _plan(family: Family, weight: torch.Tensor) -> Plan:
    planned = ParameterPlan(
        name="weight",
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        role="weight",
        distribution=Distribution(family=family, std=STD),
    )
    return Plan(policy="benchmark", parameters={"weight": planned}, fingerprint="", training=True)


if __name__ == "__main__":
    print(json.dumps([asdict(fill) for fill in measure_fills()]))
