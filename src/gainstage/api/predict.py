"""Looking at a model as it is: its signals, its gradients, and whose gradient it follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gainstage.api.present import check_call, on_host, present_values
from gainstage.apply.buffers import known_buffers
from gainstage.capture import capture
from gainstage.graph import real_parameters, with_copies
from gainstage.propagate import (
    Trace,
    build_trace,
    propagate_backward,
)
from gainstage.roles import infer_roles
from gainstage.solve import attention_signals
from gainstage.verify import (
    TaskGradients,
    check_values,
    check_weights,
    judge_tasks,
    measure_tasks,
)


def inspect(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    gradients: bool = True,
) -> Trace:
    """Predict every tensor and every gradient of the model at its present parameters; change nothing.

    Args:
        model: any module with values in its parameters, in the mode (train or eval) that is to be looked at.
        args: positional example inputs; their statistics are measured.
        kwargs: keyword inputs.
        loss: the model's output -> a scalar, such as ``lambda y: F.cross_entropy(y, labels)``. Gradients are those of the loss;
            without it those of the sum of all outputs, each entry with an independent weight of mean 0 and second moment 1.
        gradients: whether to go backwards as well; without it all gradients, and ``trace.depth``, are None, in a third to a
            half of the time.

    Returns:
        Signals by module call and by node, statistics of the parameters.

    Raises:
        GainstageError: the model cannot be captured or predicted; a parameter or an input is not finite.

    Example::

        trace = gs.inspect(model, (x,))
        trace.modules["layer1.0.conv1"][0].second_moment
        trace.parameters["layer1.0.conv1.weight"].gradient_second_moment
    """
    check_call(model, args, kwargs)
    tensors = real_parameters(model)
    graph = capture(model, args, kwargs, loss=loss, buffers=known_buffers(model))
    with on_host():
        graph = with_copies(graph, tensors)
        roles = infer_roles(graph)
        values = present_values(graph, tensors, roles)
        trace = build_trace(graph, values, propagate_backward(graph, values) if gradients else None)
        return replace(trace, attention=attention_signals(graph, roles, values))


def task_gradients(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    losses: Mapping[str, Callable[[Any], torch.Tensor]],
    weights: Mapping[str, float] | None = None,
) -> TaskGradients:
    """How strongly each of several losses pulls at the parameters they share: predicted, and measured; change nothing.

    A head's initialization follows from its fan-in and from what the trunk gives it, whatever its loss will be multiplied with.
    What the weights of the losses decide is whose gradient the trunk follows.

    Args:
        model: with values, in its mode.
        args: positional arguments of forward.
        kwargs: keyword arguments of forward.
        losses: task -> a function of the model's output that returns the task's loss, without its weight.
        weights: task -> what its loss is multiplied with; 1 for those that are not there.

    Returns:
        A row for each task: the norm of its gradient over all shared parameters, predicted and measured, its share, and the
        weight that would make the shares equal; a finding where one task has more than nine tenths.

    Raises:
        InputError: fewer than two tasks, nothing that they share, a loss that is no number, weights of other tasks.
        NonFiniteError: NaN or infinity in a parameter, an input, a loss or a gradient.

    Example::

        losses = {"depth": lambda y: F.l1_loss(y[0], depth), "label": lambda y: F.cross_entropy(y[1], label)}
        print(gs.task_gradients(model, (x,), losses=losses, weights={"depth": 0.1}))
    """
    given = dict(kwargs or {})
    chosen = check_weights(losses, weights)
    check_values(model, args, given)
    values, measured = measure_tasks(model, args, given, losses)
    predicted: dict[str, dict[str, float]] = {}
    for task, loss in losses.items():
        trace = inspect(model, args, given, loss=loss)
        found = {name: statistics.gradient_second_moment for name, statistics in trace.parameters.items()}
        predicted[task] = {name: moment for name, moment in found.items() if moment is not None}
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return judge_tasks(chosen, trained, values, measured, predicted)
