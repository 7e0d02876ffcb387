"""Writing a plan into a model: all parameters or none.

The old values of every piece are saved just before it is drawn, and put back if anything goes wrong or the user interrupts.
So the price is host memory of the size of the parameters that are written, until the call returns. Nothing cheaper can go
back; drawing elsewhere first and copying takes the same memory and a fifth more time (4096 x 4096 normal, 2 threads). All old
values lie in one array, since the system gives large memory in large pages, and four times as fast.
"""

from __future__ import annotations

import hashlib
import operator
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gainstage.apply.device import draws_on
from gainstage.apply.holding import holdings_of
from gainstage.apply.memory import check_writable
from gainstage.apply.parts import Holding
from gainstage.apply.ranks import together
from gainstage.apply.stage import Task, drawing_tasks
from gainstage.apply.stream import STREAM_VERSION
from gainstage.errors import InputError
from gainstage.plan import Family, ParameterPlan, Plan

# Seconds to wait for another process.
PATIENCE = 60.0


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
    timeout: float = PATIENCE,
) -> None:
    """Draw every parameter from its distribution, in place: all of them, or none where anything fails.

    A value depends on the seed, the parameter's canonical name and the position in it only: not on the order of parameters,
    the device, the number of threads, the present values, or how many processes share the parameters (DTensor, FSDP1, FSDP2):
    each draws the entries that it holds. All processes that share a parameter make this call; it succeeds on all or on none.

    Args:
        model: has the parameters that the plan was made for, with memory behind them.
        plan: what to draw.
        seed: any integer.
        progress: called now and then with the number of entries drawn so far and in all, in this process.
        timeout: seconds to wait for the other processes.

    Raises:
        PlanMismatchError: the plan was made for another model.
        InputError: what is no model or no plan; parameters on meta, or without memory of their own; a seed that is no integer.
        RankError: another process has another plan or seed, failed, or does not answer.
    """
    number = integer_seed(seed)
    check_kinds("apply", model, plan)
    found = holdings_of(model, plan.parameters)

    def check() -> str:
        plan.check_fits(found)
        check_writable({name: holding.memory for name, holding in found.items()})
        return digest_of(plan, number)

    ranks = sharing_ranks(found)
    together(ranks, check, timeout)
    Writer(number, progress).write(
        [(plan.parameters[name], holding) for name, holding in found.items()], lambda work: together(ranks, work, timeout)
    )


def check_kinds(function: str, model: object, plan: object) -> None:
    """Refuse what is no model and no plan.

    Raises:
        InputError: for anything else.
    """
    if not (isinstance(model, nn.Module) and isinstance(plan, Plan)):
        raise InputError(f"{function} takes a model and a plan, not {type(model).__name__} and {type(plan).__name__}.")


def sharing_ranks(found: Mapping[str, Holding]) -> frozenset[int]:
    """The processes that hold parts of the model's parameters."""
    return frozenset(rank for holding in found.values() for rank in holding.ranks)


def digest_of(plan: Plan, seed: int, *more: str) -> str:
    """What has to be the same on all ranks, in short."""
    return hashlib.sha256("\0".join((str(STREAM_VERSION), str(seed), *more, plan.to_json())).encode()).hexdigest()


def integer_seed(seed: object) -> int:
    """The seed as an integer.

    Raises:
        InputError: for anything else.
    """
    try:
        return operator.index(seed)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"The seed is {seed!r}; give an integer.") from error


