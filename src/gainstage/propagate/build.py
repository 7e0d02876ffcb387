"""Collect what was propagated into a Trace."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from gainstage.graph import Graph, Node, NodeKind
from gainstage.propagate.backward import Backward
from gainstage.propagate.interpret import has_rule
from gainstage.propagate.path import main_path
from gainstage.propagate.sample import Reason, Sampled, samplings
from gainstage.propagate.trace import CallSignals, ParameterStatistics, Signal, Trace
from gainstage.rules import is_free
from gainstage.signal import Value


def build_trace(graph: Graph, values: Mapping[str, Any], backward: Backward | None = None) -> Trace:
    """Signals of the nodes and module calls of a graph, with their gradients where there was a backward pass."""
    gradients = {} if backward is None else {name: Signal(value) for name, value in backward.gradients.items()}
    signals = {
        name: Signal(value, gradients.get(name))
        for name, value in values.items()
        if isinstance(value, Value) and _has_signal(value)
    }
    calls = tuple(
        CallSignals(call.path, call.call, call.module_type, tuple(signals[name] for name in call.outputs if name in signals))
        for call in graph.calls
    )
    parameters = {
        node.parameter: ParameterStatistics(values[node.name].second_moment, _moment(gradients.get(node.name)))
        for node in graph.nodes
        if node.kind is NodeKind.PARAMETER and node.parameter is not None and isinstance(values.get(node.name), Value)
    }
    return Trace(
        graph=graph,
        nodes=signals,
        calls=calls,
        parameters=parameters,
        sampled=sampled_nodes(graph, values),
        sampled_backward=() if backward is None else backward.sampled,
        assumptions=(*graph.assumptions, *given_up(graph, values), *_sentences(() if backward is None else backward.given_up)),
        depth=None if backward is None else main_path(graph, signals),
    )


def sampled_nodes(graph: Graph, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Nodes that were run on samples, for want of a rule or of one that covers the call."""
    return tuple(node.name for node in graph.nodes if _new_samplings(node, values) or _has_no_rule(node))


def given_up(graph: Graph, values: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence for each rule, and each reason, that left nodes to samples."""
    return _sentences(
        (node, origin.reason) for node in graph.nodes for origin in _new_samplings(node, values) if origin.reason is not None
    )


def _sentences(given_up: Iterable[tuple[Node, Reason]]) -> tuple[str, ...]:
    """One for each op and reason, with the first of the nodes."""
    places: dict[tuple[str, Reason], dict[str, Node]] = {}
    for node, reason in given_up:
        places.setdefault((node.op_name, reason), {})[node.name] = node
    return tuple(reason.sentence(op, next(iter(nodes.values())), len(nodes) - 1) for (op, reason), nodes in places.items())


def _new_samplings(node: Node, values: Mapping[str, Any]) -> set[Sampled]:
    """Samplings that a node did itself."""
    if node.kind is not NodeKind.OP or node.op is operator.getitem:
        return set()
    seen = set().union(*(samplings(values.get(name)) for name in node.operands()))
    return samplings(values.get(node.name)) - seen


def _has_no_rule(node: Node) -> bool:
    return node.kind is NodeKind.OP and node.op is not None and not (has_rule(node) or is_free(node.op))


def _moment(gradient: Signal | None) -> float | None:
    return None if gradient is None else gradient.second_moment


def _has_signal(value: Value) -> bool:
    return value.constant is None or value.constant.is_floating_point()
