"""How each operation of a model is predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gainstage.api.present import check_call, measured_input, on_host
from gainstage.apply.buffers import known_buffers
from gainstage.capture import capture
from gainstage.errors import GainstageError
from gainstage.graph import Graph, ParameterInfo, parameters_of_regions
from gainstage.propagate import constant_value, given_up, parameter_value, propagate, sampled_nodes
from gainstage.signal import Value


@dataclass(frozen=True, slots=True)
class Operations:
    """A captured model, the nodes that are run on samples, and what there is to say of them and of the capture."""

    graph: Graph
    sampled: tuple[str, ...]
    remarks: tuple[str, ...]


def operations(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Operations:
    """Follow a model once, with parameters that stand for any draw: which rules hold hardly depends on their values.

    Args:
        model: any module, also without memory behind its parameters.
        args: positional example inputs.
        kwargs: keyword inputs.

    Returns:
        The graph, and what is sampled. Where a model cannot be predicted, the reason is among the remarks.

    Raises:
        GainstageError: the model cannot be captured.
    """
    check_call(model, args, kwargs)
    graph = capture(model, args, kwargs, buffers=known_buffers(model))
    index = {name: position for position, name in enumerate(graph.parameters)}
    of_regions = parameters_of_regions(graph)

    def parameter(info: ParameterInfo) -> Value:
        variance = 1.0 / max(math.prod(info.shape[1:]), 1)
        if info.name not in of_regions:
            return parameter_value(info, index[info.name], 0.0, variance)
        drawn = torch.randn(info.shape, generator=torch.Generator().manual_seed(index[info.name]))
        return replace(constant_value(drawn * variance**0.5), lineage=1 << index[info.name])

    try:
        with on_host():
            values = propagate(graph, parameter, measured_input)
    except GainstageError as error:
        return Operations(graph, (), (*graph.assumptions, str(error)))
    return Operations(graph, sampled_nodes(graph, values), (*graph.assumptions, *given_up(graph, values)))
