"""A model whose processes hold pieces of it, as the model in one piece: its code, its names, its values one at a time."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from gainstage.apply.flattened import reshard_flattened, whole_on_meta
from gainstage.apply.holding import holdings_of
from gainstage.apply.parts import Holding, fsdp_version, join, walk
from gainstage.errors import InputError
from gainstage.graph import as_real, is_sharded, real_parameters, whole
from gainstage.graph.attributes import hookable


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A model in one piece.

    Args:
        running: the module to run: without the wrapper of DistributedDataParallel, which matters to gradients only.
        code: the module to follow: ``running`` itself, or where that is sharded a copy on the meta device.
        buffers: values of the buffers of ``code`` that lie on the meta device.
        modules: of ``running``, by their paths in ``code``.
        parameters: values of whole parameters by name. All processes ask for them in the same order.
    """

    running: nn.Module
    code: nn.Module
    buffers: Mapping[str, torch.Tensor]
    modules: tuple[tuple[str, nn.Module], ...]
    parameters: Mapping[str, torch.Tensor]


def assembled(model: nn.Module, known: Container[str] = ()) -> Assembled:
    """The model in one piece; nothing is gathered yet but buffers.

    Args:
        model: plain, or with DTensors for parameters (FSDP2, tensor parallel), or flattened ones (FSDP1), or in
            DistributedDataParallel.
        known: names that a plan has, for a plan that was made of the wrapped model.

    Raises:
        InputError: what the modules of a sharded model refer to cannot be copied.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel) and next(iter(dict(model.named_parameters())), "") not in known:
        model = model.module
    if not any(map(is_sharded, (*model.parameters(), *model.buffers()))) and not _fully_sharded(model):
        modules = tuple(hookable(model))
        return Assembled(running=model, code=model, buffers={}, modules=modules, parameters=real_parameters(model))
    holdings = holdings_of(model)
    paths: dict[int, str] = {}
    for _, clean, module in walk(model):
        paths.setdefault(id(module), clean)
    inner = {paths[id(module)]: module for _, _, module in walk(model)}  # of wrapper and wrapped the latter
    buffers = {
        join(clean, key): whole(buffer)
        for _, clean, module in walk(model)
        for key, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    }
    code = _on_meta(model, {key: inner[path] for key, path in paths.items()})
    return Assembled(running=model, code=code, buffers=buffers, modules=tuple(inner.items()), parameters=_Gathered(holdings))


@contextmanager
def sharded_again(model: nn.Module) -> Iterator[None]:
    """Have FSDP give back what it gathers for a forward pass, at the end."""
    try:
        yield
    finally:
        for module in _fully_sharded(model):
            if fsdp_version(module) == 1:
                reshard_flattened(module)
            else:
                module.reshard()


def _fully_sharded(model: nn.Module) -> list[Any]:
    """Modules whose parameters FSDP2 or FSDP1 shares out."""
    return [module for module in model.modules() if fsdp_version(module)]


def _on_meta(model: nn.Module, inner: Mapping[int, nn.Module]) -> nn.Module:
    """A copy of the modules without what shards and wraps them; parameters and buffers are whole, and on the meta device.

    Args:
        model: with DTensors.
        inner: identity of a module -> what it wraps, or itself.
    """
    memo: dict[int, Any] = {
        id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in model.buffers()
    }
    for parameter in model.parameters():
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    distributed: Any = torch.distributed
    shared = (distributed.DeviceMesh, distributed.ProcessGroup)  # of the running processes: they cannot be copied
    shells: dict[int, Any] = {id(module): object.__new__(_own_class(module)) for module in inner.values()}
    memo |= {key: shells[id(module)] for key, module in inner.items()}
    flattened: dict[int, dict[str, nn.Parameter]] = {}
    for module in _fully_sharded(model):
        flattened |= whole_on_meta(module) if fsdp_version(module) == 1 else {}
    states = {id(module): _state(module, flattened.get(id(module), {})) for module in inner.values()}
    computed = [value for state in states.values() for value in state.values()]
    memo |= {id(value): value.detach().clone() for value in computed if isinstance(value, torch.Tensor) and not value.is_leaf}
    memo |= {id(value): value for value in computed if isinstance(value, shared)}
    try:
        for key, state in states.items():
            shells[key].__dict__.update(copy.deepcopy(state, memo))
    except Exception as error:
        raise InputError(f"The sharded model cannot be copied without values: {type(error).__name__}: {error}") from error
    made: nn.Module = memo[id(model)]
    return made


def _own_class(module: nn.Module) -> type:
    """FSDP2 replaces the class of a module by a subclass of FSDPModule and of that class."""
    return type(module).__mro__[2] if fsdp_version(module) == 2 else type(module)


def _state(module: nn.Module, flattened: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Attributes, without the hooks of torch's sharding and what its wrappers remember; parameters that were flattened whole."""
    state = {
        name: value
        for name, value in module.__dict__.items()
        if not (name.startswith("__composable_api") or name in flattened or _is_of_sharding(value))
    }
    own = {name: own for name, own in module._parameters.items() if not getattr(own, "_is_flat_param", False)}
    state["_parameters"] = {**own, **flattened}
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
        state[name] = type(state[name])((key, hook) for key, hook in state[name].items() if not _is_of_sharding(hook))
    for name in ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
        state[name] = type(state[name])()
    return state


def _is_of_sharding(value: Any) -> bool:
    function = getattr(value, "func", value)  # of a partial
    is_code = callable(function) and not isinstance(function, nn.Module)
    return is_code and str(getattr(function, "__module__", "")).startswith("torch.distributed.")


def _whole_of(holding: Holding) -> torch.Tensor:
    """All entries of a parameter, in their real form; those of a flattened one are put together from its runs."""
    if holding.group is None:
        return as_real(whole(holding.parameter.detach()))
    entries = torch.zeros(holding.shape or (1,), dtype=holding.dtype, device=holding.memory.device)
    for box in holding.boxes:
        entries[tuple(slice(low, high) for low, high in box.bounds)] = box.view(holding.memory)
    torch.distributed.all_reduce(entries, group=holding.group)
    return entries.view(holding.shape)


@final
class _Gathered(Mapping[str, torch.Tensor]):
    """Whole parameters in their real form; the last one is kept, as it is read several times in a row."""

    def __init__(self, holdings: Mapping[str, Holding]) -> None:
        self._holdings = holdings
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        """Gathered now, or just before."""
        if self._last is None or self._last[0] != name:
            self._last = name, _whole_of(self._holdings[name])
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        """Names, in the model's order."""
        return iter(self._holdings)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self._holdings)
