"""Time to draw one large weight in place: Gainstage, ``torch.nn.init`` and plain writing, call by call in turn."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

from gainstage.apply import apply
from gainstage.apply.runs import fill_runs
from gainstage.plan import Distribution, Family, ParameterPlan, Plan

STD = 0.02
SIZE = 4096
MATRIX = 1024  # an orthogonal matrix takes the cube of its size
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SECONDS = 2.0  # for each row, at least
ROUNDS = (5, 25)  # for each row, at least and at most

_TORCH: Mapping[Family, Callable[[torch.Tensor], object]] = {
    Family.NORMAL: lambda tensor: nn.init.normal_(tensor, std=STD),
    Family.TRUNCATED_NORMAL: lambda tensor: nn.init.trunc_normal_(tensor, std=STD, a=-2 * STD, b=2 * STD),
    Family.UNIFORM: lambda tensor: nn.init.uniform_(tensor, -STD, STD),
    Family.CONSTANT: lambda tensor: nn.init.constant_(tensor, 1.0),
    Family.ORTHOGONAL: lambda tensor: nn.init.orthogonal_(tensor, gain=STD),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """One family, element type and number of threads. Times in milliseconds, the best of all rounds.

    Args:
        family: what is drawn.
        dtype: of the elements.
        threads: for ours and for torch's.
        size: rows and columns.
        ours: wall time.
        torch: wall time.
        memory: wall time of ``Tensor.fill_``.
        ours_processor: processor time of all threads.
        torch_processor: processor time of all threads.
        ratio: torch's wall time over ours in the same round, the median over rounds.
    """

    family: str
    dtype: str
    threads: int
    size: int
    ours: float
    torch: float
    memory: float
    ours_processor: float
    torch_processor: float
    ratio: float


def measure_by_numpy() -> Iterator[Fill]:
    """The families that compiled loops are for, without them."""
    loops = [Family.NORMAL, Family.TRUNCATED_NORMAL, Family.UNIFORM]
    with mock.patch.object(sys.modules["gainstage.apply.draw"], "fill_for", return_value=fill_runs):
        yield from measure_fills(loops)


def measure_fills(families: Iterable[Family] = tuple(_TORCH)) -> Iterator[Fill]:
    """Every element type, one thread and two."""
    before = torch.get_num_threads()
    try:
        for family in families:
            for dtype in DTYPES:
                if family is Family.ORTHOGONAL and dtype in {torch.bfloat16, torch.float16}:
                    continue  # torch has no factorisation for them
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    yield _measure(family, dtype, threads)
    finally:
        torch.set_num_threads(before)


def _measure(family: Family, dtype: torch.dtype, threads: int) -> Fill:
    size = MATRIX if family.is_matrix else SIZE
    model = nn.Linear(size, size, bias=False, device="meta").to_empty(device="cpu").to(dtype)
    plan = _plan(family, model.weight)
    calls = (lambda: apply(model, plan), lambda: _TORCH[family](model.weight), lambda: model.weight.detach().fill_(1.0))
    rounds: list[list[tuple[float, float]]] = []
    start = time.perf_counter()
    for call in calls:
        call()  # maps the memory, loads what is loaded at the first call
    while len(rounds) < ROUNDS[0] or (time.perf_counter() - start < SECONDS and len(rounds) < ROUNDS[1]):
        rounds.append([_timed(call) for call in calls])
    best = [[1e3 * min(taken[call][clock] for taken in rounds) for clock in (0, 1)] for call in range(3)]
    return Fill(
        family=family.value,
        dtype=plan.parameters["weight"].dtype,
        threads=threads,
        size=size,
        ours=best[0][0],
        torch=best[1][0],
        memory=best[2][0],
        ours_processor=best[0][1],
        torch_processor=best[1][1],
        ratio=statistics.median(theirs[0] / ours[0] for ours, theirs, _ in rounds),
    )


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor time of one call, in seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def _plan(family: Family, weight: torch.Tensor) -> Plan:
    planned = ParameterPlan(
        name="weight",
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        role="weight",
        distribution=Distribution(family=family, mean=1.0) if family is Family.CONSTANT else Distribution(family=family, std=STD),
    )
    return Plan(policy="benchmark", parameters={"weight": planned}, fingerprint="", training=True)
