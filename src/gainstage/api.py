"""The public functions: each is one walk through the stages, and adds to errors what the user asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gainstage.capture import capture
from gainstage.graph import Graph, Node, ParameterInfo
from gainstage.plan import Plan
from gainstage.propagate import (
    Trace,
    build_trace,
    input_value,
    level_profile,
    parameter_moments,
    parameter_value,
    propagate,
)
from gainstage.signal import Value
from gainstage.signal.gain import gain
from gainstage.verify import Check, check_values
from gainstage.verify import verify as compare_with

__all__ = ["gain", "inspect", "verify"]


def inspect(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Trace:
    """Predict every tensor of the model at its present parameters; change nothing.

    Args:
        model: any module with values in its parameters, in the mode (train or eval) that is to be looked at.
        args: positional example inputs; their statistics are measured.
        kwargs: keyword inputs.

    Returns:
        Signals by module call and by node, statistics of the parameters.

    Raises:
        GainstageError: the model cannot be captured or predicted; a parameter or an input is not finite.

    Example::

        trace = gs.inspect(model, (x,))
        trace.modules["layer1.0.conv1"][0].second_moment
    """
    return present_trace(capture(model, args, kwargs), model)


def present_trace(graph: Graph, model: nn.Module) -> Trace:
    """Predict at the present parameters: independent entries with their moments, slice by slice where slices differ."""
    tensors = {name: tensor for name, tensor in model.named_parameters() if name in graph.parameters}
    moments = parameter_moments(tensors)
    index = {name: position for position, name in enumerate(graph.parameters)}

    def present(info: ParameterInfo) -> Value:
        return parameter_value(info, index[info.name], *moments[info.name], level_profile(tensors[info.name]))

    return build_trace(graph, propagate(graph, present, measured_input))


def verify(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, plan: Plan | None = None
) -> Check:
    """Run the model once, compare every module call with its prediction, and name what is wrong; change nothing.

    Args:
        model: with values, in the mode that is to be verified.
        args: positional arguments of forward; real inputs, best of several samples.
        kwargs: keyword arguments of forward.
        plan: what the model was initialised with. Without it the prediction is that of the present parameters.

    Returns:
        Rows of predicted and measured second moments, and findings with the parameter to blame.

    Raises:
        NonFiniteError: NaN or infinity in a parameter or an input.
        PlanMismatchError: the plan was made for another model.
        InputError: a model on the meta device, or a forward pass that fails.

    Example::

        check = gs.verify(model, (x,), plan=plan)
        assert check.ok, check
    """
    given = dict(kwargs or {})
    check_values(model, args, given)
    graph = capture(model, args, given)
    return compare_with(graph, model, args, given, present_trace(graph, model) if plan is None else plan)


def measured_input(node: Node) -> Value:
    """Statistics of an input as it was given."""
    assert node.meta is not None
    assert not isinstance(node.meta, tuple)
    return input_value(node.name, node.value, node.meta.shape)
