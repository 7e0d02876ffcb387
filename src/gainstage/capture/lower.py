"""From torch.export's graph to our nodes, one for one: regions entered, assertions left out, writes still in place."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.export.graph_signature import InputKind, OutputKind

from gainstage.capture.provenance import module_stack, provenance_of
from gainstage.capture.trace import CALL_MARKS, CallMark, Exported
from gainstage.errors import CaptureError
from gainstage.graph import Node, NodeKind, Provenance, Ref, TensorMeta

UNKNOWN_SIZE = -1  # in a shape: known only when the model runs

_ASSERTIONS = frozenset(
    {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"}
)


@dataclass(slots=True)
class Lowered:
    """Nodes in execution order, still with writes in place, and what else is known of them.

    ``storages`` names the memory that a value lives in (of all its tensors, if they are several): two values with the
    same entry are views of each other.
    """

    canonical_names: Mapping[str, str]  # parameter name -> canonical name
    canonical_paths: Mapping[str, str]  # module path -> first path of that module
    nodes: list[Node] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    storages: dict[str, int] = field(default_factory=dict)
    marks: dict[str, list[CallMark]] = field(default_factory=dict)
    stacks: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)  # node -> module calls it was made in
    parameters: dict[str, str] = field(default_factory=dict)  # canonical name -> node name

    def add(self, node: Node, origin: fx.Node) -> Ref:
        """Append a node, remember what its origin says of it, and return a reference to it."""
        self.nodes.append(node)
        storage = _storage(origin.meta.get("val"))
        if storage is not None:
            self.storages[node.name] = storage
        self.stacks[node.name] = module_stack(origin, self.canonical_paths)
        self.mark(node.name, origin)
        return Ref(node.name)

    def mark(self, name: str, origin: fx.Node) -> None:
        """Remember which module calls returned a value."""
        marks = origin.meta.get(CALL_MARKS, ())
        known = self.marks.setdefault(name, []) if marks else []
        known.extend(mark for mark in marks if mark not in known)


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
            values[origin] = _parameter(lowered, origin, lowered.canonical_names[target])
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
        is_input = spec.kind is InputKind.USER_INPUT and value.is_floating_point() and not _is_mask(value)
        node = Node(
            name=origin.name,
            kind=NodeKind.INPUT if is_input else NodeKind.CONSTANT,
            meta=meta_of(value),
            value=value.detach(),
            provenance=Provenance(target.rpartition(".")[0]),
        )
        values[origin] = lowered.add(node, origin)
    return values


def _parameter(lowered: Lowered, origin: fx.Node, canonical: str) -> Ref:
    if canonical in lowered.parameters:
        lowered.mark(lowered.parameters[canonical], origin)
        return Ref(lowered.parameters[canonical])
    lowered.parameters[canonical] = origin.name
    provenance = Provenance(canonical.rpartition(".")[0])
    meta = meta_of(origin.meta["val"])
    return lowered.add(
        Node(name=origin.name, kind=NodeKind.PARAMETER, meta=meta, parameter=canonical, provenance=provenance), origin
    )


def _lower_block(lowered: Lowered, block: fx.GraphModule, values: dict[fx.Node, Any], prefix: str) -> Sequence[Any]:
    """Append the nodes of one (sub)graph; returns its outputs."""
    for origin in block.graph.nodes:
        if origin.op == "placeholder":
            value = values[origin]
            if isinstance(value, Ref):
                lowered.mark(value.name, origin)
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


def _is_mask(value: torch.Tensor) -> bool:
    """Whether a floating-point input is an additive attention mask: no entry above zero, and some near minus infinity."""
    if value.is_meta or value.numel() == 0:
        return False
    lowest, highest = value.aminmax()
    return bool(lowest <= torch.finfo(value.dtype).min / 2) and bool(highest <= 0)


def _attribute(lowered: Lowered, block: fx.GraphModule, origin: fx.Node, prefix: str) -> Any:
    value: Any = operator.attrgetter(str(origin.target))(block)
    if not isinstance(value, torch.Tensor):
        return value
    node = Node(name=prefix + origin.name, kind=NodeKind.CONSTANT, meta=meta_of(value), value=value.detach())
    return lowered.add(node, origin)


def _call(lowered: Lowered, origin: fx.Node, values: dict[fx.Node, Any], prefix: str) -> Any:
    op: Any = origin.target
    if isinstance(op, HigherOrderOperator):
        return _enter_region(lowered, origin, values, prefix)
    if isinstance(op, OpOverload) and op._schema.name.partition("::")[2] in _ASSERTIONS:
        return None
    args, kwargs = resolve(origin.args, values), resolve(origin.kwargs, values)
    if op is operator.getitem and isinstance(args[0], (tuple, list)):
        result = args[0][args[1]]  # an output of a region that was entered
        if isinstance(result, Ref):
            lowered.mark(result.name, origin)
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
    return lowered.add(node, origin)


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
    lowered.add(node, origin)
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


def meta_of(value: Any) -> TensorMeta | tuple[TensorMeta | None, ...] | None:
    """Shape and element type of what a node returns: a tensor, several, or something else (None)."""
    if isinstance(value, torch.Tensor):
        sizes: tuple[Any, ...] = tuple(value.shape)  # a symbol where the size is not known
        return TensorMeta(tuple(size if isinstance(size, int) else UNKNOWN_SIZE for size in sizes), value.dtype)
    if isinstance(value, (tuple, list)):
        metas = [meta_of(item) for item in value]
        return tuple(item if isinstance(item, TensorMeta) else None for item in metas)
    return None


def _storage(value: Any) -> int | None:
    tensors = [value] if isinstance(value, torch.Tensor) else list(value) if isinstance(value, (tuple, list)) else []
    keys = {tensor.untyped_storage()._cdata for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return keys.pop() if len(keys) == 1 else None
