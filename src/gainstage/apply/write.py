"""Writing a plan into a model: all parameters or none.

The old values of every piece are saved just before it is drawn, and put back if anything goes wrong or the user interrupts.
So the price is host memory of the size of the parameters that are written, until the call returns. Nothing cheaper can go
back; drawing elsewhere first and copying takes the same memory and a fifth more time (4096 x 4096 normal, 2 threads).
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gainstage.apply.memory import check_writable
from gainstage.apply.stage import Task, drawing_tasks
from gainstage.errors import InputError, PlanMismatchError
from gainstage.plan import Distribution, Family, ParameterPlan, Plan


@dataclass(frozen=True, slots=True)
class _Found:
    """A parameter of the model, as the plan compares it."""

    tensor: nn.Parameter
    aliases: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype


def apply(model: nn.Module, plan: Plan, *, seed: int = 0, progress: Callable[[int, int], object] | None = None) -> None:
    """Draw every parameter from its distribution, in place: all of them, or none where anything fails.

    A value depends on the seed, the parameter's canonical name and the position in it only: not on the order of parameters,
    the device, the number of threads, or the present values.

    Args:
        model: has the parameters that the plan was made for, with memory behind them.
        plan: what to draw.
        seed: any integer.
        progress: called now and then with the number of entries drawn so far and in all.

    Raises:
        PlanMismatchError: the plan was made for another model.
        InputError: parameters on the meta device, or without memory of their own; a seed that is no integer.
    """
    found = _parameters(model)
    plan.check_fits(found)
    check_writable({name: parameter.tensor for name, parameter in found.items()})
    writer = _Writer(_integer(seed), torch.get_num_threads(), progress)
    _shielded(lambda: writer.write([(plan.parameters[name], parameter.tensor) for name, parameter in found.items()]), writer.stop)


def _integer(seed: object) -> int:
    try:
        return operator.index(seed)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"The seed is {seed!r}; give an integer.") from error


def _parameters(model: nn.Module) -> dict[str, _Found]:
    names: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
        if bool(is_lazy(parameter)):
            raise PlanMismatchError(f"{name} is not initialised yet; run one forward pass first.")
    return {name: _Found(tensors[key], tuple(aliases)) for key, (name, *aliases) in names.items()}


def _shielded(work: Callable[[], None], stop: threading.Event) -> None:
    """Run in another thread, where no interrupt can hit it halfway; an interrupt of this one asks it to stop and go back."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work)
        interrupt: KeyboardInterrupt | None = None
        while not future.done():
            try:
                wait([future])
            except KeyboardInterrupt as error:
                interrupt = error
                stop.set()
        if interrupt is not None:
            raise interrupt
        future.result()


class _Stopped(Exception):  # noqa: N818  (a request, not an error)
    """The caller was interrupted."""


@final
class _Writer:
    """One call of :func:`apply`: what was saved, and how far it is."""

    def __init__(self, seed: int, threads: int, progress: Callable[[int, int], object] | None) -> None:
        self.stop = threading.Event()
        self._seed = seed
        self._threads = threads
        self._progress = progress
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []  # part of a parameter, its old values
        self._done = 0
        self._total = 0

    def write(self, targets: Sequence[tuple[ParameterPlan, nn.Parameter]]) -> None:
        """Draw all, or put back what was there."""
        with torch.no_grad():
            try:
                self._write(targets)
            except BaseException:
                for part, old in self._saved:
                    part.copy_(old)
                raise

    def _write(self, targets: Sequence[tuple[ParameterPlan, nn.Parameter]]) -> None:
        matrices: list[Task] = []
        ranges: list[Task] = []
        elsewhere = []
        for planned, parameter in targets:
            if all(part.family is Family.KEEP for part in _distributions(planned)):
                continue
            self._total += parameter.numel()
            if parameter.device.type != "cpu" or not parameter.is_contiguous():
                elsewhere.append((planned, parameter))
                continue
            torch.autograd.graph.increment_version(parameter)
            first, second = drawing_tasks(planned, self._seed, parameter.detach())
            matrices += first
            ranges += second
        self._run(matrices, ranges, save=True)
        for planned, parameter in elsewhere:  # one at a time, so that the memory to draw in is that of the largest
            values = parameter.detach().to("cpu", copy=True).contiguous()
            self._run(*drawing_tasks(planned, self._seed, values), save=False)
            self._saved.append((parameter, parameter.detach().to("cpu", copy=True)))
            parameter.copy_(values)

    def _run(self, matrices: Sequence[Task], ranges: Sequence[Task], *, save: bool) -> None:
        if matrices:
            with _one_thread():
                for task in matrices:
                    self._perform(task, save=save)
                    self._advance(task)
        if self._threads == 1 or len(ranges) <= 1:
            for task in ranges:
                self._perform(task, save=save)
                self._advance(task)
            return
        with ThreadPoolExecutor(max_workers=self._threads) as pool:
            try:
                pending = {pool.submit(self._perform, task, save=save): task for task in ranges}
                while pending:
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        future.result()
                        self._advance(pending.pop(future))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    @torch.no_grad()
    def _perform(self, task: Task, *, save: bool) -> None:
        if self.stop.is_set():
            raise _Stopped
        if save:
            part = task.target.view(torch.uint8)  # NumPy does not know every type; and torch's copy would start more threads
            self._saved.append((part, torch.from_numpy(part.numpy().copy())))
        task.draw()

    def _advance(self, task: Task) -> None:
        self._done += task.target.numel()
        if self._progress is not None:
            self._progress(self._done, self._total)


def _distributions(planned: ParameterPlan) -> tuple[Distribution, ...]:
    return (planned.distribution, *(block.distribution for block in planned.blocks))


@contextmanager
def _one_thread() -> Iterator[None]:
    """A factorisation rounds differently on another number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
