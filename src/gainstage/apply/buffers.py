"""A value for every buffer on the meta device, given or computed; or a refusal that names those without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from gainstage.apply.parts import join, walk
from gainstage.apply.rebuild import Rebuilder, missing_tensors
from gainstage.errors import InputError, UnknownNameError, nearest

Buffers = Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor | None]

# Names in one message, at most.
_NAMED = 8


def buffer_values(model: nn.Module, buffers: Buffers | None, seed: int) -> dict[int, torch.Tensor]:
    """Values for every buffer on the meta device, by the identity of the present tensor.

    Raises:
        InputError: a value is not known, or a given one does not fit.
    """
    values: dict[int, torch.Tensor] = {}
    used: set[str] = set()
    for path, _, modules in _paths(model):
        for name, tensor in missing_tensors(modules[-1]).items():
            given = _given(buffers, join(path, name))
            if given is not None:
                used.add(join(path, name))
                values[id(tensor)] = _fitting(join(path, name), given, tensor)
    lost = _compute(model, values, seed)
    if lost:
        raise InputError(
            f"No values are known for the buffers {listed(lost)}: the modules cannot be asked for them. "
            "Give them: materialize(..., buffers={name: tensor}), or a function from the name to the tensor."
        )
    for name in buffers if isinstance(buffers, Mapping) else ():
        if name not in used:
            raise UnknownNameError(f"{name!r} is no buffer on the meta device{nearest(name, used)}.")
    return values


def known_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Values of the buffers on the meta device that can be computed, by their names in the model."""
    values: dict[int, torch.Tensor] = {}
    _compute(model, values, seed=0)
    return {
        join(path, name): values[id(tensor)]
        for path, _, module in walk(model)
        for name, tensor in missing_tensors(module).items()
        if id(tensor) in values
    }


def _compute(model: nn.Module, values: dict[int, torch.Tensor], seed: int) -> list[str]:
    """Add the values that modules can be asked for; returns the names of the buffers that have none in the end."""
    lost: list[str] = []
    rebuilder = Rebuilder(seed)
    for path, keys, modules in _paths(model):
        missing = {name: tensor for name, tensor in missing_tensors(modules[-1]).items() if id(tensor) not in values}
        if missing:
            made = rebuilder.rebuild(keys, modules)
            values |= {id(tensor): made[name] for name, tensor in missing.items() if name in made}
            lost += [f"{join(path, name)} ({type(modules[-1]).__name__})" for name in missing if name not in made]
    return lost


def _paths(model: nn.Module) -> Iterator[tuple[str, list[str], list[nn.Module]]]:
    """Each module once: its name without wrappers, the keys that lead to it, and the modules on that way."""
    by_path = {path: module for path, _, module in walk(model)}
    seen = set()
    for path, clean, module in walk(model):
        if id(module) not in seen:
            seen.add(id(module))
            keys = path.split(".") if path else []
            yield clean, keys, [by_path[".".join(keys[:depth])] for depth in range(len(keys) + 1)]


def _given(buffers: Buffers | None, name: str) -> torch.Tensor | None:
    if buffers is None:
        return None
    return buffers.get(name) if isinstance(buffers, Mapping) else buffers(name)


def _fitting(name: str, given: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    if given.shape != expected.shape or given.is_meta:
        raise InputError(f"The buffer {name} has shape {list(expected.shape)}; given is {list(given.shape)} on {given.device}.")
    return given.detach().to(expected.dtype)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
