"""Computes, for real and on the CPU, whatever depends on no parameter and on no floating-point input."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from gainstage.capture.lowered import meta_of
from gainstage.errors import CaptureError
from gainstage.graph import Node, NodeKind, Ref, TensorMeta
from gainstage.graph.families import ROW_READS

aten = torch.ops.aten

# These read nothing of their first operand but its shape.
_FILLS = {"zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1, "zero": 0}
_FILLS_WITH = {"full_like": 1, "new_full": 2, "fill": 1}  # position of what they fill with
_UNWRITTEN = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})


def fold(nodes: Sequence[Node], outputs: Iterable[str], unsized: Collection[str] = ()) -> tuple[list[Node], list[str]]:
    """Replace what is known by its value.

    Args:
        nodes: a graph without writes; constants may hold values on the meta device.
        outputs: names of the outputs.
        unsized: nodes whose size depends on values, so that what fills them is not known.

    Returns:
        The nodes without those that only constants read, and one sentence for each value that had to be guessed.

    Raises:
        CaptureError: an operation that cannot be computed.
    """
    known = _known(nodes, unsized)
    read = {name for node in nodes if node.name not in known for name in node.operands()} | set(outputs)
    frontier = read & known
    needed = set(frontier)
    for node in reversed(nodes):
        if node.name in needed and not _is_fill(node):
            needed.update(node.operands())
    values: dict[str, Any] = {}
    assumptions: list[str] = []
    for node in nodes:
        if node.name in needed and node.name in known:
            values[node.name] = _evaluate(node, values, nodes, assumptions)
    return [_with_value(node, values, known) for node in nodes if _stays(node, known, frontier, values)], assumptions


def _known(nodes: Sequence[Node], unsized: Collection[str]) -> set[str]:
    known: set[str] = set()
    for node in nodes:
        if node.kind is NodeKind.CONSTANT or (
            node.kind is NodeKind.OP
            and _is_determined(node)
            and ((_is_fill(node) and node.name not in unsized) or all(name in known for name in node.operands()))
        ):
            known.add(node.name)
    return known


def _is_fill(node: Node) -> bool:
    return _filling(node) is not None and isinstance(node.meta, TensorMeta) and all(size >= 0 for size in node.meta.shape)


def _filling(node: Node) -> float | None:
    """The number that a node fills a tensor with, None for other nodes and where it is computed."""
    name = node.short_name
    if name not in _FILLS_WITH:
        return _FILLS.get(name)
    position = _FILLS_WITH[name]
    number = node.args[position] if len(node.args) > position else node.kwargs.get("fill_value", node.kwargs.get("value"))
    return number if isinstance(number, (bool, int, float)) else None


def _is_determined(node: Node) -> bool:
    """Whether an operation gives the same result each time."""
    if node.short_name in _UNWRITTEN:
        return False
    if not node.may_draw:
        return True
    assert isinstance(node.op, OpOverload)
    names = [argument.name for argument in node.op._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    probability = given.get("dropout_p", given.get("dropout", given.get("p") if "dropout" in node.short_name else None))
    return given.get("train", given.get("training")) is False or probability == 0


def _stays(node: Node, known: set[str], frontier: set[str], values: Mapping[str, Any]) -> bool:
    return node.name not in known or (node.name in frontier and isinstance(values[node.name], torch.Tensor))


def _with_value(node: Node, values: Mapping[str, Any], known: set[str]) -> Node:
    if node.name in known:
        value = values[node.name]
        return dataclasses.replace(node, kind=NodeKind.CONSTANT, op=None, args=(), kwargs={}, value=value, meta=meta_of(value))
    if all(isinstance(values.get(name), torch.Tensor | None) for name in node.operands()):
        return node
    return dataclasses.replace(
        node, args=_literal(node.args, values), kwargs={key: _literal(item, values) for key, item in node.kwargs.items()}
    )


def _literal(argument: Any, values: Mapping[str, Any]) -> Any:
    """Numbers that were computed stand in the arguments themselves."""
    if isinstance(argument, Ref):
        value = values.get(argument.name, argument)
        return argument if isinstance(value, torch.Tensor) else value
    if isinstance(argument, (list, tuple)):
        return type(argument)(_literal(item, values) for item in argument)
    return argument


def _evaluate(node: Node, values: Mapping[str, Any], nodes: Sequence[Node], assumptions: list[str]) -> Any:
    if node.kind is NodeKind.CONSTANT:
        assert node.value is not None
        if not node.value.is_meta:
            return node.value.detach().cpu().clone()
        value, sentence = _guess(node, nodes)
        assumptions.append(sentence)
        return value
    number = _filling(node)
    if number is not None and isinstance(node.meta, TensorMeta):
        return torch.full((), number, dtype=node.meta.dtype).expand(node.meta.shape)
    args, kwargs = _operands(node.args, values), {key: _operands(item, values) for key, item in node.kwargs.items()}
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    assert node.op is not None
    if node.short_name == "as_strided" and 0 in args[0].stride():
        args = (args[0].contiguous(), *args[1:])  # it counts in memory, and a fill takes that of one entry here
    try:
        with torch.no_grad():
            return node.op(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            f"{node.op_name} in {node.provenance} depends on no parameter and was to be computed, but failed: {error}. "
            "Pass real inputs (not on the meta device), on which the model runs."
        ) from error


def _operands(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, (list, tuple)):
        return type(argument)(_operands(item, values) for item in argument)
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _guess(node: Node, nodes: Sequence[Node]) -> tuple[torch.Tensor, str]:
    """A value for a constant without one, and the sentence that says so."""
    assert isinstance(node.meta, TensorMeta)
    shape, dtype = node.meta.shape, node.meta.dtype
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype), f"{node.name} is on the meta device: taken to be True everywhere."
    rows = _rows_indexed_by(node.name, nodes)
    if rows and not dtype.is_floating_point:
        value = (torch.arange(torch.Size(shape).numel()) % rows).reshape(shape).to(dtype)
        return value, f"{node.name} is on the meta device: taken to cycle over the {rows} rows that it selects."
    if node.name.endswith("running_mean"):
        return torch.zeros(shape, dtype=dtype), f"{node.name} is on the meta device: taken to be zeros."
    return torch.ones(shape, dtype=dtype), f"{node.name} is on the meta device: taken to be ones."


def _rows_indexed_by(name: str, nodes: Sequence[Node]) -> int:
    """Number of rows of the smallest table that a value selects from, also through views; 0 if it selects from none."""
    metas = {node.name: node.meta for node in nodes}
    handles, rows = {name}, []
    for node in nodes:
        operands = list(node.operands())
        if len(operands) == 1 and operands[0] in handles:
            handles.add(node.name)
        elif node.short_name in ROW_READS and any(operand in handles for operand in operands[1:]):
            table = metas[operands[0]]
            assert isinstance(table, TensorMeta)
            rows.append(table.shape[_selected_axis(node)])
    return min(rows, default=0)


def _selected_axis(node: Node) -> int:
    """The axis of its table that a selection indexes."""
    if node.short_name in {"index_select", "gather"}:
        return int(node.args[1])
    if node.short_name == "index":
        return next(axis for axis, index in enumerate(node.args[1]) if index is not None)
    return 0
