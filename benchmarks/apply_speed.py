"""Time to draw one 4096 x 4096 float32 weight in place: Gainstage against ``torch.nn.init``.

python -m benchmarks.apply_speed
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gainstage.apply import apply
from gainstage.plan import Distribution, Family, ParameterPlan, Plan

SIZE = 4096
REPETITIONS = 7

_TORCH: Mapping[Family, Callable[[torch.Tensor], object]] = {
    Family.NORMAL: lambda tensor: nn.init.normal_(tensor, std=0.02),
    Family.TRUNCATED_NORMAL: lambda tensor: nn.init.trunc_normal_(tensor, std=0.02, a=-0.04, b=0.04),
    Family.UNIFORM: lambda tensor: nn.init.uniform_(tensor, -0.03, 0.03),
}


@dataclass(frozen=True, slots=True)
class Row:
    """Best times of one family on one number of threads."""

    family: str
    threads: int
    ours_ms: float
    torch_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster than torch."""
        return self.torch_ms / self.ours_ms


def measure(size: int = SIZE, repetitions: int = REPETITIONS, threads: tuple[int, ...] = (1, 2)) -> list[Row]:
    """Rows of the table; every time is the best of some repetitions, ours and torch's in turn."""
    before = torch.get_num_threads()
    model = nn.Linear(size, size, bias=False)
    rows = []
    try:
        for family, by_torch in _TORCH.items():
            plan = _plan(family, size)
            for count in threads:
                torch.set_num_threads(count)
                times = [(_time(lambda: apply(model, plan)), _time(lambda: by_torch(model.weight))) for _ in range(repetitions)]  # noqa: B023
                rows.append(Row(family.value, count, *(1e3 * min(column) for column in zip(*times, strict=True))))
    finally:
        torch.set_num_threads(before)
    return rows


def _plan(family: Family, size: int) -> Plan:
    weight = ParameterPlan(
        name="weight", shape=(size, size), dtype="float32", role="weight", distribution=Distribution(family=family, std=0.02)
    )
    return Plan(policy="benchmark", parameters={"weight": weight}, fingerprint="", training=True)


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    print(f"{SIZE} x {SIZE} float32, best of {REPETITIONS}, milliseconds")
    print(f"{'family':18}{'threads':>8}{'gainstage':>11}{'torch':>8}{'ratio':>7}")
    for row in measure():
        print(f"{row.family:18}{row.threads:8}{row.ours_ms:11.1f}{row.torch_ms:8.1f}{row.ratio:7.1f}")


if __name__ == "__main__":
    main()
