"""Recurrent layers: against closed forms, and against many draws of the real layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from gainstage.api import inspect
from gainstage.signal.recurrent import Gate, Process, relu_step, simulate, tanh_step

NOTHING = Process(within=np.zeros((1, 1)), between=np.zeros((1, 1)))
SIMULATED = 0.01  # sampling error of 8,192 units, two samples each; the linear part has none


def white(times: int, variance: float) -> Process:
    """Input that is new at every step and in every sample."""
    return Process(within=variance * np.eye(times), between=np.zeros((times, times)))


def test_relu_follows_the_recursion_of_arc_cosine_kernels() -> None:
    """q_{t+1} = (v + g q_t) / 2 within a sample; between samples the first step has E[relu]^2 = v / 2 pi."""
    times, variance, gain = 12, 1.3, 0.9
    life = simulate([Gate(driven=white(times, variance), hidden_gain=gain)], relu_step, (NOTHING, NOTHING), times)
    q, expected = 0.0, []
    for _ in range(times):
        q = (variance + gain * q) / 2.0
        expected.append(q)
    assert np.diag(life.hidden.within) == pytest.approx(expected, rel=2 * SIMULATED)
    assert life.hidden.between[0, 0] == pytest.approx(variance / (2 * math.pi), rel=2 * SIMULATED)


def test_tanh_of_one_step_is_its_gaussian_expectation() -> None:
    """Also with a bias that all steps and samples share."""
    life = simulate(
        [Gate(driven=white(1, 2.0), hidden_gain=1.0, bias_mean=0.4, bias_variance=0.5)], tanh_step, (NOTHING, NOTHING), 1
    )
    z, weight = np.polynomial.hermite_e.hermegauss(60)
    exact = float((np.tanh(0.4 + math.sqrt(2.5) * z) ** 2) @ weight / weight.sum())
    assert life.hidden.within[0, 0] == pytest.approx(exact, rel=SIMULATED)


def test_beyond_the_steps_that_are_followed_the_process_is_stationary() -> None:
    """A long relu chain at its fixed point v / (2 - g)."""
    life = simulate([Gate(driven=white(300, 1.0), hidden_gain=1.0)], relu_step, (NOTHING, NOTHING), 300)
    assert life.hidden.within.shape == (300, 300)
    assert np.diag(life.hidden.within)[50:] == pytest.approx(1.0, rel=2 * SIMULATED)


@pytest.mark.parametrize("step", [tanh_step, relu_step])
def test_of_nothing_nothing_comes(step) -> None:
    life = simulate([Gate(driven=white(8, 0.0), hidden_gain=1.0)], step, (NOTHING, NOTHING), 8)
    assert not life.hidden.within.any()
    assert not life.entries.any()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lstm": (lambda: nn.LSTM(24, 96), (12, 6, 24)),
    "lstm, two layers, both directions, dropout": (
        lambda: nn.LSTM(24, 96, 2, bidirectional=True, batch_first=True, dropout=0.3),
        (6, 12, 24),
    ),
    "lstm with projection": (lambda: nn.LSTM(24, 96, proj_size=48), (12, 6, 24)),
    "gru": (lambda: nn.GRU(24, 96, 2), (12, 6, 24)),
    "gru without biases": (lambda: nn.GRU(24, 96, bias=False, bidirectional=True), (12, 6, 24)),
    "plain": (lambda: nn.RNN(24, 96, 2), (12, 6, 24)),
    "one sample": (lambda: nn.RNN(24, 96, nonlinearity="relu"), (12, 24)),
    "cell": (lambda: nn.LSTMCell(24, 96), (6, 24)),
    "gru cell": (lambda: nn.GRUCell(24, 96), (6, 24)),
}


def loud(layer: nn.Module) -> nn.Module:
    """Weights so large that no gate is linear."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=1.3 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.3)
    return layer


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # a remark of torch on its speed
@pytest.mark.parametrize("prepare", [lambda layer: layer, loud], ids=["default", "loud"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_last_states_have_the_predicted_second_moments(name: str, prepare: Callable[[nn.Module], nn.Module]) -> None:
    """Mean over draws of weights and inputs; 3 % for the finite width of 96 (it halves when the width doubles)."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    trace = inspect(prepare(make()), (torch.randn(shape),))
    predicted = [signal.second_moment for signal in trace.calls[-1].outputs]
    draws = []
    for seed in range(30):
        torch.manual_seed(seed)
        layer = prepare(make())
        with torch.no_grad():
            result = layer(torch.randn(shape))
        outputs = [result] if isinstance(result, torch.Tensor) else [result[0], *_flat(result[1])]
        draws.append([float(output.double().square().mean()) for output in outputs])
    found = np.asarray(draws)
    error = found.std(axis=0) / found.mean(axis=0) / math.sqrt(len(found))
    assert len(predicted) == found.shape[1]
    for value, mean, its_error in zip(predicted, found.mean(axis=0), error, strict=True):
        assert abs(math.log(value / mean)) < 0.03 + 4.0 * its_error


def _flat(states: torch.Tensor | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [states] if isinstance(states, torch.Tensor) else list(states)


def test_samples_correlate_as_the_real_ones_do() -> None:
    """Cosine between samples, over draws of the weights: biases are what samples share."""
    torch.manual_seed(0)
    trace = inspect(nn.LSTM(24, 96), (torch.randn(12, 6, 24),))
    pairs, squares = [], []
    for seed in range(30):
        torch.manual_seed(seed)
        with torch.no_grad():
            output = nn.LSTM(24, 96)(torch.randn(12, 6, 24))[0].double()
        pairs.append(float((output[:, 0] * output[:, 1]).mean()))
        squares.append(float(output.square().mean()))
    error = np.std(pairs) / np.mean(squares) / math.sqrt(len(pairs))
    assert trace.calls[-1].outputs[0].cosine(1) == pytest.approx(np.mean(pairs) / np.mean(squares), abs=0.02 + 3.0 * error)


class Unrolled(nn.Module):
    """The states of a cell in a loop, side by side."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(x.shape[0], 96)
        state = (h, h) if isinstance(self.cell, nn.LSTMCell) else h
        states = []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(states, 1)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_a_cell_in_a_loop_is_a_layer(kind: Callable[..., nn.Module]) -> None:
    """What U h of two steps have in common is kept: levels of every step, and cosine between steps, over draws."""
    steps = 6
    levels, pairs = [], []
    for seed in range(24):
        torch.manual_seed(seed)
        model, x = Unrolled(loud(kind(24, 96, bias=False))), torch.randn(8, steps, 24)
        with torch.no_grad():
            states = model(x).double()
        levels.append(states.square().mean((0, 2)).numpy())
        pairs.append(float(states.mean(1).square().mean()) * steps**2 - levels[-1].sum())
    trace = inspect(model, (x,))
    level = np.mean(levels, axis=0)
    assert [signal.second_moment for signal in trace.modules["cell"]] == pytest.approx(level, rel=0.06)
    (whole,) = trace.modules[""]
    assert whole.second_moment == pytest.approx(level.mean(), rel=0.04)
    assert whole.cosine(1) == pytest.approx(np.mean(pairs) / (steps - 1) / level.sum(), abs=0.03)


WIDTH = 64


class Slots(nn.Module):
    """A cell on all of a set at once: its state is a view of one that has an axis more, and was changed since."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.norm = nn.GRUCell(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.norm(x)
        return self.cell(x.reshape(-1, WIDTH), state.reshape(-1, WIDTH)).view_as(x)


def test_states_with_an_axis_more_are_followed_by_the_rule() -> None:
    torch.manual_seed(0)
    model, x = Slots(), torch.randn(8, 12, WIDTH)
    trace = inspect(model, (x,), gradients=False)
    assert not trace.sampled
    assert trace.modules[""][0].second_moment == pytest.approx(float(model(x).detach().square().mean()), rel=0.05)
