"""Gradients through attention: what the slope of a softmax leaves, and what keys and values share for reading one tensor."""

import pytest
import torch
from gradients import assert_gradients_agree, measured_gradients, predicted_gradients
from torch import nn
from torch.nn import functional as F

import gainstage as gs
from gainstage.signal.attention import powers_of

WIDTH, LENGTH, DRAWS = 64, 32, 40


class Attention(nn.Module):
    """Plain attention; ``scale``: of queries and keys, so that logits have the variance ``scale^4``.

    ``written``: out in products and a softmax, with logits that are capped, and a copy of the one key head for each of two.
    """

    def __init__(self, scale, *, causal=False, first=False, written=False):
        super().__init__()
        self.causal, self.first, self.written = causal, first, written
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        for layer, std in ((self.q, scale), (self.k, scale), (self.v, 1.0)):
            nn.init.normal_(layer.weight, std=std * WIDTH**-0.5)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (1, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.written:
            k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (k, v))
            logits = 30.0 * torch.tanh(q @ k.transpose(2, 3) / WIDTH**0.5 / 30.0)
            hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) & self.causal
            return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v
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


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(("scale", "causal"), [(0.3, False), (1.0, False), (1.5, False), (1.0, True)])
def test_gradients_of_queries_keys_and_values_are_those_of_draws(scale, causal, written):
    """Each law alone is worth 20 to 70 %: quiet logits the keys that agree, loud ones the slope of their softmax."""

    def build():
        return Attention(scale, causal=causal, written=written)

    measured = measured_gradients(build, (4, LENGTH, WIDTH), DRAWS)
    torch.manual_seed(0)
    found = gs.inspect(build(), (torch.randn(4, LENGTH, WIDTH),)).parameters
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


class Decoder(nn.Module):
    """Two pre-norm causal blocks whose branches are loud beside the stream: early positions get most of the gradient.

    ``even``: what attention makes has a norm of its own, so that late positions are alike, and as loud as the first.
    """

    def __init__(self, *, even=False):
        super().__init__()
        self.even = even
        narrow = WIDTH // 2  # two heads for each key
        self.q, self.k, self.v, self.out, self.up, self.down = (
            nn.ModuleList(nn.Linear(*sizes, bias=False) for _ in range(2))
            for sizes in ((WIDTH, WIDTH), (WIDTH, narrow), (WIDTH, narrow), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH))
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(WIDTH)) for _ in range(4))
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=(0.5 if name[0] in "qk" else 1.0) * WIDTH**-0.5)

    def forward(self, x):
        x = 0.4 * x
        for i in range(2):
            y = F.rms_norm(x, (WIDTH,), self.scales[2 * i])
            q, k, v = (layer[i](y).unflatten(-1, (-1, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
            y = self.out[i](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + (F.rms_norm(y, (WIDTH,)) if self.even else y)
            x = x + self.down[i](torch.tanh(self.up[i](F.rms_norm(x, (WIDTH,), self.scales[2 * i + 1]))))
        return F.rms_norm(x, (WIDTH,))


def test_pairs_of_positions_are_followed_back_through_norms_sums_and_heads():
    """With the average over pairs for each pair, values got a fourth less, and the scales of norms; queries and keys aside.

    Heads that share a key: the first layer's are up to 4 % off.
    """
    shape = (4, LENGTH, WIDTH)
    measured = measured_gradients(Decoder, shape, 40)
    found = predicted_gradients(Decoder, shape, draws=1)
    assert_gradients_agree(found, {name: pair for name, pair in measured.items() if name[0] not in "qk"}, 0.02)


@pytest.mark.parametrize("even", [False, True])
def test_queries_near_the_start_have_their_first_keys_only(even):
    """Of their keys and values more is alike than on average, and of late ones more still where all are as loud.

    Of the second layer: with pairs as on average its queries and keys got a tenth too much, or two thirds of their gradient.
    """
    measured = measured_gradients(lambda: Decoder(even=even), (4, LENGTH, WIDTH), 60)
    found = predicted_gradients(lambda: Decoder(even=even), (4, LENGTH, WIDTH), draws=1)
    names = ("q.1.weight", "k.1.weight")
    assert_gradients_agree(found, {name: measured[name] for name in names}, 0.02)
