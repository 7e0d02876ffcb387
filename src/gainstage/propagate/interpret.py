"""The interpreter: one forward pass over the graph with tables in the place of tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from gainstage.errors import GainstageError, UnsupportedOpError
from gainstage.graph import Graph, Node, NodeKind, ParameterInfo, Ref, TensorMeta
from gainstage.propagate.kinship import Operation, beginning, with_origin
from gainstage.propagate.looked_up import carried, of_known_rows
from gainstage.propagate.sample import Reason, as_numbers, constant_value, fault_of, is_known, run_known, sample_node
from gainstage.rules import Call, is_free, rule_of
from gainstage.signal import Value

# Operations that may take integers among numbers, which then count as numbers; elsewhere integers are indices and conditions.
_ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div", "maximum", "minimum", "pow", "cat", "stack", "lerp", "addcmul"})

Result = Any  # Value, tuple of Values, or None for an op without statistics
ParameterValues = Callable[[ParameterInfo], Value]
InputValues = Callable[[Node], Value]


def evaluate(node: Node, values: Mapping[str, Result], parameter: ParameterValues, source: InputValues, graph: Graph) -> Result:
    """Result of one node from the results of those it reads."""
    if node.kind is NodeKind.CONSTANT:
        assert node.value is not None
        found = constant_value(node.value)
        return beginning(found) if graph.reused else found
    if node.kind is NodeKind.PARAMETER:
        assert node.parameter is not None
        return parameter(graph.parameters[node.parameter])
    if node.kind is NodeKind.INPUT:
        fed = source(node)
        return beginning(fed) if graph.reused else fed
    if node.op is operator.getitem:
        return resolve(node.args[0], values)[node.args[1]]
    assert node.op is not None
    if is_free(node.op):
        return None
    args = [resolve(argument, values) for argument in node.args]
    kwargs = {name: resolve(argument, values) for name, argument in node.kwargs.items()}
    call = Call(node.op, _shapes(node))
    try:
        result = of_known_rows(node, values, graph, partial(_on_other, values))
        if result is None:
            result = run_known(node, args, kwargs) if is_known(node, args, kwargs) else _unknown(node, call, args, kwargs)
        result = carried(node, args, result)
        if graph.reused:
            result = with_origin(node, graph, Operation(partial(_by_rule, node, call), args, kwargs), result, values)
    except GainstageError:
        raise
    except Exception as error:
        raise UnsupportedOpError(
            f"{node.op_name} cannot be predicted, in {node.provenance}: {type(error).__name__}: {error}"
        ) from error
    _check(node, call, result)
    return _in_type(result, node.meta)


def _on_other(values: Mapping[str, Result], node: Node, first: Value) -> Result:
    """An operation on another first operand."""
    assert node.op is not None
    args = [first, *(resolve(argument, values) for argument in node.args[1:])]
    return _by_rule(node, Call(node.op, _shapes(node)), args, {key: resolve(item, values) for key, item in node.kwargs.items()})


def _in_type(result: Result, meta: Any) -> Result:
    """Known integers that the model has as floating-point numbers here (``mask.type_as(x)``) as these."""
    is_number = isinstance(meta, TensorMeta) and meta.dtype.is_floating_point
    return as_numbers(result) if is_number else result


def _unknown(node: Node, call: Call, args: list[Any], kwargs: dict[str, Any]) -> Result:
    """Result of an op on what is not known: by its rule, or by sampling where there is none or it does not cover the call."""
    if isinstance(node.meta, TensorMeta) and 0 in node.meta.shape:
        return constant_value(torch.zeros(node.meta.shape, dtype=node.meta.dtype))  # nothing was picked
    if rule_of(node.op) is None:
        return sample_node(node, call, args, kwargs)
    try:
        return _by_rule(node, call, args, kwargs)
    except GainstageError:
        raise
    except NotImplementedError as error:  # the rule does not cover this call, and knows it
        return sample_node(node, call, args, kwargs, Reason(str(error)))
    except Exception as error:  # noqa: BLE001  (a mistake of the rule, which the result names)
        return sample_node(node, call, args, kwargs, fault_of(rule_of(node.op), error))


def _by_rule(node: Node, call: Call, args: list[Any], kwargs: dict[str, Any]) -> Result:
    found = rule_of(node.op)
    assert found is not None
    name = node.op_name.split(".")[1] if node.op_name.startswith("aten.") else ""
    if name in _ARITHMETIC:
        args = [as_numbers(argument) for argument in args]
    return found(call, *args, **kwargs)


def has_rule(node: Node) -> bool:
    """Tell whether a rule gives a node's statistics, as long as it covers the call."""
    return rule_of(node.op) is not None or node.op is operator.getitem


def _check(node: Node, call: Call, result: Result) -> None:
    for value, shape in zip(result if isinstance(result, tuple) else (result,), call.shapes, strict=False):
        if isinstance(value, Value) and shape is not None and value.shape != shape:
            raise UnsupportedOpError(
                f"the rule of {node.op_name} returned shape {value.shape} where the model has {shape}, in {node.provenance}"
            )


def _shapes(node: Node) -> tuple[tuple[int, ...] | None, ...]:
    metas = node.meta if isinstance(node.meta, tuple) else (node.meta,)
    return tuple(meta.shape if isinstance(meta, TensorMeta) else None for meta in metas)


def resolve(argument: Any, values: Mapping[str, Result]) -> Any:
    """An argument of a node with results in the place of references."""
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, (list, tuple)):
        return [resolve(item, values) for item in argument]
    return argument


def propagate(graph: Graph, parameter: ParameterValues, source: InputValues) -> dict[str, Result]:
    """Result of every node, in order."""
    values: dict[str, Result] = {}
    for node in graph.nodes:
        values[node.name] = evaluate(node, values, parameter, source, graph)
    return values
