"""Positions of a map are not alike: zero padding makes its border quieter, and norms, activations and pools see it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.rules import Call, rules
from gainstage.signal import independent, normalise
from gainstage.signal.alike import centred
from gainstage.signal.maxima import max_over
from gainstage.signal.movement import reshape

aten = torch.ops.aten


def convolve(x, weight, stride=1, padding=1, groups=1):
    size = [(n + 2 * padding - weight.shape[-1]) // stride + 1 for n in x.shape[2:]]
    call = Call(aten.conv2d.default, ((x.shape[0], weight.shape[0], *size),))
    return rules()[aten.conv2d.default](call, x, weight, None, stride, padding, 1, groups)


def kernel(outputs, inputs, size=3):
    return independent((outputs, inputs, size, size), 0.0, (inputs * size**2) ** -0.5, is_weight=True)


def profile_of(x):
    return (np.broadcast_to(x.levels, x.shape)[0, 0] ** 2) * x.second_moment


@pytest.mark.parametrize("depth", [1, 4, 32])
def test_padding_wears_the_border_down(depth):
    """Linear layers: the map of second moments is averaged over 3 x 3 windows, zeros outside; 32 layers on 8 x 8 leave 5 %."""
    x, exact = independent((2, 4, 8, 8), 0.0, 1.0), np.ones((8, 8))
    step = (np.abs(np.subtract.outer(np.arange(8), np.arange(8))) <= 1) / 3.0
    for _ in range(depth):
        x, exact = convolve(x, kernel(4, 4)), step @ exact @ step.T
    assert x.second_moment == pytest.approx(exact.mean(), rel=1e-9)
    np.testing.assert_allclose(profile_of(x), exact, rtol=1e-9)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 8, 8)])
def test_a_dimension_of_one_place_has_no_border(shape):
    """Levels along another dimension are not its own: of three taps along it one reads the map, whatever is read beside."""
    rules_of = {2: aten.conv2d.default, 3: aten.conv3d.default}
    x, rank, exact = independent((2, 4, *shape), 0.0, 1.0), len(shape), np.ones(8)
    step = (np.abs(np.subtract.outer(np.arange(8), np.arange(8))) <= 1) / 3.0
    for _ in range(3):
        weight = independent((4, 4, *[3] * rank), 0.0, (4 * 3**rank) ** -0.5, is_weight=True)
        rule = rules_of[rank]
        x, exact = rules()[rule](Call(rule, (x.shape,)), x, weight, None, 1, 1, 1, 1), step @ exact
    assert x.second_moment == pytest.approx(exact.mean() ** shape.count(8) / 3.0 ** (3 * shape.count(1)), rel=1e-9)


def test_a_stride_reads_the_border_less_often():
    """Stride 2, padding 1: the first row of a map of even size is read once, the others once or twice."""
    quiet = convolve(independent((2, 4, 8, 8), 0.0, 1.0), kernel(4, 4))
    row = np.r_[2, np.full(6, 3), 2] / 3.0
    taps = np.array([[0.0, row[0], row[1]], *[[row[2 * p - 1], row[2 * p], row[2 * p + 1]] for p in range(1, 4)]]).sum(1) / 3.0
    np.testing.assert_allclose(profile_of(convolve(quiet, kernel(4, 4), stride=2)), np.outer(taps, taps), rtol=1e-9)


class Stack(nn.Module):
    """Convolutions, batch norms, activations, and whatever reads them."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


def block(width, activation, groups=1):
    return [nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(width), activation]