def _shielded(work: Callable[[], None], stop: threading.Event, undo: Callable[[], None]) -> None:
    """Run in another thread, where no interrupt can hit it halfway; an interrupt of this one asks it to stop and go back.

    An interrupt that comes too late for that, as on a busy machine, has the finished work undone.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work)
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                wait([future])
                break
            except KeyboardInterrupt as error:
                interrupt = error
                stop.set()
        if interrupt is None:
            future.result()
            return
        if future.exception() is None:
            undo()
        raise interrupt


class _Stopped(Exception):  # noqa: N818  (a request, not an error)
    """The caller was interrupted."""


@final
class Writer:
    """One call of :func:`apply`: what was saved, and how far it is.

    Args:
        seed: any integer.
        progress: as for :func:`apply`.
        fresh: names of parameters whose present values are not worth saving: their memory is new.
    """

    def __init__(self, seed: int, progress: Callable[[int, int], object] | None, fresh: Container[str] = ()) -> None:
        self._stop = threading.Event()
        self._seed = seed
        self._threads = torch.get_num_threads()
        self._progress = progress
        self._fresh = fresh
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []  # part of a parameter, its old values
        self._done = 0
        self._total = 0

    def write(self, targets: Sequence[tuple[ParameterPlan, Holding]], perform: Callable[[Callable[[], str]], None]) -> None:
        """Draw all, or put back what was there.

        Args:
            targets: what to draw, and where to.
            perform: does the work, and raises where it failed here or on another process.
        """

        def work() -> None:
            with torch.no_grad():
                try:
                    perform(lambda: self._write(targets))
                except BaseException:
                    self._restore()
                    raise

        _shielded(work, self._stop, self._restore)

    @torch.no_grad()
    def _restore(self) -> None:
        for part, old in self._saved:
            part.copy_(old)

    def _write(self, targets: Sequence[tuple[ParameterPlan, Holding]]) -> str:
        targets = [
            (planned, holding)
            for planned, holding in targets
            if holding.boxes and any(part.family is not Family.KEEP for part in planned.distributions)
        ]
        self._total = sum(holding.memory.numel() for _, holding in targets)
        elsewhere = []
        tasks: dict[bool, tuple[list[Task], list[Task]]] = {False: ([], []), True: ([], [])}
        for planned, holding in targets:
            if holding.memory.device.type != "cpu" or not holding.memory.is_contiguous():
                elsewhere.append((planned, holding))
                continue
            torch.autograd.graph.increment_version(holding.parameter)
            first, second = drawing_tasks(planned, self._seed, holding.boxes, holding.memory)
            matrices, ranges = tasks[planned.name not in self._fresh]
            matrices += first
            ranges += second
        self._run(*tasks[False])
        matrices, ranges = tasks[True]
        saving = self._saving([*matrices, *ranges])
        self._run(saving[: len(matrices)], saving[len(matrices) :])
        for planned, holding in elsewhere:  # one at a time, so that the memory to draw in is that of the largest
            self._write_elsewhere(planned, holding)
        return "written"

    def _write_elsewhere(self, planned: ParameterPlan, holding: Holding) -> None:
        """Drawn on the device, or in contiguous memory of the host and then copied."""
        memory = holding.memory
        if planned.name not in self._fresh:
            self._saved.append((memory, memory.to("cpu", copy=True)))
        torch.autograd.graph.increment_version(holding.parameter)
        if draws_on(memory):
            self._run(*drawing_tasks(planned, self._seed, holding.boxes, memory))
            return
        values = memory.to("cpu", copy=True).contiguous()
        self._run(*drawing_tasks(planned, self._seed, holding.boxes, values))
        memory.copy_(values)

    def _saving(self, tasks: Sequence[Task]) -> list[Task]:
        """The same tasks, each of which first saves what it overwrites."""
        sizes = [sum(target.nbytes for target in task.targets) for task in tasks]
        room = np.empty(sum(sizes), np.uint8)
        places = np.split(room, np.cumsum(sizes)[:-1])
        return [Task(task.targets, partial(self._save_and_draw, task, place)) for task, place in zip(tasks, places, strict=False)]

    def _save_and_draw(self, task: Task, room: NDArray[np.uint8]) -> None:
        for target in task.targets:
            part = target.view(torch.uint8)  # NumPy does not know every type; and torch's copy would start more threads
            old, room = room[: part.numel()].reshape(part.shape), room[part.numel() :]
            np.copyto(old, part.numpy())
            self._saved.append((part, torch.from_numpy(old)))
        task.draw()

    def _run(self, matrices: Sequence[Task], ranges: Sequence[Task]) -> None:
        if matrices:
            with one_thread():
                for task in matrices:
                    self._perform(task)
                    self._advance(task)
        if self._threads == 1 or len(ranges) <= 1:
            for task in ranges:
                self._perform(task)
                self._advance(task)
            return
        with ThreadPoolExecutor(max_workers=self._threads) as pool:
            try:
                pending = {pool.submit(self._perform, task): task for task in ranges}
                while pending:
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        future.result()
                        self._advance(pending.pop(future))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    @torch.no_grad()
    def _perform(self, task: Task) -> None:
        if self._stop.is_set():
            raise _Stopped("interrupted")
        task.draw()

    def _advance(self, task: Task) -> None:
        self._done += sum(target.numel() for target in task.targets)
        if self._progress is not None:
            self._progress(self._done, self._total)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch's: a factorisation or a sum rounds differently on another number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
