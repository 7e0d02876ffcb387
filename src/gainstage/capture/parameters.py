"""The table of a model's parameters: ties resolved, and those refused that no level can be set for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gainstage.capture.refusal import refusal
from gainstage.capture.surroundings import copied, quiet, seeded
from gainstage.errors import UnsupportedParameterError
from gainstage.graph import ParameterInfo, as_real

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def parameter_table(model: nn.Module) -> tuple[Mapping[str, ParameterInfo], Mapping[str, str]]:
    """All parameters by canonical name, and the canonical name of every name.

    Args:
        model: any module; its parameters may lie on the meta device.

    Returns:
        canonical name -> info, in the model's own order, and name -> canonical name. One tensor under several names is
        one entry; its first name is the canonical one.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    modules = dict(model.named_modules(remove_duplicate=False))
    infos = {}
    for key, (name, *aliases) in names.items():
        path = name.rpartition(".")[0]
        owner = type(modules[path])
        infos[name] = ParameterInfo(
            name=name,
            shape=tuple(as_real(tensors[key]).shape),
            dtype=as_real(tensors[key]).dtype,
            requires_grad=tensors[key].requires_grad,
            aliases=tuple(aliases),
            module_path=path,
            module_type=f"{owner.__module__}.{owner.__qualname__}",
        )
    return infos, {name: group[0] for group in names.values() for name in group}


def with_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    """The model; or a copy that has run once, if there are lazy parameters, which then have shapes; and a sentence that says so.

    Raises:
        UnsupportedParameterError: parameters without values to draw, all of them named.
        CaptureError: the model does not run.
    """
    lazy = {name: bool(is_lazy(parameter)) for name, parameter in model.named_parameters()}  # bool: the type guard misleads mypy
    _refuse({name: parameter for name, parameter in model.named_parameters() if not lazy[name]})
    packed = [name for name, one in model.named_modules() if type(one).__module__.startswith(_QUANTIZED)]
    packed = [name for name in packed if name.rpartition(".")[0] not in packed]
    if packed:
        raise UnsupportedParameterError(
            f"{', '.join(packed[:8])}: quantized, with weights that are packed away and no parameters any more. Plan and draw "
            "the model first, then quantize it."
        )
    if not any(lazy.values()):
        return model, []
    shaped, fed_args, fed_kwargs = copied(model, args, kwargs)
    try:
        with torch.no_grad(), seeded(0), quiet():
            shaped(*fed_args, **fed_kwargs)
    except Exception as error:
        raise refusal(error) from error
    return shaped, ["Lazy modules got their shapes from a run of a copy; run the model once before values are written."]


def _refuse(parameters: Mapping[str, nn.Parameter]) -> None:
    reasons = [f"{name} ({reason})" for name, parameter in parameters.items() if (reason := _objection(parameter))]
    if reasons:
        raise UnsupportedParameterError(
            f"No level can be set for {', '.join(reasons)}. Build the model with dense floating-point parameters; what is no "
            "weight, such as indices, is a buffer (register_buffer)."
        )


def _objection(parameter: nn.Parameter) -> str:
    if parameter.layout is not torch.strided:
        return f"not dense, {parameter.layout}"
    if parameter.is_quantized:
        return f"quantized, {parameter.dtype}"
    if not parameter.is_floating_point() and not parameter.is_complex():
        return f"not floating-point, {parameter.dtype}"
    return ""
