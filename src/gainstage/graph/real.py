"""The values of parameters: complex ones in their real form (a last dimension of two), sharded ones in part or whole."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as real numbers; a real tensor as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def real_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> values of every parameter, tied ones once, complex ones in their real form, lazy ones as they are."""
    return {
        name: parameter if bool(is_lazy(parameter)) else as_real(parameter.detach())  # bool: a type guard would mislead mypy
        for name, parameter in model.named_parameters()
    }


def is_sharded(value: object) -> bool:
    """A DTensor: this process may hold a part of it only."""
    tensor: Any = sys.modules.get("torch.distributed.tensor")  # a model can only have what was imported
    return tensor is not None and isinstance(value, tensor.DTensor)


def held(value: Any) -> Any:
    """What this process holds of a tensor; anything else as it is."""
    return value.to_local() if is_sharded(value) else value


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """What a sparse tensor stands for; any other as it is."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def whole(value: Any) -> Any:
    """All of a tensor, gathered from the processes that hold it; anything else as it is."""
    return value.full_tensor() if is_sharded(value) else value
