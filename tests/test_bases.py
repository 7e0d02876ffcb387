"""Functions of one tensor that are laid side by side: polynomials by recursion, bumps around centres."""

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.signal.quadrature import expectation, nodes

CENTRES = torch.linspace(-1.0, 1.0, 8)


class Polynomials(nn.Module):
    """Chebyshev's of some order, each made of the two before; the first is a tensor of ones."""

    def __init__(self, order):
        super().__init__()
        self.order = order

    def forward(self, x):
        before, found = torch.ones_like(x), x
        for _ in range(self.order - 1):
            before, found = found, 2.0 * x * found - before
        return found


@pytest.mark.parametrize("order", [2, 3, 4])
def test_polynomials_made_of_each_other_are_functions_of_their_argument(order):
    trace = gs.inspect(nn.Sequential(nn.Tanh(), Polynomials(order)), (torch.randn(64, 16),), gradients=False)
    exact = expectation(np.cos(order * np.arccos(np.tanh(nodes()))) ** 2)
    assert trace.modules["1"][0].second_moment == pytest.approx(exact, rel=1e-3)


class Bumps(nn.Module):
    """``exp(-((x - c) / h)^2)`` for a row of centres c."""

    def forward(self, x):
        return torch.exp(-(((x[..., None] - CENTRES) / 0.3) ** 2)).flatten(-2)


class Logarithm(nn.Module):
    """Of what is positive."""

    def forward(self, x):
        return x.log()


def test_gradients_of_functions_side_by_side_have_the_slope_of_each():
    """``sum over c of E[f_c'^2]``: far from its centre a bump is flat, however steep the square in it is there."""
    inspected = gs.inspect(nn.Sequential(nn.Tanh(), Bumps()), (torch.randn(32, 16),)).modules["0"][0]
    distance = (np.tanh(nodes())[:, None] - CENTRES.double().numpy()) / 0.3
    slopes = -2.0 / 0.3 * distance * np.exp(-(distance**2))
    exact = sum(expectation(slope**2) for slope in slopes.T)
    assert inspected.gradient.second_moment == pytest.approx(exact, rel=0.02)


def test_what_is_positive_stays_so_and_its_logarithm_has_a_gradient():
    """Channels of few inputs have means of their own, to which the distribution of their scales is brought."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10), nn.Softplus(), Logarithm()]
    model, x = nn.Sequential(*layers), torch.randn(64, 8)
    gs.apply(model, gs.plan(model, (x,)), seed=0)
    trace = gs.inspect(model, (x,))
    scales = next(signal for name, signal in trace.nodes.items() if name.startswith("softplus"))
    assert scales.value.marginal.values.min() > 0.0
    assert all(np.isfinite(signal.gradient.second_moment) for signal in trace.nodes.values() if signal.gradient is not None)
