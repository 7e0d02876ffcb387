"""The table of a model's parameters: ties resolved, and those refused that no level can be set for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gainstage.errors import UnsupportedParameterError
from gainstage.graph import ParameterInfo


def parameter_table(model: nn.Module) -> tuple[Mapping[str, ParameterInfo], Mapping[str, str]]:
    """All parameters by canonical name, and the canonical name of every name.

    Args:
        model: any module; its parameters may lie on the meta device.

    Returns:
        canonical name -> info, in the model's own order, and name -> canonical name. One tensor under several names is
        one entry; its first name is the canonical one.

    Raises:
        UnsupportedParameterError: parameters without values to draw, all of them named.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    _refuse({group[0]: tensors[key] for key, group in names.items()})
    modules = dict(model.named_modules(remove_duplicate=False))
    infos = {}
    for key, (name, *aliases) in names.items():
        path = name.rpartition(".")[0]
        owner = type(modules[path])
        infos[name] = ParameterInfo(
            name=name,
            shape=tuple(tensors[key].shape),
            dtype=tensors[key].dtype,
            requires_grad=tensors[key].requires_grad,
            aliases=tuple(aliases),
            module_path=path,
            module_type=f"{owner.__module__}.{owner.__qualname__}",
        )
    return infos, {name: group[0] for group in names.values() for name in group}


def _refuse(parameters: Mapping[str, nn.Parameter]) -> None:
    reasons = [f"{name} ({reason})" for name, parameter in parameters.items() if (reason := _objection(parameter))]
    if reasons:
        raise UnsupportedParameterError(
            f"No level can be set for {', '.join(reasons)}. Run one forward pass to initialise lazy modules; "
            "for the others, build the model with dense floating-point parameters."
        )


def _objection(parameter: nn.Parameter) -> str:
    if bool(is_lazy(parameter)):  # a type guard, which would tell mypy that what follows is never reached
        return "lazy and not yet initialised"
    if parameter.is_complex():
        return f"complex, {parameter.dtype}"
    if parameter.layout is not torch.strided:
        return f"not dense, {parameter.layout}"
    if parameter.is_quantized:
        return f"quantized, {parameter.dtype}"
    if not parameter.is_floating_point():
        return f"not floating-point, {parameter.dtype}"
    if parameter.numel() == 0:
        return f"of size zero, shape {tuple(parameter.shape)}"
    return ""
