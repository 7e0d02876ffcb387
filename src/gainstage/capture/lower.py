"""From torch.export's graph to our nodes, one for one: regions entered, assertions left out, writes still in place."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.export.graph_signature import InputKind, OutputKind

from gainstage.capture.export import CALL_MARKS, Exported
from gainstage.capture.lowered import ASSERTIONS, Lowered, meta_of
from gainstage.capture.provenance import module_stack, provenance_of
from gainstage.errors import CaptureError
from gainstage.graph import Node, NodeKind, Ref


def lower(exported: Exported, canonical_names: Mapping[str, str], canonical_paths: Mapping[str, str]) -> Lowered:
    """Turn an exported program into nodes.

    Args:
        exported: the program, and the tensors that were fed to it.
        canonical_names: parameter name -> canonical name; tied parameters become one node.
        canonical_paths: module path -> first path of that module.

    Returns:
        The nodes, with inputs, parameters and constants in front.

    Raises:
        CaptureError: the graph branches on values (torch.cond and kin), or calls what is no operation.
    """
    lowered = Lowered(canonical_names, canonical_paths)
    values = _placeholders(lowered, exported)
    results = _lower_block(lowered, exported.program.graph_module, values, prefix="")
    kinds = [spec.kind for spec in exported.program.graph_signature.output_specs]
    lowered.outputs = [
        result.name
        for result, kind in zip(results, kinds, strict=True)
        if kind is OutputKind.USER_OUTPUT and isinstance(result, Ref)
    ]
    return lowered


def _placeholders(lowered: Lowered, exported: Exported) -> dict[fx.Node, Any]:
    program = exported.program
    inputs = iter(exported.inputs)
    values: dict[fx.Node, Any] = {}
    origins = [node for node in program.graph.nodes if node.op == "placeholder"]
    for origin, spec in zip(origins, program.graph_signature.input_specs, strict=True):
        target = spec.target or ""
        if spec.kind is InputKind.PARAMETER:
            values[origin] = lowered.add_parameter(origin.name, lowered.canonical_names[target], origin.meta["val"])
            _mark(lowered, values[origin], origin)
            continue
        if spec.kind is InputKind.USER_INPUT:
            value = next(inputs)
        elif spec.kind is InputKind.BUFFER:
            value = program.state_dict[target] if spec.persistent else program.constants[target]
        else:
            value = program.constants.get(target)
        if isinstance(value, torch.Tensor) and value.is_meta:
            value = exported.buffers.get(target, value)
        if not isinstance(value, torch.Tensor):
            values[origin] = getattr(spec.arg, "value", None)
            continue
        values[origin] = lowered.add_source(
            origin.name,
            value,
            target.rpartition(".")[0],
            is_input=spec.kind is InputKind.USER_INPUT,
            like=origin.meta.get("val"),
        )
        _mark(lowered, values[origin], origin)
    return values


def _mark(lowered: Lowered, value: Any, origin: fx.Node) -> None:
    if isinstance(value, Ref):
        lowered.mark(value.name, origin.meta.get(CALL_MARKS, ()))


def _add(lowered: Lowered, node: Node, origin: fx.Node) -> Ref:
    reference = lowered.add(node, origin.meta.get("val"), module_stack(origin, lowered.canonical_paths))
    _mark(lowered, reference, origin)
    return reference


def _lower_block(lowered: Lowered, block: fx.GraphModule, values: dict[fx.Node, Any], prefix: str) -> Sequence[Any]:
    """Append the nodes of one (sub)graph; returns its outputs."""
    for origin in block.graph.nodes:
        if origin.op == "placeholder":
            _mark(lowered, values[origin], origin)
        elif origin.op == "get_attr":
            values[origin] = _attribute(lowered, block, origin, prefix)
        elif origin.op == "output":
            results: Sequence[Any] = resolve(origin.args[0], values)
            return results
        elif origin.op == "call_function":
            values[origin] = _call(lowered, origin, values, prefix)
        else:
            raise CaptureError(f"The exported graph holds a node of kind {origin.op} ({origin.name}), which is no operation.")
    return []


def _attribute(lowered: Lowered, block: fx.GraphModule, origin: fx.Node, prefix: str) -> Any:
    value: Any = operator.attrgetter(str(origin.target))(block)
    if not isinstance(value, torch.Tensor):
        return value
    node = Node(name=prefix + origin.name, kind=NodeKind.CONSTANT, meta=meta_of(value), value=value.detach())
    return _add(lowered, node, origin)


def _call(lowered: Lowered, origin: fx.Node, values: dict[fx.Node, Any], prefix: str) -> Any:
    op: Any = origin.target
    if isinstance(op, HigherOrderOperator):
        return _enter_region(lowered, origin, values, prefix)
    if isinstance(op, OpOverload) and op._schema.name.partition("::")[2] in ASSERTIONS:
        return None
    if getattr(op, "__module__", "").startswith("torch._functorch"):
        raise CaptureError("a transformation of torch.func stays in the exported graph, around tensors of no definite shape")
    args, kwargs = resolve(origin.args, values), resolve(origin.kwargs, values)
    if op is operator.getitem and isinstance(args[0], (tuple, list)):
        result = args[0][args[1]]  # an output of a region that was entered
        _mark(lowered, result, origin)
        return result
    node = Node(
        name=prefix + origin.name,
        kind=NodeKind.OP,
        op=op,
        args=args,
        kwargs=kwargs,
        meta=meta_of(origin.meta.get("val")),
        provenance=provenance_of(origin, lowered.canonical_paths),
    )
    return _add(lowered, node, origin)


def _enter_region(lowered: Lowered, origin: fx.Node, values: dict[fx.Node, Any], prefix: str) -> tuple[Any, ...]:
    """Inline the one subgraph of a region (no_grad, autocast, checkpoint) whose operands follow it."""
    arguments: list[Any] = [values[item] if isinstance(item, fx.Node) else item for item in origin.args]
    blocks = [position for position, item in enumerate(arguments) if isinstance(item, fx.GraphModule)]
    if len(blocks) != 1:
        place = provenance_of(origin, lowered.canonical_paths)
        raise CaptureError(
            f"{origin.target} in {place} is not a fixed sequence of operations (it branches, loops or writes in place while "
            "the model runs), which a graph of signals cannot follow. Fix the choice with a Python argument before capturing."
        )
    block = arguments[blocks[0]]
    operands = arguments[blocks[0] + 1 :]
    inner = [node for node in block.graph.nodes if node.op == "placeholder"]
    results = _lower_block(lowered, block, dict(zip(inner, operands, strict=True)), f"{prefix}{origin.name}_")
    if origin.target is torch.ops.higher_order.wrap_with_set_grad_enabled and origin.args[0] is False:
        return tuple(_detached(lowered, item, origin, f"{prefix}{origin.name}_detach_{i}") for i, item in enumerate(results))
    return tuple(results)


def _detached(lowered: Lowered, result: Any, origin: fx.Node, name: str) -> Any:
    """A result of a no_grad region: as it is, but gradients end here."""
    if not isinstance(result, Ref):
        return result
    inner = next(node for node in reversed(lowered.nodes) if node.name == result.name)
    node = dataclasses.replace(
        inner,
        name=name,
        kind=NodeKind.OP,
        op=torch.ops.aten.detach.default,
        args=(result,),
        kwargs={},
        parameter=None,
        value=None,
    )
    _add(lowered, node, origin)
    lowered.stacks[name] = lowered.stacks[inner.name]
    if inner.name in lowered.storages:
        lowered.storages[name] = lowered.storages[inner.name]
    return Ref(name)


def resolve(argument: Any, values: Mapping[fx.Node, Any]) -> Any:
    """An argument of an exported node in our terms: plain containers, Ref for tensors of the graph."""
    if isinstance(argument, fx.Node):
        return values[argument]
    if isinstance(argument, tuple):
        return tuple(resolve(item, values) for item in argument)
    if isinstance(argument, list):
        return [resolve(item, values) for item in argument]
    if isinstance(argument, dict):
        return {key: resolve(item, values) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(resolve(argument.start, values), resolve(argument.stop, values), resolve(argument.step, values))
    return argument
