"""Recurrent layers: LSTM, GRU and plain, with layers, directions, projections and dropout between layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gainstage.rules.registry import Call, rule
from gainstage.signal import Value, contract, join, permute, take
from gainstage.signal.axes import Axis, Dim
from gainstage.signal.copies import replace
from gainstage.signal.levels import normalised
from gainstage.signal.marginal import Marginal
from gainstage.signal.movement import merge_dim
from gainstage.signal.quadrature import Array, quantiles, standardised
from gainstage.signal.recurrent import (
    STEPS,
    Gate,
    Life,
    Process,
    Step,
    Units,
    Unrolled,
    average,
    gru_step,
    lstm_step,
    relu_step,
    simulate,
    tanh_step,
)
from gainstage.signal.stray import Stray, read

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of recurrent unit: its equations, and the number of gates in its packed weights."""

    step: Step
    gates: int
    splits_new: bool = False  # GRU: the last gate's hidden part is multiplied before it is added


LSTM, GRU = Kind(lstm_step, 4), Kind(gru_step, 3, splits_new=True)
TANH, RELU = Kind(tanh_step, 1), Kind(relu_step, 1)


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters of one layer in one direction."""

    input: Value
    hidden: Value
    biases: tuple[Value, Value] | None
    projection: Value | None = None

    @property
    def lineage(self) -> int:
        """Parameters that the layer depends on."""
        found = self.input.lineage | self.hidden.lineage
        for value in (*(self.biases or ()), self.projection):
            found |= value.lineage if value is not None else 0
        return found


def _unpacked(params: Sequence[Value], has_biases: bool, count: int) -> list[Weights]:
    width = len(params) // count
    found = []
    for i in range(count):
        own = params[i * width : (i + 1) * width]
        biases = (own[2], own[3]) if has_biases else None
        found.append(Weights(own[0], own[1], biases, own[-1] if width in (3, 5) else None))
    return found


def _rows(weight: Value, gate: int, gates: int) -> Value:
    size = weight.shape[0] // gates
    return take(weight, 0, gate * size, (gate + 1) * size)


def _gates(kind: Kind, weights: Weights, driven: Sequence[Process]) -> list[Gate]:
    """Gates of a unit; the new state of a GRU keeps its two parts apart."""
    gates = []
    for g in range(kind.gates):
        hidden = _rows(weights.hidden, g, kind.gates)
        gain = hidden.shape[1] * hidden.second_moment
        biases = [_rows(b, g, kind.gates) for b in weights.biases or ()]
        parts: list[tuple[Process | None, float, list[Value]]] = [(driven[g], gain, biases)]
        if kind.splits_new and g == kind.gates - 1:
            parts = [(driven[g], 0.0, biases[:1]), (None, gain, biases[1:])]
        gates += [
            Gate(driven=p, hidden_gain=h, bias_mean=sum(b.mean for b in own), bias_variance=sum(b.variance for b in own))
            for p, h, own in parts
        ]
    return gates


def _driven_by_table(x: Value, weight: Value) -> Process:
    """What an input [time, batch, channel] makes of a gate, from its table."""
    pre = contract(x, weight, "tbi", "gi", "tbg")
    table = pre.table[..., 1] if pre.dims[2] else pre.table
    for d, dim in enumerate(pre.dims[:2]):
        table = table if dim else np.stack([table, table], axis=d)
    times = x.shape[0]
    eye = np.eye(times)
    return Process(within=eye * table[1, 1] + (1.0 - eye) * table[0, 1], between=eye * table[1, 0] + (1.0 - eye) * table[0, 0])


def _state(value: Value, index: int) -> Process:
    """Initial state of one layer and direction, from [layer, batch, channel]."""
    value = replace(value, constant=None)
    table = value.table[1] if value.dims[0] else value.table
    table = table[..., 1] if value.dims[2] else table
    if value.levels is not None and value.levels.shape[0] > 1 and value.dims[0]:
        table = table * float(np.mean(value.levels[index] ** 2))
    between, within = (table[0], table[1]) if value.dims[1] else (table, table)
    return Process(within=np.array([[float(within)]]), between=np.array([[float(between)]]), mean=value.mean)


def _signal(life: Process, entries: Array, dims: tuple[Dim, Dim, Dim], lineage: int, stray: Stray) -> Value:
    """Value [time, batch, channel] of a hidden state; channels share their mean."""
    times = life.within.shape[0]

    def over_time(matrix: Array) -> Array:
        same = float(np.mean(np.diag(matrix)))
        return np.array([(float(matrix.sum()) - same * times) / (times * (times - 1)) if times > 1 else same, same])

    table = np.full((2, 2, 2), life.mean**2)
    table[:, 0, 1], table[:, 1, 1] = over_time(life.between), over_time(life.within)
    full = float(table[1, 1, 1])
    index = tuple(slice(None) if dim else 1 for dim in dims)
    across = np.sqrt(np.maximum(np.diag(life.within), 0.0))
    shape = [times if d == 0 else 1 for d, dim in enumerate(dims) if dim]
    profile = normalised(across.reshape(shape)) if times > 1 else None
    std = max(full - life.mean**2, 0.0) ** 0.5

    def values() -> Array:
        return standardised(quantiles(entries), life.mean, std)

    marginal = Marginal(object(), values)
    return Value(
        dims=dims, mean=life.mean, table=np.array(table[index]), marginal=marginal, source=object(), lineage=lineage,
        stray=stray, levels=profile,
    )  # fmt: skip


def recurrent(
    kind: Kind, x: Value, states: Sequence[Value], layers: Sequence[Sequence[Weights]], dropout: float
) -> tuple[Value, Value, Value]:
    """Output [time, batch, channel], last hidden states and last cell states of a stack of layers."""
    x = merge_dim(merge_dim(merge_dim(x, 0), 1), 2)
    times, batch = x.shape[0], x.dims[1]
    below: Process | None = None
    lineage, stray, last_h, last_c = x.lineage, read([(x, 1.0)]), [], []
    outputs: list[Value] = []
    for depth, directions in enumerate(layers):
        lives: list[Life] = []
        outputs = []
        for direction, weights in enumerate(directions):
            lineage |= weights.lineage
            driven = [_drive(x, below, _rows(weights.input, g, kind.gates)) for g in range(kind.gates)]
            driven = [p.reversed() for p in driven] if direction else driven
            index = depth * len(directions) + direction
            start = (_state(states[0], index), _state(states[-1], index))
            gain = None if weights.projection is None else weights.projection.shape[1] * weights.projection.second_moment
            life = simulate(_gates(kind, weights, driven), kind.step, start, times, gain)
            end = Process(within=life.hidden.within[-1:, -1:], between=life.hidden.between[-1:, -1:], mean=life.hidden.mean)
            hidden = life.hidden.reversed() if direction else life.hidden
            lives.append(replace(life, hidden=hidden))
            width = weights.hidden.shape[1]
            channel, cells = (Axis(width),), (Axis(weights.hidden.shape[0] // kind.gates),)
            outputs.append(_signal(hidden, life.entries, (x.dims[0], batch, channel), lineage, stray))
            last_h.append(_signal(end, life.entries, ((), batch, channel), lineage, stray))
            last_c.append(_signal(life.cell, life.entries, ((), batch, cells), lineage, stray))
        below = average([life.hidden for life in lives])
        below = below.dropped(1.0 - dropout) if 0.0 < dropout < 1.0 else below
    return join(outputs, 2), join(last_h, 0), join(last_c, 0)


def _drive(x: Value, below: Process | None, weight: Value) -> Process:
    if below is None:
        return _driven_by_table(x, weight)
    return below.scaled(weight.shape[1] * weight.second_moment)


def _layers(
    kind: Kind, x: Value, states: Sequence[Value], params: Sequence[Value], options: Sequence[object]
) -> tuple[Value, ...]:
    has_biases, num_layers, dropout, train, bidirectional, batch_first = options
    directions = 2 if bidirectional else 1
    assert isinstance(num_layers, int)
    assert isinstance(dropout, float | int)
    weights = _unpacked(params, bool(has_biases), num_layers * directions)
    layers = [weights[i * directions : (i + 1) * directions] for i in range(num_layers)]
    x = permute(x, (1, 0, 2)) if batch_first else x
    output, h, c = recurrent(kind, x, states, layers, float(dropout) if train else 0.0)
    return permute(output, (1, 0, 2)) if batch_first else output, h, c


@rule(aten.lstm.input)
def lstm(call: Call, x: Value, hx: Sequence[Value], params: Sequence[Value], *options: object) -> tuple[Value, ...]:
    """``c' = sigma(f) c + sigma(i) tanh(g); h' = sigma(o) tanh(c')``, pre-activations Gaussian over time."""
    return _layers(LSTM, x, hx, params, options)


@rule(aten.gru.input)
def gru(call: Call, x: Value, hx: Value, params: Sequence[Value], *options: object) -> tuple[Value, ...]:
    """``h' = (1 - sigma(z)) tanh(x_n + sigma(r) h_n) + sigma(z) h``, pre-activations Gaussian over time."""
    return _layers(GRU, x, [hx], params, options)[:2]


@rule(aten.rnn_tanh.input)
def rnn_tanh(call: Call, x: Value, hx: Value, params: Sequence[Value], *options: object) -> tuple[Value, ...]:
    """``h' = tanh(W x + U h + b)``, pre-activations Gaussian over time."""
    return _layers(TANH, x, [hx], params, options)[:2]


@rule(aten.rnn_relu.input)
def rnn_relu(call: Call, x: Value, hx: Value, params: Sequence[Value], *options: object) -> tuple[Value, ...]:
    """``h' = max(W x + U h + b, 0)``, pre-activations Gaussian over time."""
    return _layers(RELU, x, [hx], params, options)[:2]


def _cell(kind: Kind, x: Value, states: Sequence[Value], params: Sequence[Value | None]) -> tuple[Value, ...]:
    """One step: the next of those that the states came of, or the first, from Gaussian states independent of the input."""
    given = tuple(p for p in params if p is not None)
    (weights,) = _unpacked(given, len(given) > 2, 1)
    before = _steps_to(states, given)
    x, *states = (merge_dim(merge_dim(_leading(value), 1), 2) for value in (x, *states))
    if before is None:
        gates, start = kind.gates + kind.splits_new, (_state(states[0], 0), _state(states[-1], 0))
        units, inputs = Units(gates, start, STEPS), [x]
    else:
        units, inputs = before.units.at(before.steps), [before.input, x]
    if not units.is_done:
        driven = [_driven_at(inputs, _rows(weights.input, g, kind.gates), units.steps) for g in range(kind.gates)]
        units.advance(_gates(kind, weights, driven), kind.step)
    life = units.last()
    lineage, stray = x.lineage | weights.lineage, read([(x, 1.0)])
    channel = (Axis(weights.hidden.shape[1]),)
    found = []
    for moments in (life.hidden, life.cell):
        state = _signal(moments, life.entries, ((), x.dims[1], channel), lineage, stray)
        steps = Unrolled(
            table=state.table, units=units, steps=units.steps, params=given, input=x, is_hidden=moments is life.hidden
        )
        found.append(replace(state, dims=state.dims[1:], unrolled=steps))
    return tuple(found)


def _steps_to(states: Sequence[Value], params: Sequence[Value]) -> Unrolled | None:
    """The steps that all states are the last of, if they were made with the same weights."""
    found = [steps for state in states if (steps := state.steps_of_cell()) is not None]
    if len(found) < len(states) or any(a is not b for each in found for a, b in zip(each.params, params, strict=False)):
        return None
    return found[0] if len({(each.units, each.steps, len(each.params)) for each in found}) == 1 else None


def _driven_at(inputs: Sequence[Value], weight: Value, t: int) -> Process:
    """What the last input makes of a gate at step t; with every step before it shares what it shares with the one before."""
    own = _driven_by_table(inputs[-1], weight)
    shared = _driven_by_table(join(inputs, 0), weight) if len(inputs) > 1 else own
    eye, rest = np.eye(t + 1), 1.0 - np.eye(t + 1)
    return Process(
        within=eye * own.within[0, 0] + rest * shared.within[0, -1],
        between=eye * own.between[0, 0] + rest * shared.between[0, -1],
    )


def _leading(x: Value) -> Value:
    return replace(x, dims=((), *x.dims), constant=None, prior=None)


@rule(aten.lstm_cell.default)
def lstm_cell(call: Call, x: Value, hx: Sequence[Value], *params: Value | None) -> tuple[Value, ...]:
    """One step of :func:`lstm`."""
    return _cell(LSTM, x, hx, params)


@rule(aten.gru_cell.default)
def gru_cell(call: Call, x: Value, hx: Value, *params: Value | None) -> Value:
    """One step of :func:`gru`."""
    return _cell(GRU, x, [hx], params)[0]


@rule(aten.rnn_tanh_cell.default)
def rnn_tanh_cell(call: Call, x: Value, hx: Value, *params: Value | None) -> Value:
    """One step of :func:`rnn_tanh`."""
    return _cell(TANH, x, [hx], params)[0]


@rule(aten.rnn_relu_cell.default)
def rnn_relu_cell(call: Call, x: Value, hx: Value, *params: Value | None) -> Value:
    """One step of :func:`rnn_relu`."""
    return _cell(RELU, x, [hx], params)[0]
