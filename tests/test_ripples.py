"""Channels of narrow kernels correlate near places each in another way, and channels of one place have its level in common."""

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.rules import Call, rules
from gainstage.signal import independent

aten = torch.ops.aten


def depthwise(x, weight, stride=1):
    size = [(n - weight.shape[-1]) // stride + 1 for n in x.shape[2:]]
    call = Call(aten.conv2d.default, ((x.shape[0], weight.shape[0], *size),))
    return rules()[aten.conv2d.default](call, x, weight, None, stride, 0, 1, x.shape[1])


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1)])
def test_white_inputs_ripple_by_the_overlap_of_windows(size, stride):
    """``overlap / (n (n + 2))`` for n Gaussian taps of a Gaussian white map."""
    x, weight = (independent(shape, 0.0, 1.0, is_weight=w) for shape, w in (((2, 8, 16, 16), False), ((8, 1, size, size), True)))
    y = depthwise(x, weight, stride)
    axes, spread = y.uneven.ripple
    along = np.maximum(size - stride * np.arange(spread.shape[0]), 0)
    exact = np.multiply.outer(along, along) / (size**2 * (size**2 + 2.0))
    exact[0, 0] = 0.0
    assert axes == y.axes[2:]
    np.testing.assert_allclose(spread, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("taps", [3, 9])
def test_smoothed_inputs_ripple_as_drawn_kernels_do(taps):
    """A mean of two neighbours before it, e = 1, 1/2, 0: mean squares of ``w' (A_d - e(d) C) w`` over those of ``w' C w``."""
    pooled = rules()[aten.avg_pool1d.default](
        Call(aten.avg_pool1d.default, ((2, 4, 31),)), independent((2, 4, 32), 0.0, 1.0), [2], [1]
    )
    call = Call(aten.conv1d.default, ((2, 4, 32 - taps),))
    kernel = independent((4, 1, taps), 0.0, 1.0, is_weight=True)
    spread = rules()[aten.conv1d.default](call, pooled, kernel, None, 1, 0, 1, 4).uneven.ripple[1]
    rows, places = np.random.default_rng(0).standard_normal((40000, taps)), np.arange(taps)
    squares = []
    for lag in range(taps):
        apart = np.maximum(1.0 - 0.5 * np.abs(places[:, None] - places + lag), 0.0)
        squares.append(np.einsum("rt,tu,ru->r", rows, apart, rows))
    strays = [np.mean((square - max(1.0 - 0.5 * lag, 0.0) * squares[0]) ** 2) for lag, square in enumerate(squares)]
    np.testing.assert_allclose(spread[:taps], strays / np.mean(squares[0] ** 2), rtol=0.05)


DRAWS = 60


def depthwise_stack():
    layers = [[nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16), nn.SiLU()] for _ in range(2)]
    return nn.Sequential(*layers[0], *layers[1], nn.AvgPool2d(7))


def narrow():
    return nn.Sequential(nn.Conv2d(6, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())


def level(x):
    return float(x.double().square().mean())


def over_channels(x):
    """Cosine of two channels of one place."""
    x = x.double()
    return (float(x.sum(1).square().mean()) / x.shape[1] - level(x)) / (x.shape[1] - 1) / level(x)


def drawn(make, shape, of):
    """Mean over draws, and its standard error."""
    found = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(of(make()(torch.randn(shape))))
    return np.mean(found), np.std(found) / DRAWS**0.5


def inspected(make, shape):
    return gs.inspect(make(), (torch.randn(shape),), gradients=False).calls[-1].outputs[0]


def test_averages_over_maps_of_depthwise_channels_are_louder():
    """By a twentieth, for what near places of each channel share beyond their mean correlation."""
    shape = (4, 16, 11, 11)
    mean, error = drawn(depthwise_stack, shape, level)
    assert inspected(depthwise_stack, shape).second_moment == pytest.approx(mean, abs=0.01 * mean + 3.0 * error)


def test_channels_of_a_place_share_its_level():
    """Behind six inputs and batch norm two channels have a cosine of .345, two places of .318, which was predicted for both."""
    shape = (4, 6, 9, 9)
    mean, error = drawn(narrow, shape, over_channels)
    assert inspected(narrow, shape).cosine(1) == pytest.approx(mean, abs=0.002 + 3.0 * error)
