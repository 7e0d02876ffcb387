"""The same work on all processes that share a model: it succeeds on all of them, or raises on all of them, soon.

What is exchanged is a few bytes in the store that the processes met at, not a collective of some backend: so it works for
any device, and waiting ends.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch

from gainstage.errors import RankError

# Rank after rank is asked; one that is slower than this one by such a factor is taken for lost.
_SLOWER = 10


def together(ranks: Iterable[int], work: Callable[[], str], timeout: float, *, subject: str = "the plan or the seed") -> None:
    """Do the work here, and compare what it returns with what it returned on the other ranks.

    Args:
        ranks: processes that do the same; none or only this one where the model is not sharded.
        work: returns what has to be the same on all ranks.
        timeout: seconds to wait for the others, beyond ten times as long as the work took here.
        subject: what has to be the same, for the message.

    Raises:
        RankError: another rank failed, returned something else, or did not answer in time.
    """
    others = sorted(ranks)
    if len(others) < 2:
        work()
        return
    rank = torch.distributed.get_rank()
    store = torch.distributed.distributed_c10d._get_default_store()
    call = store.add(f"gainstage/calls/{rank}", 1)
    start = time.monotonic()
    try:
        said = work()
    except BaseException as error:
        store.set(f"gainstage/{call}/{rank}", f"failed: {str(error) or type(error).__name__}")
        raise
    store.set(f"gainstage/{call}/{rank}", f"done: {said}")
    deadline = time.monotonic() + timeout + _SLOWER * (time.monotonic() - start)
    answers = {other: said if other == rank else _answer(store, call, other, deadline) for other in others}
    if len(set(answers.values())) > 1:
        raise RankError(f"The ranks disagree on {subject}: {_groups(answers)}. Plan on one rank and broadcast it.")


def _answer(store: Any, call: int, rank: int, deadline: float) -> str:
    key = f"gainstage/{call}/{rank}"
    remaining = max(0.001, deadline - time.monotonic())
    try:
        store.wait([key], timedelta(seconds=remaining))
        state, _, text = str(store.get(key), "utf-8").partition(": ")
    except torch.distributed.DistError as error:
        raise RankError(f"Rank {rank} does not answer: it has died, is far behind, or does not make this call.") from error
    if state == "failed":
        raise RankError(f"Rank {rank} failed: {text}")
    return text


def _groups(answers: dict[int, str]) -> str:
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, answer in answers.items():
        ranks[answer].append(rank)
    return "; ".join(f"ranks {', '.join(map(str, group))}: {answer[:12]}" for answer, group in ranks.items())
