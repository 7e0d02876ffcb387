"""Gates of residual streams: slopes where kinks lie between points of the grid, sums of what has atoms, what gates share."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gainstage as gs
from gainstage.signal import independent, slope
from gainstage.signal.quadrature import cumulative, expectation, nodes, sum_quantiles


def below(z):
    return 0.5 * (1.0 + math.erf(z / 2**0.5))


@pytest.mark.parametrize("mean", [0.0, 0.1234, 0.3, -0.7, 1.7])
@pytest.mark.parametrize(
    ("function", "average", "square"),
    [
        (torch.relu, below, below),
        (torch.abs, lambda m: 2.0 * below(m) - 1.0, lambda m: 1.0),
        (lambda t: F.leaky_relu(t, -0.5), lambda m: 1.5 * below(m) - 0.5, lambda m: 0.75 * below(m) + 0.25),
        (F.hardtanh, lambda m: below(1.0 - m) - below(-1.0 - m), lambda m: below(1.0 - m) - below(-1.0 - m)),
    ],
)
def test_slopes_around_kinks_have_their_mean_and_their_mean_square(function, average, square, mean):
    found, squares = slope(function, independent((4, 8), mean, 1.0))
    # Half of a point's probability, up to .0035, before; the density between two points is taken to be even.
    assert expectation(found.marginal.values) == pytest.approx(average(mean), abs=3e-5)
    assert found.second_moment == expectation(squares) == pytest.approx(square(mean), abs=3e-5)


def test_a_sum_with_what_has_an_atom_is_no_staircase():
    """``P(max(z, 0) + z' <= t) = P(z' <= t) / 2 + integral over z > 0 of P(z' <= t - z)``."""
    fine = np.linspace(0.0, 9.0, 20001)
    density = np.exp(-0.5 * fine**2) / (2.0 * np.pi) ** 0.5
    for step in (0.0, 0.013, 0.029, 0.044):  # wherever the points of the grid lie
        made = sum_quantiles(np.maximum(nodes(), 0.0), nodes() + step)
        at = float(np.interp(0.0, made, cumulative()))
        tail = np.array([below(-step - z) for z in fine])
        assert at == pytest.approx(0.5 * below(-step) + float(np.trapezoid(density * tail, fine)), abs=2e-4)


class Gates(nn.Module):
    """A stream through ReLU to which independent numbers are added, read after each."""

    def __init__(self, count):
        super().__init__()
        self.gates = nn.ModuleList([nn.ReLU() for _ in range(count)])

    def forward(self, *numbers):
        read = [self.gates[0](numbers[0])]
        for number, gate in zip(numbers[1:], self.gates[1:], strict=True):
            read.append(gate(read[-1] + number))
        return tuple(read)


def test_gradients_that_passed_gates_above_are_more_likely_to_pass_the_next():
    """Entries are independent: what passes is a matter of one entry's history, drawn a million times."""
    numbers = [torch.randn(1000, 1000, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    trace = gs.inspect(Gates(6), tuple(numbers))
    sums = [numbers[0]]
    for number in numbers[1:]:
        sums.append(sums[-1].relu() + number)
    square = torch.ones_like(numbers[0])  # of the gradient, whose parts are independent of each other
    for k in reversed(range(6)):
        predicted = trace.modules[f"gates.{k}"][0].gradient.second_moment
        # A standard error of .1 % at most; points of the grid that jumps fall between made half a percent.
        assert predicted == pytest.approx(float(square.double().mean()), rel=2e-3)
        square = 1.0 + square * (sums[k] > 0)


class Again(nn.Module):
    """A stream that goes through ReLU a number of times, with branches that are silent at the start."""

    def __init__(self, times):
        super().__init__()
        self.first, self.norm = nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.branches = nn.ModuleList([nn.Sequential(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)) for _ in range(times - 1)])
        for branch in self.branches:
            nn.init.zeros_(branch[1].weight)
        self.last = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())

    def forward(self, sample, place):
        x = self.norm(self.first(sample + place)).relu()
        for branch in self.branches:
            x = (x + branch(x)).relu()
        return self.last(x).mean((2, 3))


def test_what_passed_a_gate_passes_its_like_unchanged():
    """Behind a batch norm gradients sum to zero: what a shift gets is what the gate makes of their sum, once, not each time."""
    torch.manual_seed(0)
    once, again = Again(1), Again(6)
    again.load_state_dict(once.state_dict(), strict=False)
    args = torch.randn(8, 64, 1, 1), torch.randn(8, 64, 8, 8)
    found = [gs.inspect(model, args).parameters for model in (once, again)]
    for name in ("norm.bias", "norm.weight", "first.weight"):
        own, other = (trace[name].gradient_second_moment for trace in found)
        assert other == pytest.approx(own, rel=0.02), name  # the atom ends between two points of the grid


class Border(nn.Module):
    """The border of a pooled map, less the mean of the map."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(32, 64, 1),
            nn.BatchNorm2d(64),
        )  # fmt: skip
        self.gate = nn.ReLU()

    def forward(self, x):
        return self.gate(self.stem(x)[:, :, 0])


def test_borders_of_a_pooled_map_differ_from_the_rest_by_their_means():
    """Fewer and quieter entries: the mean of their largest is lower than the root of its square, and a norm shows the gap."""
    found = []
    for seed in range(24):
        torch.manual_seed(seed)
        model, x = Border(), torch.randn(4, 3, 64, 64)
        with torch.no_grad():
            found.append(float(model(x).double().square().mean()))
    predicted = gs.inspect(model, (x,)).modules["gate"][0].second_moment
    # In proportion to their levels it would be .44. The mean over draws is known to 2.3 %.
    assert predicted == pytest.approx(float(np.mean(found)), rel=0.06)
