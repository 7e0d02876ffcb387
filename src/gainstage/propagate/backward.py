"""The interpreter backwards: gradients' tables from the outputs to every node and parameter."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gainstage.errors import GainstageError
from gainstage.graph import Graph, Node, NodeKind, Ref
from gainstage.propagate.interpret import resolve
from gainstage.propagate.sample_backward import sample_backward
from gainstage.rules import is_free, is_pointwise
from gainstage.rules.backward import BackwardCall, backward_rules, times_slope
from gainstage.signal import Value, accumulated, gaussian


def unit_gradient(output: Value) -> Value:
    """Independent entries of second moment 1."""
    table = np.zeros_like(output.table)
    table[(1,) * table.ndim] = 1.0
    return gaussian(output.dims, 0.0, table)


@dataclass(frozen=True, slots=True)
class Backward:
    """What a backward pass found: the gradient of every node that has one, and the nodes whose backward pass was sampled."""

    gradients: Mapping[str, Value]
    sampled: tuple[str, ...]


def propagate_backward(graph: Graph, values: Mapping[str, Any]) -> Backward:
    """Gradients from the outputs to everything that they depend on.

    Args:
        graph: a captured model.
        values: result of every node, from the forward pass.

    Returns:
        Gradients of the sum of all entries of the outputs, each times a weight of its own: independent, mean 0 and second moment
        1. Of a loss, a single number, this is its gradient up to a sign.
    """
    gradients: dict[str, Any] = {}
    needed = _needed(graph)
    for name in graph.outputs:
        if isinstance(values[name], Value) and name in needed:
            _accumulate(gradients, name, unit_gradient(values[name]))
    sampled = _walk_back(graph.nodes, gradients, needed, values)
    return Backward({name: g for name, g in gradients.items() if isinstance(g, Value)}, sampled)


def propagate_back_along(segment: Sequence[Node], values: Mapping[str, Any]) -> Mapping[str, Value]:
    """Gradients along a few nodes only: of the last one independent entries of second moment 1, of the others what comes of it.

    Args:
        segment: nodes in execution order, the first of them as far as gradients go.
        values: result of every node that these read.
    """
    gradients: dict[str, Any] = {segment[-1].name: unit_gradient(values[segment[-1].name])}
    _walk_back(segment[1:], gradients, {node.name for node in segment}, values)
    return {name: g for name, g in gradients.items() if isinstance(g, Value)}


def _walk_back(nodes: Sequence[Node], gradients: dict[str, Any], needed: set[str], values: Mapping[str, Any]) -> tuple[str, ...]:
    """Go through nodes in reverse and add to the gradients of what they read; returns the nodes that were sampled."""
    sampled: list[str] = []
    for node in reversed(nodes):
        g = gradients.get(node.name)
        if g is None or node.kind is not NodeKind.OP or node.name not in needed:
            continue
        if node.op is operator.getitem:
            _accumulate_part(gradients, node.args[0].name, node.args[1], len(values[node.args[0].name]), g)
            continue
        found, was_sampled = _through(node, g, values, needed)
        if was_sampled:
            sampled.append(node.name)
        for argument, gradient in zip(node.args, found, strict=False):
            _deliver(gradients, argument, gradient, needed)
    return tuple(reversed(sampled))


def _needed(graph: Graph) -> set[str]:
    """Nodes that depend on a parameter or a floating-point input."""
    needed: set[str] = set()
    for node in graph.nodes:
        is_source = node.kind in (NodeKind.PARAMETER, NodeKind.INPUT)
        if is_source or (node.kind is NodeKind.OP and any(name in needed for name in node.operands())):
            needed.add(node.name)
    return needed


def _through(node: Node, g: Any, values: Mapping[str, Any], needed: set[str]) -> tuple[tuple[Any, ...], bool]:
    assert node.op is not None
    if is_free(node.op):
        return (), False
    args = [resolve(argument, values) for argument in node.args]
    kwargs = {name: resolve(argument, values) for name, argument in node.kwargs.items()}
    wanted = frozenset(place for place, argument in enumerate(node.args) if _is_needed(argument, needed))
    call = BackwardCall(node.op, values[node.name], wanted)
    rule = backward_rules().get(node.op, times_slope if is_pointwise(node.op) else None)
    if rule is None:
        return sample_backward(node, g, args, kwargs), True
    try:
        return rule(call, g, *args, **kwargs), False
    except GainstageError:
        raise
    except Exception:  # noqa: BLE001  (the rule does not cover this call, whether it knew so or not)
        return sample_backward(node, g, args, kwargs), True


def _is_needed(argument: Any, needed: set[str]) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(_is_needed(item, needed) for item in argument)
    return isinstance(argument, Ref) and argument.name in needed


def _deliver(gradients: dict[str, Any], argument: Any, gradient: Any, needed: set[str]) -> None:
    if gradient is None:
        return
    if isinstance(argument, Ref):
        if argument.name in needed:
            _accumulate(gradients, argument.name, gradient)
    elif isinstance(argument, (list, tuple)):
        for item, part in zip(argument, gradient, strict=True):
            _deliver(gradients, item, part, needed)


def _accumulate(gradients: dict[str, Any], name: str, gradient: Value) -> None:
    before = gradients.get(name)
    gradients[name] = gradient if before is None else accumulated(before, gradient)


def _accumulate_part(gradients: dict[str, Any], name: str, index: int, count: int, gradient: Value) -> None:
    parts: list[Value | None] = gradients.setdefault(name, [None] * count)
    before = parts[index]
    parts[index] = gradient if before is None else accumulated(before, gradient)