STACKS = {
    "relu": lambda: Stack(*[layer for _ in range(4) for layer in block(48, nn.ReLU())], nn.Conv2d(48, 48, 3, padding=1)),
    "hardswish": lambda: Stack(*[layer for _ in range(4) for layer in block(48, nn.Hardswish())], nn.Conv2d(48, 48, 3, 2, 1)),
    "silu, then pooled": lambda: Stack(
        *[layer for _ in range(3) for layer in block(48, nn.SiLU())], nn.AdaptiveAvgPool2d(1), nn.Conv2d(48, 48, 1)
    ),
    "depthwise": lambda: Stack(
        nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.Hardswish(),
        nn.Conv2d(48, 48, 5, padding=2, groups=48, bias=False), nn.BatchNorm2d(48, eps=0.1),
    ),
    "group norm": lambda: Stack(
        nn.Conv2d(48, 48, 3, padding=1), nn.GroupNorm(1, 48), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1), nn.GroupNorm(8, 48),
        nn.ReLU(), nn.Conv2d(48, 48, 5, 2, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_small_maps_with_norms(name):
    """Every layer's second moment against 40 draws of weights and inputs on 7 x 7 maps."""
    torch.manual_seed(0)
    model, found = STACKS[name]().train(), []
    x = torch.randn(2, 48, 7, 7)
    modules = gs.inspect(model, (x,), gradients=False).modules
    predicted = [modules[f"layers.{i}"][0].second_moment for i in range(len(model.layers))]
    for draw in range(40):
        torch.manual_seed(draw + 1)
        y, row = torch.randn(2, 48, 7, 7), []
        for layer in STACKS[name]().train().layers:
            y = layer(y).detach()
            row.append(float(y.double().square().mean()))
        found.append(row)
    error = np.std(found, axis=0) / len(found) ** 0.5
    # sampling error of both sides (the present draw's weights are predicted from), and 2 % for channels that differ
    np.testing.assert_array_less(np.abs(np.mean(found, axis=0) - predicted), 4 * error + 0.02 * np.array(predicted))


def test_a_norm_over_channels_levels_the_border():
    quiet = convolve(independent((2, 8, 8, 8), 0.0, 1.0), kernel(8, 8))
    level = normalise(quiet, quiet.dims[1], 0.0)
    assert quiet.levels is not None
    assert level.levels is None
    assert level.second_moment == pytest.approx(1.0)


POOLS = {
    "average of averages": lambda: Stack(nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(2), nn.AvgPool2d(3, 1)),
    "averages, relu, averages": lambda: Stack(nn.AvgPool2d(4, 1), nn.ReLU(), nn.AvgPool2d(3, 1), nn.AdaptiveAvgPool2d(1)),
    "maxima of maxima": lambda: Stack(nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1)),
    "a pyramid of maxima": lambda: Stack(nn.MaxPool2d(5, 1, 2), nn.MaxPool2d(5, 1, 2), nn.MaxPool2d(5, 1, 2)),
    "average of maxima": lambda: Stack(nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, count_include_pad=False)),
    "maxima of averages": lambda: Stack(nn.AvgPool2d(3, 1), nn.MaxPool2d(2), nn.AvgPool2d(2)),
    "maxima through a convolution": lambda: Stack(
        nn.MaxPool2d(3, 1), nn.Conv2d(16, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2)
    ),
    "nearest, then pooled": lambda: Stack(nn.Upsample(scale_factor=2), nn.AvgPool2d(3, 1), nn.ReLU(), nn.AvgPool2d(2)),
    "bilinear, then pooled": lambda: Stack(nn.Upsample(scale_factor=2, mode="bilinear"), nn.ReLU(), nn.AvgPool2d(2, 1)),
    "strided": lambda: Stack(
        nn.AvgPool2d(5, 1), nn.Conv2d(16, 64, 1, 2, bias=False), nn.AvgPool2d(2), nn.Dropout(0.3), nn.AvgPool2d(2)
    ),
    "no norms": lambda: Stack(
        nn.Conv2d(16, 48, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(48, 48, 3, padding=1),
    ),
    "reflected": lambda: Stack(nn.ReflectionPad2d(2), nn.Conv2d(16, 48, 3, padding=1, padding_mode="reflect"), nn.MaxPool2d(2)),
    "one axis": lambda: Stack(nn.AvgPool2d((3, 1), 1), nn.MaxPool2d((2, 1)), nn.AvgPool2d((1, 2)), nn.AvgPool2d((3, 1), 1)),
}


@pytest.mark.parametrize("name", POOLS)
def test_neighbours_share_more(name):
    """Second moments behind pools of pools, on maps of 20 x 20, against 60 draws; means as well."""
    torch.manual_seed(0)
    model, found = POOLS[name]().train(), []
    trace = gs.inspect(model, (torch.randn(2, 16, 20, 20),), gradients=False).modules
    predicted = [trace[f"layers.{i}"][0] for i in range(len(model.layers))]
    for draw in range(60):
        torch.manual_seed(draw + 1)
        y, row = torch.randn(2, 16, 20, 20), []
        for layer in POOLS[name]().train().layers:
            y = layer(y).detach()
            row.append((float(y.double().mean()), float(y.double().square().mean())))
        found.append(row)
    error = np.std(found, axis=0) / len(found) ** 0.5
    want = np.array([(signal.mean, signal.second_moment) for signal in predicted])
    scale = np.array([(signal.second_moment**0.5, signal.second_moment) for signal in predicted])
    np.testing.assert_array_less(np.abs(np.mean(found, axis=0) - want), 4 * error + 0.02 * scale)


def test_maxima_are_as_loud_as_what_they_are_taken_of():
    """Padding makes the middle of a map of 80 x 80 louder than its average, by 1.7 %: nothing in two digits of a level."""
    x = convolve(independent((2, 4, 80, 80), 0.0, 1.0), kernel(4, 4))
    y = rules()[aten.max_pool2d.default](Call(aten.max_pool2d.default, ((2, 4, 40, 40),)), x, [2, 2], [2, 2])
    assert profile_of(y)[20, 20] == pytest.approx(1.5513 * profile_of(x)[40, 40], rel=1e-3)  # of the largest of 4 normals


class Beside(nn.Module):
    """Maxima of windows that overlap, beside a function of them, go through a norm, a ReLU and a pool."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 48, 5, padding=2, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.conv, self.norm, self.pool = nn.Conv2d(48, 16, 1, bias=False), nn.BatchNorm2d(64), nn.AvgPool2d(2)

    def forward(self, x):
        x = self.stem(x)
        return self.pool(self.norm(torch.cat([x, self.conv(x)], 1)).relu())


def test_maxima_of_windows_that_overlap_are_one_number_rather_than_two_that_are_alike():
    """What is above the mean is more often the same in two windows than a normal variable of that correlation would be."""
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(float(Beside()(torch.randn(2, 3, 48, 48)).double().var((0, 2, 3), correction=0).mean()))
    torch.manual_seed(1000)
    y = gs.inspect(Beside(), (torch.randn(2, 3, 48, 48),)).modules["pool"][0].value
    variance = centred(y, [position for position, axis in enumerate(y.axes) if axis not in y.dims[1]])[(-1,) * y.table.ndim]
    # 13 % too little without; 2 % are left, and a standard error of .4 %
    assert variance == pytest.approx(np.mean(found), rel=0.035)


def test_the_largest_of_zeros_is_zero():
    windows = np.array([[-1, 0, 1], [1, 2, 3], [3, 4, 5]])
    y = max_over(independent((2, 6, 6), 0.0, 0.0), [1, 2], [windows, windows])
    assert y.shape == (2, 3, 3)
    assert y.mean == y.second_moment == 0.0


def test_windows_cut_again_elsewhere_keep_what_the_rest_of_the_tensor_has():
    """56 positions as 8 windows of 7, joined, and cut into 7 of 8: only these positions are mixed, not channels or samples."""
    x = independent((3, 5, 56), 0.0, 1.0)
    shared = np.zeros_like(x.table)
    shared[:, 1, :] = 0.4  # any two entries of one channel
    x = reshape(replace(x, table=np.maximum(x.table, shared), rho=None), (3, 5, 8, 7))
    cut = reshape(reshape(x, (3, 5, 56)), (3, 5, 7, 8))
    assert cut.table[0, 1, 0, 0] == pytest.approx(0.4)
    assert cut.table[1, 1, 1, 0] == pytest.approx(0.4)
    assert cut.table[0, 0, 0, 0] == cut.table[1, 0, 1, 1] == 0.0
    assert cut.second_moment == 1.0


class Squeezed(nn.Module):
    """How far the average of a map is from one sample to another, where places share a lot and border places lack taps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.second, self.norm = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)

    def forward(self, x):
        x = nn.functional.avg_pool2d(torch.relu(self.first(x)), 3, 2, 1)
        squeezed = torch.relu(self.norm(self.second(x))).mean((2, 3))
        return squeezed - squeezed.mean(0)


def test_what_border_places_share_goes_through_activations():
    torch.manual_seed(0)
    model, x = Squeezed().train(), torch.randn(2, 3, 32, 32)
    (signal,) = gs.inspect(model, (x,)).calls[-1].outputs
    found = []
    with torch.no_grad():
        for _ in range(60):
            model.first.reset_parameters()
            model.second.reset_parameters()
            found.append(float(model(torch.randn_like(x)).square().mean()))
    assert signal.second_moment == pytest.approx(np.mean(found), rel=0.15)  # of 60 draws, 5 %
