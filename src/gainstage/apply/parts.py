"""What a process holds of a parameter, and the names that parameters have without torch's wrappers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gainstage.apply.box import Box

# Children under which torch's wrappers (compile, activation checkpointing, FSDP1) keep the module that they wrap.
_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A parameter of the model: what the plan is compared with, and the memory that this process has for it.

    Args:
        shape: of the whole parameter.
        dtype: element type.
        aliases: further names of the same tensor.
        parameter: the tensor whose version counts a write.
        memory: what this process holds of it.
        boxes: which entries that is.
        ranks: the processes that hold parts of the parameter; empty where this one has the whole for itself.
        group: the process group among which a flattened parameter is cut.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    aliases: tuple[str, ...]
    parameter: torch.Tensor
    memory: torch.Tensor
    boxes: tuple[Box, ...]
    ranks: frozenset[int] = frozenset()
    group: Any = None


def join(path: str, name: str) -> str:
    """Name of what a module at ``path`` holds."""
    return f"{path}.{name}" if path else name


def walk(module: nn.Module, path: str = "", clean: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Every module by its path and by its path without wrappers, as often as it is used, in the model's order."""
    yield path, clean, module
    for name, child in module._modules.items():
        if child is not None:
            inside = clean if _is_wrapping(module, name) else join(clean, name)
            yield from walk(child, join(path, name), inside)


def _is_wrapping(module: nn.Module, name: str) -> bool:
    return name in _WRAPPED or (name == "module" and isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)))


def fsdp_version(module: nn.Module) -> int:
    """1 or 2 where FSDP1 or FSDP2 shares out a module's parameters, 0 for all others."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # a model can only have what was imported
    if fsdp is None:
        return 0
    return 2 if isinstance(module, fsdp.FSDPModule) else int(isinstance(module, fsdp.FullyShardedDataParallel))


def without_wrappers(name: str) -> str:
    """A name without the parts that compile, activation checkpointing and FSDP1 add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)
