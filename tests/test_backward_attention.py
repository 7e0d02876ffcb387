"""Gradients through attention: what the slope of a softmax leaves, and what keys and values share for reading one tensor."""

import pytest
import torch
from gradients import measured_gradients
from torch import nn
from torch.nn import functional as F

import gainstage as gs
from gainstage.signal.attention import powers_of

WIDTH, LENGTH, DRAWS = 64, 32, 40


class Attention(nn.Module):
    """Plain attention; ``scale``: of queries and keys, so that logits have the variance ``scale^4``."""

    def __init__(self, scale, *, causal=False, first=False):
        super().__init__()
        self.causal, self.first = causal, first
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        for layer, std in ((self.q, scale), (self.k, scale), (self.v, 1.0)):
            nn.init.normal_(layer.weight, std=std * WIDTH**-0.5)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (1, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return y[:, :, 0] if self.first else y


@pytest.mark.parametrize("variance", [0.1, 1.0, 5.0])
def test_powers_of_softmaxes_are_those_of_samples(variance):
    p = (torch.randn(200_000, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * variance**0.5).softmax(-1)
    found = powers_of(variance, 9)
    d = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slope = (p * (d - (p * d).sum(-1, keepdim=True))).square().sum(-1).mean()
    assert found.slope() == pytest.approx(float(slope), rel=0.01)  # standard errors of .3 %
    squares = p.square().sum(-1)
    measured = (squares.mean(), p.pow(3).sum(-1).mean(), p.pow(4).sum(-1).mean(), squares.square().mean())
    for exact, sampled in zip((found.square, found.cube, found.fourth, found.both), measured, strict=True):
        assert exact == pytest.approx(float(sampled), rel=0.01)


@pytest.mark.parametrize(("scale", "causal"), [(0.3, False), (1.0, False), (1.5, False), (1.0, True)])
def test_gradients_of_queries_keys_and_values_are_those_of_draws(scale, causal):
    """Each law alone is worth 20 to 70 %: quiet logits the keys that agree, loud ones the slope of their softmax."""
    measured = measured_gradients(lambda: Attention(scale, causal=causal), (4, LENGTH, WIDTH), DRAWS)
    torch.manual_seed(0)
    found = gs.inspect(Attention(scale, causal=causal), (torch.randn(4, LENGTH, WIDTH),)).parameters
    for name, (mean, error) in measured.items():
        within = 0.06 if scale <= 1.0 else 0.1  # the next order in the variance of the logits over 64 channels
        assert abs(found[name].gradient_second_moment / mean - 1.0) < within + 2.0 * error / mean, (name, mean, error)


def test_only_queries_that_are_read_get_a_gradient():
    torch.manual_seed(0)
    trace = gs.inspect(Attention(1.0, first=True), (torch.randn(4, LENGTH, WIDTH),))
    gradient = trace.modules["q"][0].gradient.value
    assert gradient.levels is not None
    squares = gradient.levels.reshape(-1) ** 2
    assert squares[0] == pytest.approx(LENGTH)
    assert squares[1:].max() < 1e-9
