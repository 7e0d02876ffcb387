"""Collect what was propagated into a Trace."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from gainstage.graph import Graph, Node, NodeKind
from gainstage.propagate.backward import Backward
from gainstage.propagate.interpret import has_rule
from gainstage.propagate.path import main_path
from gainstage.propagate.sample import samplings
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
    sampled = tuple(node.name for node in graph.nodes if _was_sampled(node, values))
    return Trace(
        graph=graph,
        nodes=signals,
        calls=calls,
        parameters=parameters,
        sampled=sampled,
        sampled_backward=() if backward is None else backward.sampled,
        assumptions=graph.assumptions,
        depth=None if backward is None else main_path(graph, signals),
    )


def _was_sampled(node: Node, values: Mapping[str, Any]) -> bool:
    """Whether a node was run on samples: real results say so, realised integers do not."""
    if node.kind is not NodeKind.OP or node.op is operator.getitem:
        return False
    assert node.op is not None
    seen = set().union(*(samplings(values.get(name)) for name in node.operands()))
    return bool(samplings(values.get(node.name)) - seen) or not (has_rule(node) or is_free(node.op))


def _moment(gradient: Signal | None) -> float | None:
    return None if gradient is None else gradient.second_moment


def _has_signal(value: Value) -> bool:
    return value.constant is None or value.constant.is_floating_point()
