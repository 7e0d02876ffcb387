"""Sums of gradients: what several ways from one function back to its tensor have in common."""

import math

import pytest
import torch
from gradients import measured_gradients, predicted_gradients
from torch import nn
from torch.nn import functional as F

import gainstage as gs

WIDTH = 64
WRITTEN = {
    "swish": lambda u: u * torch.sigmoid(1.702 * u),
    "gelu": lambda u: 0.5 * u * (1.0 + torch.tanh((2.0 / math.pi) ** 0.5 * (u + 0.044715 * u.pow(3)))),
    "mish": lambda u: u * torch.tanh(F.softplus(u)),
    "square": lambda u: u * u,
    "quotient": lambda u: u / (1.0 + u.abs()),
    "negative": lambda u: -u * torch.exp(-u * u),
    "sum": lambda u: u + u.relu(),
    "difference": lambda u: u.relu() - 1.5 * u.tanh(),
}


class Layer(nn.Module):
    """A function of a layer; ``pooled``: with one gradient for all of a set."""

    def __init__(self, function, *, pooled=False):
        super().__init__()
        self.layer, self.function, self.pooled = nn.Linear(WIDTH, WIDTH), function, pooled
        nn.init.normal_(self.layer.weight, std=WIDTH**-0.5)

    def forward(self, x):
        y = self.function(self.layer(x))
        return y.mean(1) if self.pooled else y


@pytest.mark.parametrize("name", WRITTEN)
def test_a_function_that_is_written_out_has_one_slope(name):
    torch.manual_seed(0)
    inspected = gs.inspect(Layer(WRITTEN[name]), (torch.randn(32, WIDTH),)).modules["layer"][0]
    z = torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u = (z * inspected.second_moment**0.5).requires_grad_()
    (slopes,) = torch.autograd.grad(WRITTEN[name](u).sum(), u)
    # Standard errors of up to .4 %; the steps of the grid for kinks.
    assert inspected.gradient.second_moment == pytest.approx(float(slopes.square().mean()), rel=0.015)


@pytest.mark.parametrize("name", ["swish", "square", "negative", "difference"])
def test_entries_of_one_gradient_share_what_the_slope_makes_of_it(name):
    """The bias's gradient is a sum over a set with one gradient: pairs of entries count."""

    def build():
        return Layer(WRITTEN[name], pooled=True)

    predicted, measured = (found(build, (4, 32, WIDTH), draws=40) for found in (predicted_gradients, measured_gradients))
    for key, (mean, error) in measured.items():
        assert abs(math.log(predicted[key] / mean)) < 0.03 + 3.0 * error / mean, (key, predicted[key], mean, error)
