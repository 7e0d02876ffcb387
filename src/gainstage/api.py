"""The public functions: each is one walk through the stages, and adds to errors what the user asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gainstage.capture import capture
from gainstage.graph import Graph, Node, ParameterInfo
from gainstage.propagate import Trace, build_trace, input_value, parameter_moments, parameter_value, propagate
from gainstage.signal import Value


@dataclass(frozen=True, slots=True)
class Sources:
    """Statistics of what enters the graph: parameters as they are at present, and inputs."""

    graph: Graph
    moments: Mapping[str, tuple[float, float]]
    inputs: Mapping[str, torch.Tensor | None]

    def parameter(self, info: ParameterInfo) -> Value:
        """Present parameter: independent entries with the measured mean and variance."""
        mean, variance = self.moments[info.name]
        return parameter_value(info, list(self.graph.parameters).index(info.name), mean, variance)

    def source(self, node: Node) -> Value:
        """Input: measured, or standard normal."""
        assert node.meta is not None
        assert not isinstance(node.meta, tuple)
        return input_value(node.name, self.inputs.get(node.name), node.meta.shape)


def inspect(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Trace:
    """Predict every tensor of the model at its present parameters; change nothing."""
    graph = capture(model, args, kwargs)
    named = dict(model.named_parameters())
    sources = Sources(graph, parameter_moments({n: named[n] for n in graph.parameters}), {})
    return build_trace(graph, propagate(graph, sources.parameter, sources.source))
