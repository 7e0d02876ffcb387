"""Complex parameters in their real form: a last dimension of two, the real and the imaginary part."""

from __future__ import annotations

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
