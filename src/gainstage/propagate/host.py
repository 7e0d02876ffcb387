"""Operations on the CPU of a graph that may have been captured for another device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch._ops import OpOverload

from gainstage.graph import Node, TensorMeta, tensor_leaves

aten = torch.ops.aten

_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
# A graph says nothing of memory: an operation in the place of those that the model had may lay its result out in another way.
_OF_ANY_LAYOUT: dict[Any, OpOverload] = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


def run_on_host(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Result of a node's operation on CPU tensors.

    What the CPU can do with floating-point numbers only (count integers in bins) is done with these, and is cast back; what it
    can do with integers only (their bits) is done with what was drawn of them, rounded down.
    """
    assert node.op is not None
    op = _OF_ANY_LAYOUT.get(node.op, node.op)
    placed = _mapped(with_conditions(node, args), _on_host)
    named = {name: _mapped(argument, _on_host) for name, argument in kwargs.items()}
    try:
        return op(*placed, **named)
    except NotImplementedError:
        whole = node.meta.dtype if isinstance(node.meta, TensorMeta) else torch.bool
        if whole in _INTEGERS and any(tensor.is_floating_point() for tensor in tensor_leaves(placed)):
            return op(*_mapped(placed, lambda argument: _as_integers(argument, whole)), **named)
        wide, named = _mapped(placed, _widened), {name: _mapped(argument, _widened) for name, argument in named.items()}
        return _cast(op(*wide, **named), node.meta)


def with_conditions(node: Node, args: Sequence[Any]) -> list[Any]:
    """Arguments with what was drawn of conditions, numbers 0 and 1, as booleans: masks, and all that meets booleans in one."""
    op, meta = node.op, node.meta
    names = [argument.name for argument in op._schema.arguments] if isinstance(op, OpOverload) else []
    is_logical = isinstance(meta, TensorMeta) and meta.dtype is torch.bool and any(map(_is_boolean, tensor_leaves(args)))
    return [
        _mapped(given, _as_condition) if is_logical or name in ("mask", "condition") else given
        for name, given in zip_longest(names[: len(args)], args)
    ]


def _is_boolean(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.bool


def _as_condition(argument: Any) -> Any:
    return argument > 0.5 if isinstance(argument, torch.Tensor) and argument.is_floating_point() else argument


def _on_host(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _as_integers(argument: Any, dtype: torch.dtype) -> Any:
    return argument.floor().to(dtype) if isinstance(argument, torch.Tensor) and argument.is_floating_point() else argument


def _widened(argument: Any) -> Any:
    is_integer = isinstance(argument, torch.Tensor) and not argument.is_floating_point() and not argument.is_complex()
    return argument.to(torch.float64) if is_integer else argument


def _mapped(argument: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(_mapped(item, function) for item in argument)
    return function(argument)


def _cast(result: Any, meta: TensorMeta | tuple[TensorMeta | None, ...] | None) -> Any:
    if isinstance(result, (list, tuple)) and isinstance(meta, tuple):
        return [_cast(item, each) for item, each in zip(result, meta, strict=True)]
    return result.to(meta.dtype) if isinstance(result, torch.Tensor) and isinstance(meta, TensorMeta) else result
