"""From the meta device to memory: a model whose every parameter is drawn and whose every buffer has its value."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from gainstage.apply.buffers import Buffers, buffer_values, listed
from gainstage.apply.holding import holdings_of
from gainstage.apply.memory import check_writable
from gainstage.apply.parts import Holding, walk
from gainstage.apply.ranks import together
from gainstage.apply.rebuild import missing_tensors
from gainstage.apply.write import PATIENCE, Writer, digest_of, integer_seed, sharing_ranks
from gainstage.errors import InputError, UnknownNameError, nearest
from gainstage.plan import Distribution, Family, ParameterPlan, Plan


def materialize(
    model: nn.Module,
    plan: Plan,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    only: Sequence[str] | str | None = None,
    buffers: Buffers | None = None,
    progress: Callable[[int, int], object] | None = None,
    timeout: float = PATIENCE,
) -> None:
    """Give a model that was built on the meta device, sharded or not, its memory, its parameters and its buffers.

    Parameters get the values that :func:`apply` writes; tied ones stay tied. Buffers on the meta device are computed as their
    modules compute them (see ``gainstage.apply.rebuild``). Either all is accounted for when this returns, or an error names
    what is not, and the model is on the meta device as before.

    Args:
        model: with all parameters and buffers on the meta device, or some; what has memory already stays where it is.
        plan: what to draw.
        device: where the memory is to be.
        seed: any integer.
        only: patterns (``lm_head.*``) of the parameters to draw; all others have values already, which stay. For what is new in
            a model whose checkpoint is loaded.
        buffers: values that cannot be computed, by name, or a function from a name to a value or None. Tensors that a module
            keeps as plain attributes count as buffers.
        progress: as for :func:`apply`.
        timeout: seconds to wait for other processes that share the model.

    Raises:
        InputError: a parameter or buffer is unaccounted for; the message names it.
        PlanMismatchError: the plan was made for another model.
        RankError: another process has another plan or seed, failed, or does not answer.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Linear(3, 2)
        >>> plan = gs.plan(model, args=(torch.randn(4, 3),))
        >>> gs.materialize(model, plan)
    """
    number = integer_seed(seed)
    found = holdings_of(model, plan.parameters)
    ranks = sharing_ranks(found)
    patterns = (only,) if isinstance(only, str) else only
    values: dict[int, torch.Tensor] = {}

    def check() -> str:
        plan.check_fits(found)
        _check_accounted(plan, found, _chosen(found, patterns))
        check_writable({name: holding.memory for name, holding in found.items() if not holding.memory.is_meta})
        values.update(buffer_values(model, buffers, number))
        return digest_of(plan, number, repr(patterns))

    together(ranks, check, timeout)
    chosen = _chosen(found, patterns)
    fresh = frozenset(name for name, holding in found.items() if holding.memory.is_meta)
    with _allocated(model, torch.device(device), values):
        held = holdings_of(model, plan.parameters)
        targets = [(plan.parameters[name], held[name]) for name in chosen]
        Writer(number, progress, fresh).write(targets, lambda work: together(ranks, work, timeout))
    _mark_for_transformers(model)


def param_init_fn(
    model: nn.Module, plan: Plan, *, device: torch.device | str = "cpu", seed: int = 0, buffers: Buffers | None = None
) -> Callable[[nn.Module], None]:
    """What ``FullyShardedDataParallel(model, param_init_fn=...)`` calls on each module on the meta device.

    It gives the module its own parameters and buffers, not those of its children, with the values of :func:`materialize`. A
    parameter that several modules share becomes one tensor again.

    Args:
        model: the whole model, on the meta device, before it is wrapped; its modules have to be told by name.
        plan: what to draw.
        device: where the memory is to be.
        seed: any integer.
        buffers: as for :func:`materialize`.

    Raises:
        InputError: a parameter or buffer is unaccounted for.
        PlanMismatchError: the plan was made for another model.
    """
    number = integer_seed(seed)
    found = holdings_of(model, plan.parameters)
    plan.check_fits(found)
    _check_accounted(plan, found, found)
    values = buffer_values(model, buffers, number)
    modules = {id(module): module for _, _, module in walk(model)}
    planned = {id(holding.parameter): (plan.parameters[name], holding) for name, holding in found.items()}
    made: dict[int, nn.Parameter] = {}

    def initialize(module: nn.Module) -> None:
        if id(module) not in modules:
            raise InputError(f"{type(module).__name__} is no module of the model that param_init_fn was made for.")
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                memory = torch.empty_like(parameter, device=device)
                plan_of_it, holding = planned[id(parameter)]
                target = replace(holding, parameter=memory, memory=memory)
                Writer(number, None, {plan_of_it.name}).write([(plan_of_it, target)], _alone)
                made[id(parameter)] = _as_parameter(memory, parameter)
            module._parameters[name] = made[id(parameter)]
        _set_missing(module, values, torch.device(device))

    return initialize


def _alone(work: Callable[[], str]) -> None:
    """No other process waits for it."""
    work()


def _chosen(found: Mapping[str, Holding], patterns: Sequence[str] | None) -> list[str]:
    """Names of the parameters to draw."""
    if patterns is None:
        return list(found)
    chosen = set()
    for pattern in patterns:
        matched = {
            name for name, holding in found.items() if any(fnmatchcase(known, pattern) for known in (name, *holding.aliases))
        }
        if not matched:
            raise UnknownNameError(f"The model has no parameter like {pattern!r}{nearest(pattern, found)}.")
        chosen |= matched
    return [name for name in found if name in chosen]


def _check_accounted(plan: Plan, found: Mapping[str, Holding], chosen: Container[str]) -> None:
    """Every parameter on the meta device is drawn, and the whole of it."""
    lost = []
    for name, holding in found.items():
        keeps = any(part.family is Family.KEEP for part in _applied(plan.parameters[name]))
        if holding.memory.is_meta and (keeps or name not in chosen):
            lost.append(name)
    if lost:
        raise InputError(
            f"{listed(lost)} would have no values: on the meta device, and to be kept (by the plan, or left out by only=). "
            "Load them first, or plan them."
        )


def _applied(planned: ParameterPlan) -> Iterator[Distribution]:
    """Distributions of a parameter that have entries; that of the entries outside of blocks may have none."""
    yield from (block.distribution for block in planned.blocks)
    covered = sum(block.stop - block.start for block in planned.blocks)
    if not planned.blocks or covered < planned.shape[planned.blocks[0].dim]:
        yield planned.distribution


@contextmanager
def _allocated(model: nn.Module, device: torch.device, values: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """The model in memory, with its buffers; on the meta device again where what follows fails."""
    if not any(tensor.is_meta for tensor in model.parameters()) and not values:
        yield  # wrappers that have their memory are better left alone
        return
    before = [(module, dict(module._parameters), dict(module._buffers), dict(vars(module))) for module in model.modules()]
    fresh: dict[int, torch.Tensor] = {}

    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in fresh:
            value = values.get(id(tensor))
            fresh[id(tensor)] = torch.empty_like(tensor, device=device) if value is None else value.to(device, copy=True)
        return fresh[id(tensor)]

    try:
        _apply_to(model, allocate)
        _tie(before)
        for module, _, _, _ in before:
            _set_missing(module, values, device)
        yield
    except BaseException:
        _apply_to(model, lambda tensor: torch.empty_like(tensor, device="meta") if _is_fresh(tensor, fresh) else tensor)
        for module, parameters, buffers, attributes in before:
            vars(module).update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        raise


def _apply_to(model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """As ``to_empty`` does it: wrappers like FSDP2 see to their own."""
    model._apply(function)  # type: ignore[no-untyped-call]


def _is_fresh(tensor: torch.Tensor, fresh: Mapping[int, torch.Tensor]) -> bool:
    """Whether it is a DTensor that got its memory in place; other parameters are replaced by new ones."""
    return id(tensor) in fresh and not tensor.is_meta


def _tie(before: Sequence[tuple[nn.Module, dict[str, nn.Parameter | None], Any, Any]]) -> None:
    """What was one parameter becomes one again, and keeps what users have noted on it."""
    made: dict[int, nn.Parameter] = {}
    for module, parameters, _, _ in before:
        for name, old in parameters.items():
            new = module._parameters[name]
            if old is None or new is None:
                continue
            if id(old) not in made:
                vars(new).update(vars(old))
                made[id(old)] = new
            module._parameters[name] = made[id(old)]


def _set_missing(module: nn.Module, values: Mapping[int, torch.Tensor], device: torch.device) -> None:
    for name, tensor in missing_tensors(module).items():
        holder = module._buffers if name in module._buffers else vars(module)
        holder[name] = values[id(tensor)].to(device)


def _as_parameter(memory: torch.Tensor, old: nn.Parameter) -> nn.Parameter:
    new = nn.Parameter(memory, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    return new


def _mark_for_transformers(model: nn.Module) -> None:
    """Transformers draws again what does not carry its mark."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not any(isinstance(module, transformers.PreTrainedModel) for module in model.modules()):
        return
    marked: tuple[Any, ...] = (*model.modules(), *model.parameters(), *model.buffers())
    for each in marked:
        each._is_hf_initialized = True
