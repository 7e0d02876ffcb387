"""Recurrent modules: pre-activations of gates with second moment 1, half from the input and half from the hidden state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from gainstage.graph import Node, Ref
from gainstage.signal import Value
from gainstage.signal.movement import merge_dim
from gainstage.signal.quadrature import Array
from gainstage.solve.setting import Setting

aten = torch.ops.aten

_STATIONARY = 64  # steps after which a hidden state has forgotten that it started from zero
_WIDTH, _SEQUENCES = 256, 8
_ITERATIONS = 6  # the level moves by less than a percent after five


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Node names of the weights of one layer and direction, and the layer's place in the stack."""

    depth: int
    input_weight: str
    hidden_weight: str
    projection: str | None


def _sigmoid(z: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-z)))


def _lstm(a: Array, _b: Array, _hidden: Array, cell: Array) -> tuple[Array, Array]:
    """``c' = f c + i g``, ``h' = o tanh(c')``; gates i, f, g, o."""
    cell = _sigmoid(a[1]) * cell + _sigmoid(a[0]) * np.tanh(a[2])
    return _sigmoid(a[3]) * np.tanh(cell), cell


def _gru(a: Array, b: Array, hidden: Array, cell: Array) -> tuple[Array, Array]:
    """``n = tanh(W x + r U h)``, ``h' = (1 - z) n + z h``; gates r, z, n, of which ``b`` is the hidden half."""
    candidate = np.tanh(a[2] - b[2] + _sigmoid(a[0]) * b[2])
    update = _sigmoid(a[1])
    return (1.0 - update) * candidate + update * hidden, cell


def _tanh(a: Array, _b: Array, _hidden: Array, cell: Array) -> tuple[Array, Array]:
    """``h' = tanh(W x + U h)``."""
    return np.tanh(a[0]), cell


def _relu(a: Array, _b: Array, _hidden: Array, cell: Array) -> tuple[Array, Array]:
    """``h' = max(W x + U h, 0)``."""
    return np.maximum(a[0], 0.0), cell


# Number of gates, and the step from pre-activations (and their hidden half), hidden state and cell to the next ones.
_Step = Callable[[Array, Array, Array, Array], tuple[Array, Array]]
_MODULES: Mapping[object, tuple[int, _Step]] = {
    **dict.fromkeys((aten.lstm.input, aten.lstm_cell.default), (4, _lstm)),
    **dict.fromkeys((aten.gru.input, aten.gru_cell.default), (3, _gru)),
    **dict.fromkeys((aten.rnn_tanh.input, aten.rnn_tanh_cell.default), (1, _tanh)),
    **dict.fromkeys((aten.rnn_relu.input, aten.rnn_relu_cell.default), (1, _relu)),
}


def is_recurrent(node: Node) -> bool:
    """Whether a node is a recurrent module or cell of torch."""
    return node.op in _MODULES


@cache
def hidden_level(op: object, steps: int, correlation: float) -> float:
    """``E[h^2]`` over the steps of a module with unit gates that starts from zero: by running one, of width 256.

    States and gates are correlated over time (the same weights act at each step), for which there is no closed form. The level
    enters its own computation, through the weights that make the gates' pre-activations unit, so it is iterated.

    Args:
        op: the operation.
        steps: how many steps; beyond 64 the state has forgotten its start.
        correlation: of the input between two steps.

    Returns:
        The level, with a standard error of one percent (mean over 8 sequences of 256 states), the same at every call.
    """
    level = 0.25
    for _ in range(_ITERATIONS):
        level = (level * _run(_MODULES[op], min(steps, _STATIONARY), correlation, level)) ** 0.5  # damped: it would swing
    return level


def _run(module: tuple[int, _Step], steps: int, correlation: float, level: float) -> float:
    gates, step = module
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((gates, _WIDTH, _WIDTH)) * (0.5 / (_WIDTH * level)) ** 0.5
    lasting = generator.standard_normal((gates, _WIDTH, _SEQUENCES))
    hidden, cell = np.zeros((_WIDTH, _SEQUENCES)), np.zeros((_WIDTH, _SEQUENCES))
    total = 0.0
    for _ in range(steps):
        passing = generator.standard_normal(lasting.shape)
        from_input = (0.5 * correlation) ** 0.5 * lasting + (0.5 * (1.0 - correlation)) ** 0.5 * passing
        from_hidden = weights @ hidden
        hidden, cell = step(from_input + from_hidden, from_hidden, hidden, cell)
        total += float(np.mean(hidden**2))
    return total / steps


def time_correlation(x: Value, dim: int) -> float:
    """``K[another step] / K[same step]`` of a sequence along a dimension."""
    x = merge_dim(x, dim)
    if not x.dims[dim] or x.second_moment <= 0.0:
        return 0.0
    other = np.take(x.table, 0, axis=sum(len(axes) for axes in x.dims[:dim]))
    return min(max(float(other[(1,) * other.ndim]) / x.second_moment, 0.0), 1.0)


def unit_gates(
    node: Node, parameter_of: Mapping[str, str], values: Mapping[str, Any], settings: Mapping[str, Setting]
) -> dict[str, Setting]:
    """``Var(w_x) = 1 / (2 n_x E[x^2])``, ``Var(w_h) = 1 / (2 n_h E[h^2])`` for every layer and direction of a node."""
    assert isinstance(node.args[0], Ref)
    x = values[node.args[0].name]
    if not isinstance(x, Value) or x.second_moment <= 0.0:
        return {}
    steps, correlation = _sequence(node, x)
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
            changed[setting.info.name] = replace(setting.with_all(mean=0.0, variance=1.0 / fan), is_fixed=True, lines=(line,))
    return changed


def _halved(setting: Setting, level: float, what: str) -> Setting:
    fan = setting.info.shape[-1]
    variance = 0.5 / (fan * level)
    lines = (
        f"Var(w) = 1 / (2 n E[{what}^2]): gates with unit pre-activations, half from the input x, half from the hidden state h",
        f"Var(w) = 1 / (2 x {fan} x {level:.4g}) = {variance:.4g}",
    )
    return replace(setting.with_all(mean=0.0, variance=variance), is_fixed=True, lines=lines)


def _is_cell(node: Node) -> bool:
    return node.op_name.endswith("_cell.default")


def _sequence(node: Node, x: Value) -> tuple[int, float]:
    """Number of steps, and correlation of the input between two of them (in steps of 0.01)."""
    if _is_cell(node):
        return _STATIONARY, 0.0
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
