"""Vectors over their own norms where these stray: attention between channels, over tokens that are alike; against draws."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gainstage as gs
from gainstage.signal.axes import Axis
from gainstage.signal.copies import replace
from gainstage.signal.directions import divided
from gainstage.signal.gram import Gram, widths
from gainstage.signal.value import gaussian

DRAWS, SAMPLES, TOKENS, WIDTH, CHANNELS = 100, 3, 40, 96, 32


class Product(nn.Module):
    def forward(self, a, b):
        return a @ b


class ChannelAttention(nn.Module):
    """Queries and keys are channels over tokens, divided by their norms; their products' variance is near 1."""

    def __init__(self, normalised=lambda x: F.normalize(x, dim=-1)):
        super().__init__()
        self.normalised = normalised
        self.query, self.key, self.value = (nn.Linear(WIDTH, CHANNELS, bias=False) for _ in range(3))
        self.cosines, self.probabilities, self.output = Product(), nn.Softmax(-1), Product()

    def forward(self, x):
        query, key = (self.normalised(made(x).transpose(1, 2)) for made in (self.query, self.key))
        probabilities = self.probabilities(3.0 * self.cosines(query, key.transpose(1, 2)))
        return self.output(probabilities, self.value(x).transpose(1, 2))


def tokens(common):
    """What all tokens of a sample share has this part of their second moment."""
    return common**0.5 * torch.randn(SAMPLES, 1, WIDTH) + (1.0 - common) ** 0.5 * torch.randn(SAMPLES, TOKENS, WIDTH)


def measured(common):
    """Mean over draws of the second moment of each stage, with its standard error."""
    found = {"cosines": [], "probabilities": [], "output": []}
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        net = ChannelAttention()
        for name, moments in found.items():
            getattr(net, name).register_forward_hook(lambda _m, _x, y, moments=moments: moments.append(float(y.square().mean())))
        with torch.no_grad():
            net(tokens(common))
    return {name: (np.mean(moments), np.std(moments, ddof=1) / DRAWS**0.5) for name, moments in found.items()}


@pytest.mark.parametrize("common", [0.0, 0.2, 0.44, 0.8])
def test_channels_attend_to_channels(common):
    torch.manual_seed(0)
    trace = gs.inspect(ChannelAttention(), (tokens(common),), gradients=False)
    for name, (mean, error) in measured(common).items():
        predicted = trace.modules[name][0].second_moment
        # One draw of inputs was looked at: what its samples have in common strays by some percent.
        assert abs(predicted - mean) < 0.1 * mean + 3 * error, (name, predicted, mean, error)


def test_a_norm_of_root_mean_squares_is_one_of_lengths():
    def cosines(*normalised):
        torch.manual_seed(0)
        trace = gs.inspect(ChannelAttention(*normalised), (tokens(0.44),), gradients=False)
        return trace.modules["cosines"][0].second_moment

    assert cosines(lambda x: F.rms_norm(x, x.shape[-1:], eps=0.0) / TOKENS**0.5) == pytest.approx(cosines(), rel=1e-4)


class Averages(nn.Module):
    """Maps that have something in common all over, mixed by a fresh kernel, normalised, and averaged over places."""

    def __init__(self, common):
        super().__init__()
        self.common = common
        self.mix, self.norm, self.mean = nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.mean(self.norm(self.mix(x + self.common * x.mean((2, 3), keepdim=True))))


@pytest.mark.parametrize(("samples", "common"), [(2, 4.0), (2, 10.0), (3, 10.0), (8, 4.0)])
def test_channels_of_which_few_samples_differ_are_divided_by_what_they_differ_by(samples, common):
    """By the ratio of averages the average over places would be half as loud again for two samples, a tenth for eight."""
    torch.manual_seed(0)
    model, measured = Averages(common), []
    predicted = gs.inspect(model, (torch.randn(samples, 64, 6, 6),), gradients=False).modules["mean"][0].second_moment
    with torch.no_grad():
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            model.mix.reset_parameters()
            measured.append(float(model(torch.randn(samples, 64, 6, 6)).square().mean()))
    error = np.std(measured, ddof=1) / DRAWS**0.5
    assert abs(predicted - np.mean(measured)) < 0.01 * predicted + 3 * error, (predicted, np.mean(measured), error)


def test_pairs_that_are_known_to_be_alike_change_nothing():
    """A matrix of what pairs of tokens share, all of them nearly the same, is no reason to leave the norms out."""
    axes = tuple(Axis(size) for size in (SAMPLES, CHANNELS, TOKENS))
    table = np.zeros((2, 2, 2))
    table[1, 1] = 0.3, 1.0  # tokens of a channel have much in common
    x = gaussian(tuple((axis,) for axis in axes), 0.0, table)
    alike = replace(x, gram=Gram(axes[2], 1.0 + 0.01 * np.eye(len(widths(TOKENS)))))
    unlike = replace(x, gram=Gram(axes[2], 1.0 + 0.5 * np.eye(len(widths(TOKENS)))))
    assert divided(x, [2]).table[1, 1, 0] < 0.9 * x.table[1, 1, 0]
    np.testing.assert_allclose(divided(alike, [2]).table, divided(x, [2]).table)
    assert divided(unlike, [2]) is unlike
