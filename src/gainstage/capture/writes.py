"""What a write in place computes, as an ordinary operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload, OpOverloadPacket

from gainstage.graph import Node, Ref, TensorMeta

aten = torch.ops.aten

_RENAMED = {"normal_": "normal_functional"}


@dataclass(frozen=True, slots=True)
class Step:
    """An operation to append; PREVIOUS among its arguments stands for the result of the step before."""

    PREVIOUS: ClassVar[object] = object()

    op: Callable[..., Any] | None
    args: tuple[Any, ...]
    meta: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def is_handle_change(node: Node) -> bool:
    """Whether a node changes the shape of a tensor object (squeeze_ and kin) and not its memory."""
    return isinstance(node.op, OpOverload) and (torch.Tag.inplace_view in node.op.tags or node.op is aten.detach_.default)


def written_operand(node: Node) -> Ref | None:
    """The one operand that an operation writes into: the first (``add_``), or what is given as ``out``; else None."""
    assert isinstance(node.op, OpOverload)
    schema = node.op._schema
    written = [argument.name for argument in schema.arguments if argument.is_write]
    if written == ["out"]:
        target = node.kwargs.get("out")
    elif written == [schema.arguments[0].name] and schema.name.endswith("_"):
        target = node.args[0] if node.args else None
    else:
        return None
    return target if isinstance(target, Ref) else None


def functional_write(node: Node, metas: Mapping[str, Any]) -> tuple[Step, ...] | None:
    """The steps that compute what a write in place leaves in :func:`written_operand`.

    Args:
        node: the writing node, its operands already values.
        metas: node name -> meta.

    Returns:
        The steps; none if the result is the second operand as it stands (a copy); None if the operation writes
        into several operands or has no counterpart that does not write.
    """
    assert isinstance(node.op, OpOverload)
    schema = node.op._schema
    namespace, _, name = schema.name.partition("::")
    written = written_operand(node)
    if written is None:
        return None
    target = metas[written.name]
    assert isinstance(target, TensorMeta)
    if "out" in node.kwargs:
        return _elsewhere(node, target, metas)
    if name in {"zero_", "fill_"}:
        return _filled(node.args[1] if name == "fill_" else 0, target, metas)
    if name == "copy_":
        return _broadcast(node.args[1], target, metas)
    packet = getattr(getattr(torch.ops, namespace), _RENAMED.get(name, name[:-1]), None)
    op = None if packet is None else _counterpart(packet, schema)
    if op is None:
        return None
    if is_handle_change(node):
        return (Step(op, node.args, node.meta, node.kwargs),)
    return (Step(op, node.args, _promoted(node, target, metas), node.kwargs), *_cast(node, target, metas))


def _counterpart(packet: OpOverloadPacket, schema: Any) -> OpOverload | None:
    """The overload that takes what a writing one takes, by types: ``pow_.Scalar`` raises a tensor, ``pow.Scalar`` a number."""
    types = [str(argument.type) for argument in schema.arguments]
    same: OpOverload | None = getattr(packet, schema.overload_name or "default", None)
    is_same = same is not None and [str(argument.type) for argument in same._schema.arguments] == types
    return same if is_same else _taking(packet, types)


def _taking(packet: OpOverloadPacket, types: list[str]) -> OpOverload | None:
    """The overload whose arguments have these types."""
    overloads: list[OpOverload] = [getattr(packet, name) for name in packet.overloads()]  # type: ignore[no-untyped-call]
    return next((op for op in overloads if [str(argument.type) for argument in op._schema.arguments] == types), None)


def _elsewhere(node: Node, target: TensorMeta, metas: Mapping[str, Any]) -> tuple[Step, ...] | None:
    """The ordinary operation, in the element type of what it was to write into."""
    assert isinstance(node.op, OpOverload)
    packet = getattr(torch.ops, node.op.namespace), node.op._schema.name.partition("::")[2]
    given = [str(argument.type) for argument in node.op._schema.arguments if not argument.is_write]
    op = _taking(getattr(*packet), given)
    if op is None or not isinstance(node.meta, TensorMeta) or node.meta.shape != target.shape:
        return None
    kwargs = {name: value for name, value in node.kwargs.items() if name != "out"}
    return (Step(op, node.args, _promoted(node, target, metas), kwargs), *_cast(node, target, metas))


def _filled(value: Any, target: TensorMeta, metas: Mapping[str, Any]) -> tuple[Step, ...]:
    if isinstance(value, Ref):
        return _broadcast(value, target, metas)
    return (Step(aten.full.default, (list(target.shape), value), target, {"dtype": target.dtype}),)


def _broadcast(source: Ref, target: TensorMeta, metas: Mapping[str, Any]) -> tuple[Step, ...]:
    """The source, in the shape and element type of the target."""
    meta = metas[source.name]
    steps = []
    if meta.dtype != target.dtype:
        steps.append(Step(aten.to.dtype, (source, target.dtype), TensorMeta(meta.shape, target.dtype)))
    if meta.shape != target.shape:
        operand = Step.PREVIOUS if steps else source
        steps.append(Step(aten.expand.default, (operand, list(target.shape)), target))
    return tuple(steps)


def _promoted(node: Node, target: TensorMeta, metas: Mapping[str, Any]) -> TensorMeta:
    """Element type of the ordinary operation, which a write would cast back to that of the target."""
    dtype = target.dtype
    for name in node.operands():
        other = metas[name]
        if isinstance(other, TensorMeta) and other.shape and other.dtype.is_floating_point and dtype.is_floating_point:
            dtype = torch.promote_types(dtype, other.dtype)
    return TensorMeta(target.shape, dtype)


def _cast(node: Node, target: TensorMeta, metas: Mapping[str, Any]) -> tuple[Step, ...]:
    if _promoted(node, target, metas).dtype == target.dtype:
        return ()
    return (Step(aten.to.dtype, (Step.PREVIOUS, target.dtype), target),)
