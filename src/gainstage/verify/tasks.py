"""How strongly each of several losses pulls at the parameters that they share: measured on the real model, and predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gainstage.errors import InputError, NonFiniteError
from gainstage.findings import Finding, FindingKind
from gainstage.verify.untouched import untouched

DROWNS = 0.9  # of the squares of all tasks' gradients

Loss = Callable[[Any], torch.Tensor]
Squares = Mapping[str, float]  # parameter -> mean square of its gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One task: norms of its gradient, over all shared parameters and times its weight.

    ``share``: of the measured squares of all tasks. ``balanced``: the weight under which every task would have the same.
    """

    task: str
    weight: float
    loss: float
    predicted: float
    measured: float
    share: float
    balanced: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskGradients:
    """What the losses of several tasks do to the parameters that more than one of them reaches.

    Args:
        rows: one for each task.
        shared: names of these parameters.
        predicted: task -> parameter -> second moment of the gradient's entries, for weight 1.
        measured: the same, of this draw of the parameters on these data.
        findings: a task that drowns the others.
    """

    rows: tuple[TaskRow, ...]
    shared: tuple[str, ...]
    predicted: Mapping[str, Squares]
    measured: Mapping[str, Squares]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "shared": list(self.shared),
            "predicted": {task: dict(squares) for task, squares in self.predicted.items()},
            "measured": {task: dict(squares) for task, squares in self.measured.items()},
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def __repr__(self) -> str:
        """A line for each task, then the findings."""
        lines = [f"TaskGradients: {len(self.rows)} tasks share {len(self.shared)} parameters"]
        lines += [
            f"  {row.task}: weight {row.weight:g}, loss {row.loss:.4g}, gradient {row.measured:.3g} "
            f"(predicted {row.predicted:.3g}), {row.share:.0%} of the squares; equal shares at weight {row.balanced:.3g}"
            for row in self.rows
        ]
        return "\n".join([*lines, *(f"  {finding}" for finding in self.findings)])


def check_weights(losses: Mapping[str, Loss], weights: Mapping[str, float] | None) -> dict[str, float]:
    """A weight for every task.

    Raises:
        InputError: fewer than two tasks, a weight of a task that is not there, or one that is no positive number.
    """
    if len(losses) < 2:
        raise InputError(f"losses: {len(losses)} tasks share nothing; give a loss for each of two tasks at least")
    for task, weight in (weights or {}).items():
        if task not in losses:
            raise InputError(f"weights: there is no task {task!r}; known are {', '.join(losses)}")
        if not 0.0 < weight < math.inf:
            raise InputError(f"weights: that of {task!r} is {weight}; a weight is a positive number")
    return {task: float((weights or {}).get(task, 1.0)) for task in losses}


def measure_tasks(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], losses: Mapping[str, Loss]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """One real forward pass, and a backward pass for each loss; the model stays as it is.

    Returns:
        task -> loss; task -> parameter -> mean square of the gradient.

    Raises:
        InputError: a pass fails, or a loss is no number.
        NonFiniteError: a loss or a gradient is NaN or infinite.
    """
    copies = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, dict(kwargs)))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    values: dict[str, float] = {}
    squares: dict[str, dict[str, float]] = {}
    with untouched(model), torch.enable_grad():
        try:
            output = model(*copies[0], **copies[1])
        except Exception as error:
            raise InputError(f"The forward pass failed: {type(error).__name__}: {error}") from error
        for task, loss in losses.items():
            value = _value_of(task, loss, output)
            parameters = [model.get_parameter(name) for name in names]
            gradients: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
                value, parameters, retain_graph=True, allow_unused=True
            )
            found = {name: g.detach() for name, g in zip(names, gradients, strict=True) if g is not None}
            squares[task] = {name: float(g.double().square().mean()) for name, g in found.items()}
            values[task] = float(value.detach())
            bad = [name for name, square in squares[task].items() if not math.isfinite(square)]
            if bad or not math.isfinite(values[task]):
                raise NonFiniteError(f"task {task!r}: NaN or infinity in {'the gradient of ' + bad[0] if bad else 'the loss'}")
    return values, squares


def _value_of(task: str, loss: Loss, output: Any) -> torch.Tensor:
    try:
        value: object = loss(output)
    except Exception as error:
        raise InputError(f"task {task!r}: the loss failed: {type(error).__name__}: {error}") from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        found = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(f"task {task!r}: a loss makes one number that depends on the parameters, this one makes {found}")
    return value.reshape(())


def judge_tasks(
    weights: Mapping[str, float],
    sizes: Mapping[str, int],
    values: Mapping[str, float],
    measured: Mapping[str, Squares],
    predicted: Mapping[str, Squares],
) -> TaskGradients:
    """Norms and shares over the parameters that more than one task reaches.

    Different tasks end in weights of their own, which are independent and of mean 0: in expectation over draws their gradients
    are orthogonal, so that squares add up to the square of the whole.

    Args:
        weights: of the losses.
        sizes: entries of each parameter.
        values: of the losses.
        measured: mean squares of gradients.
        predicted: the same.

    Raises:
        InputError: no two tasks have a parameter in common.
    """
    shared = [name for name in sizes if sum(measured[task].get(name, 0.0) > 0.0 for task in weights) > 1]
    if not shared:
        raise InputError("losses: no parameter gets a gradient from more than one of these tasks: there is no trunk to share")

    def norm(squares: Squares) -> float:
        return math.sqrt(sum(sizes[name] * squares.get(name, 0.0) for name in shared))

    norms = {task: weight * norm(measured[task]) for task, weight in weights.items()}
    whole = sum(value**2 for value in norms.values())
    inverse = {task: weight / norms[task] if norms[task] > 0.0 else 0.0 for task, weight in weights.items()}
    scale = sum(weights.values()) / sum(inverse.values())
    rows = tuple(
        TaskRow(
            task=task,
            weight=weight,
            loss=values[task],
            predicted=weight * norm(predicted[task]),
            measured=norms[task],
            share=norms[task] ** 2 / whole,
            balanced=scale * inverse[task],
        )
        for task, weight in weights.items()
    )
    findings = tuple(_finding(row, rows) for row in rows if row.share > DROWNS)
    return TaskGradients(rows=rows, shared=tuple(shared), predicted=predicted, measured=measured, findings=findings)


def _finding(loud: TaskRow, rows: tuple[TaskRow, ...]) -> Finding:
    balanced = ", ".join(f"{row.task} {row.balanced:.3g}" for row in rows)
    return Finding(
        kind=FindingKind.TASK_DROWNS,
        where=loud.task,
        evidence=f"Task {loud.task!r} drowns the others: {loud.share:.0%} of the trunk's gradient, by squares, is its own.",
        remedy=f"Weigh the losses: equal shares at {balanced}. The initialization has no part in it.",
    )
