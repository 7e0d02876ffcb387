"""Recurrent modules: pre-activations of gates with second moment 1, half from the input and half from the hidden state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from gainstage.graph import Node, Ref
from gainstage.rules.recurrent import GRU, LSTM, RELU, TANH, Kind
from gainstage.signal import Value
from gainstage.signal.movement import merge_dim
from gainstage.signal.recurrent import STEPS, Gate, Process, simulate
from gainstage.solve.setting import Setting

aten = torch.ops.aten

_ITERATIONS = 6  # the level moves by less than a percent after five


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Node names of the weights of one layer and direction, and the layer's place in the stack."""

    depth: int
    input_weight: str
    hidden_weight: str
    projection: str | None


_KINDS: Mapping[object, Kind] = {
    **dict.fromkeys((aten.lstm.input, aten.lstm_cell.default), LSTM),
    **dict.fromkeys((aten.gru.input, aten.gru_cell.default), GRU),
    **dict.fromkeys((aten.rnn_tanh.input, aten.rnn_tanh_cell.default), TANH),
    **dict.fromkeys((aten.rnn_relu.input, aten.rnn_relu_cell.default), RELU),
}


def is_recurrent(node: Node) -> bool:
    """Whether a node is a recurrent module or cell of torch."""
    return node.op in _KINDS


@cache
def hidden_level(op: object, steps: int, correlation: float) -> float:
    """``E[h^2]`` over the steps of a module with unit gates that starts from zero.

    The level enters its own computation, through the weights that make the gates' pre-activations unit, so it is iterated;
    states and gates that are correlated over time are followed as the rule of these modules does.

    Args:
        op: the operation.
        steps: how many steps.
        correlation: of the input between two steps.
    """
    kind, times = _KINDS[op], min(steps, STEPS)
    covariance = 0.5 * (correlation + (1.0 - correlation) * np.eye(times))
    driven = Process(within=covariance, between=np.zeros_like(covariance))
    nothing = Process(within=np.zeros((1, 1)), between=np.zeros((1, 1)))
    level = 0.25
    for _ in range(_ITERATIONS):
        life = simulate(_unit_gates(kind, driven, 0.5 / level), kind.step, (nothing, nothing), times)
        found = float(np.mean(np.diag(life.hidden.within)))
        level = (level * found) ** 0.5  # damped: it would swing
    return level


def _unit_gates(kind: Kind, driven: Process, gain: float) -> list[Gate]:
    gates = [Gate(driven=driven, hidden_gain=gain) for _ in range(kind.gates)]
    if kind.splits_new:
        gates[-1:] = [Gate(driven=driven, hidden_gain=0.0), Gate(driven=None, hidden_gain=gain)]
    return gates


def time_correlation(x: Value, dim: int) -> float:
    """``K[another step] / K[same step]`` of a sequence along a dimension."""
    x = merge_dim(x, dim)
    if not x.dims[dim] or x.second_moment <= 0.0:
        return 0.0
    other = np.take(x.table, 0, axis=sum(len(axes) for axes in x.dims[:dim]))
    return min(max(float(other[(1,) * other.ndim]) / x.second_moment, 0.0), 1.0)


def weights_of(node: Node) -> tuple[str, ...]:
    """Names of the weights that a node reads: calls of a cell that have them in common are steps of one process."""
    return tuple(name for layer in _layers(node) for name in (layer.input_weight, layer.hidden_weight))


def unit_gates(
    node: Node, calls: int, parameter_of: Mapping[str, str], values: Mapping[str, Any], settings: Mapping[str, Setting]
) -> dict[str, Setting]:
    """``Var(w_x) = 1 / (2 n_x E[x^2])``, ``Var(w_h) = 1 / (2 n_h E[h^2])`` for every layer and direction of a node.

    ``calls``: how often its weights are used.
    """
    assert isinstance(node.args[0], Ref)
    x = values[node.args[0].name]
    if not isinstance(x, Value) or x.second_moment <= 0.0:
        return {}
    steps, correlation = _sequence(node, x, calls)
    hidden = hidden_level(node.op, steps, correlation)
    changed: dict[str, Setting] = {}
    for layer in _layers(node):
        level = x.second_moment if layer.depth == 0 else hidden / _kept(node)
        for name, its_level, what in ((layer.input_weight, level, "x"), (layer.hidden_weight, hidden, "h")):
            setting = settings.get(parameter_of.get(name, ""))
            if setting is not None and not setting.is_fixed:
                changed[setting.info.name] = _halved(setting, its_level, what)
        setting = settings.get(parameter_of.get(layer.projection or "", ""))
        if setting is not None and not setting.is_fixed:
            fan = setting.info.shape[-1]
            line = f"Var(w) = 1 / n = 1 / {fan}: the projected state has the second moment of the hidden state"
            changed[setting.info.name] = replace(setting.with_all(mean=0.0, variance=1.0 / fan), lines=(line,))
    return changed


def _halved(setting: Setting, level: float, what: str) -> Setting:
    fan = setting.info.shape[-1]
    variance = 0.5 / (fan * level)
    lines = (
        f"Var(w) = 1 / (2 n E[{what}^2]): gates with unit pre-activations, half from the input x, half from the hidden state h",
        f"Var(w) = 1 / (2 x {fan} x {level:.4g}) = {variance:.4g}",
    )
    return replace(setting.with_all(mean=0.0, variance=variance), lines=lines)


def _is_cell(node: Node) -> bool:
    return node.op_name.endswith("_cell.default")


def _sequence(node: Node, x: Value, calls: int) -> tuple[int, float]:
    """Number of steps, and correlation of the input between two of them (in steps of 0.01)."""
    if _is_cell(node):
        return calls, 0.0
    dim = 1 if bool(node.args[-1]) and len(x.shape) == 3 else 0
    return x.shape[dim], round(time_correlation(x, dim), 2)


def _kept(node: Node) -> float:
    """What dropout between layers leaves."""
    return 1.0 - float(node.args[5]) if bool(node.args[6]) else 1.0


def _layers(node: Node) -> list[_Layer]:
    if _is_cell(node):
        names = [argument.name for argument in node.args[2:] if isinstance(argument, Ref)]
        return [_Layer(depth=0, input_weight=names[0], hidden_weight=names[1], projection=None)]
    _, _, flat, has_biases, depth, _, _, bidirectional, _ = node.args
    names = [argument.name for argument in flat]
    directions = 2 if bidirectional else 1
    each = len(names) // (int(depth) * directions)
    has_projection = each - (4 if has_biases else 2) == 1
    return [_layer(names[start : start + each], index // directions, has_projection=has_projection)
            for index, start in enumerate(range(0, len(names), each))]  # fmt: skip


def _layer(names: Sequence[str], depth: int, *, has_projection: bool) -> _Layer:
    return _Layer(depth=depth, input_weight=names[0], hidden_weight=names[1], projection=names[-1] if has_projection else None)
