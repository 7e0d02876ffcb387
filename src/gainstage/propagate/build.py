"""Collect what was propagated into a Trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gainstage.graph import Graph, NodeKind
from gainstage.propagate.backward import Backward
from gainstage.propagate.interpret import is_sampled
from gainstage.propagate.path import main_path
from gainstage.propagate.trace import CallSignals, ParameterStatistics, Signal, Trace
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
    sampled = tuple(node.name for node in graph.nodes if is_sampled(node))
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


def _moment(gradient: Signal | None) -> float | None:
    return None if gradient is None else gradient.second_moment


def _has_signal(value: Value) -> bool:
    return value.constant is None or value.constant.is_floating_point()
