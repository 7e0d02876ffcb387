"""Batch norms in narrow networks: what their divisors stray by, and what of it adds up over many layers on the way back."""

import functools
import statistics
from collections import OrderedDict

import numpy as np
import pytest
import torch
from gradients import measured_gradients, predicted_gradients
from torch import nn
from torch.nn import functional as F

import gainstage as gs
from gainstage.propagate import kurtosis
from gainstage.signal import gaussian, levels, normalise_gradient
from gainstage.signal.alike import border, centred, mean_square
from gainstage.signal.axes import new_dims


class Branches(nn.Module):
    """Branches that read one tensor, side by side, and what reads them all."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(*normed(64, 16))
        self.branches = nn.ModuleList([nn.Sequential(*normed(16, 48)) for _ in range(4)])
        self.last = nn.Linear(192, 64, bias=False)
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x):
        x = self.first(x)
        return self.norm(self.last(torch.cat([branch(x) for branch in self.branches], dim=1)))


class Pooled(nn.Module):
    """Padding makes the border of a map quieter, in all channels alike."""

    def __init__(self):
        super().__init__()
        self.conv, self.last, self.norm = nn.Conv2d(32, 64, 3, bias=False), nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64)

    def forward(self, x):
        x = nn.functional.batch_norm(self.conv(x), None, None, training=True).relu()
        return self.norm(self.last(nn.functional.avg_pool2d(x, 3, 1, 1)))


class Standardised(nn.Module):
    """Rows of weights of one length, with a gain, on what a ReLU made: its channels and places are alike."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.head, self.activation = nn.Conv2d(8, 32, 1, bias=False), nn.Linear(48, 8), activation
        self.weight, self.gain = nn.Parameter(torch.randn(48, 32, 3, 3)), nn.Parameter(torch.ones(48))

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, 48, -1), None, None, self.gain / 17.0, training=True).reshape(48, 32, 3, 3)
        return self.head(self.activation(F.conv2d(self.first(x).relu(), weight, padding=1)).mean((2, 3)))


def normed(inputs, outputs):
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]


def divisors(build, shape, draws):
    """Mean over draws of the variance of a channel that the last norm divides by, and its relative variance over channels."""
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        model, x = build(), torch.randn(shape)
        with torch.no_grad():
            model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0].double()))
            model(x)
    variances = torch.stack([y.transpose(0, 1).flatten(1).var(1, correction=0) for y in found])
    return float(variances.mean()), float((variances.var(1, correction=0) / variances.mean(1) ** 2).mean())


def predicted_divisors(build, shape):
    """The same, of the tensor that the last norm reads, in a trace."""
    torch.manual_seed(1000)
    model = build()
    trace = gs.inspect(model, (torch.randn(shape),))
    y = trace.modules["last"][0].value
    places = [position for position, axis in enumerate(y.axes) if axis not in y.uneven.axes]
    table = centred(y, places)
    level = float(table[(1,) * table.ndim])
    return level, 2.0 * float(mean_square(y, table, places, border(y, places)).ravel()[-1]) / level**2 + y.uneven.centred


@pytest.mark.parametrize(("build", "shape", "tolerance"), [(Branches, (256, 64), 0.12), (Pooled, (4, 32, 10, 10), 0.15)])
def test_what_divisors_stray_by(build, shape, tolerance):
    # To leading order in 1/n: what is left is a few times 1/16 of it, and for the map what its corners lack of the sides.
    _, found = predicted_divisors(build, shape)
    _, stray = divisors(build, shape, 60)
    assert found == pytest.approx(stray, rel=tolerance)


def test_levels_that_differ_from_place_to_place_leave_more_of_a_channel():
    def build():
        layers = [*normed(96, 24), *normed(24, 96)] * 3
        return nn.Sequential(
            OrderedDict(body=nn.Sequential(*layers), last=nn.Linear(96, 64, bias=False), norm=nn.BatchNorm1d(64))
        )

    # E[relu]^2 falls by a tenth, and the variance grows by 5 %. Levels that stray this much are taken to be log-normal.
    level, _ = predicted_divisors(build, (256, 96))
    measured, _ = divisors(build, (256, 96), 100)
    assert level == pytest.approx(measured, rel=0.025)


def test_gradients_are_turned_away_from_what_a_normalised_layer_varies_by():
    """Another layer's weights then lose some of it: without that the first weight's gradient is predicted 8 % too large."""

    def build():
        return nn.Sequential(*normed(64, 16), *normed(16, 96), *normed(96, 16), *normed(16, 96)[:-1])

    found = []
    for seed in range(150):
        torch.manual_seed(seed)
        model, x = build(), torch.randn(128, 64)
        y = model(x)
        y.backward(torch.randint_like(y, 2) * 2 - 1)
        found.append(float(model[0].weight.grad.double().square().mean()))
    torch.manual_seed(1000)
    statistics = gs.inspect(build(), (torch.randn(128, 64),)).parameters["0.weight"]
    assert statistics.gradient_second_moment == pytest.approx(sum(found) / len(found), rel=0.04)


def test_gradients_that_sum_to_zero_see_nothing_of_what_all_places_have_in_common():
    """With the mean of all places in it the second kernel's gradient is predicted 30 times too large."""

    def build():
        layers = [nn.Conv2d(3, 16, 5, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        for inputs in (16, 64):
            layers += [nn.Conv2d(inputs, 64, 1, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 16))

    found = []
    for seed in range(60):
        torch.manual_seed(seed)
        model, x = build(), torch.randn(2, 3, 64, 64)
        y = model(x)
        y.backward(torch.randint_like(y, 2) * 2 - 1)
        found.append(float(model[4].weight.grad.double().square().mean()))
    torch.manual_seed(1000)
    statistics = gs.inspect(build(), (torch.randn(2, 3, 64, 64),)).parameters["4.weight"]
    # a standard error of 3 %, and 9 % that 64 channels and 2 samples are off by
    assert statistics.gradient_second_moment == pytest.approx(sum(found) / len(found), rel=0.18)


@pytest.mark.parametrize(("draw", "exact"), [(nn.init.uniform_, 1.8), (nn.init.normal_, 3.0)])
def test_a_small_parameter_is_what_it_is_nearer_to(draw, exact):
    torch.manual_seed(0)
    # 300 entries: standard errors of .07 for uniform and .28 for normal ones, with 1.2 between the two
    assert all(kurtosis(draw(torch.empty(300))) == exact for _ in range(40))


class NormAfterNorm(nn.Module):
    """A stream of vectors that every layer adds to and normalises again."""

    def __init__(self, width, layers):
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(layers + 1)])

    def forward(self, x):
        x = self.norms[0](x)
        for branch, norm in zip(self.branches, self.norms[1:], strict=True):
            x = norm(x + branch(x))
        return x


def test_a_norm_takes_nothing_twice_and_what_it_made_has_one_length():
    """Behind a norm ``|x|^2`` strays by nothing: 1/s^2 gains only what the branch brings; and nothing is along x any more.

    In a stream of 5 norms over 16 entries the first law is worth 30 %, the second 15 %.
    """
    width, draws, found, predicted = 16, 200, [], []
    for seed in range(draws):
        torch.manual_seed(seed)
        model, x = NormAfterNorm(width, 5), torch.randn(256, width)
        y = model(x)
        y.backward(torch.randn_like(y))
        found.append(float(model.branches[0].weight.grad.square().mean()))
        if seed % 50 == 0:
            predicted.append(gs.inspect(model, (x,)).parameters["branches.0.weight"].gradient_second_moment)
    assert statistics.mean(predicted) == pytest.approx(
        statistics.mean(found), rel=0.03
    )  # a standard error of 1 %; the next order in 1/16


def test_loud_places_with_loud_gradients_are_even_behind_a_norm():
    """``g_t = l_t u`` at places of the levels l: divided by these, all places have the same gradient."""
    profile = levels.normalised(np.array([4.0, 1.0, 1.0, 1.0, 1.0, 0.5])[:, None])
    dims, own = new_dims((6, 512)), np.array([[0.0, 0.0], [0.0, 1.0]])
    shared = np.array([[0.0, levels.pair_factor(profile.ravel())], [0.0, 1.0]])
    x, g = gaussian(dims, 0.0, own, profile), gaussian(dims, 0.0, shared, profile)
    table = normalise_gradient(g, x, [1], 0.0, centre=False)[0].table
    assert table[0, 1] == pytest.approx(table[1, 1], rel=0.01)  # 1/512 goes along x


class Ghost(nn.Module):
    """Half of the channels, and a depthwise convolution of these with a norm of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.cheap, self.last = nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(64)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return torch.cat([x, self.last(self.cheap(x))], dim=1)


def test_behind_a_depthwise_kernel_nothing_of_a_gradient_lies_along_its_channel():
    """``sum g' x = sum g y = 0`` for ``y = w x`` that a norm reads: a scale was predicted 3.1 times too large, a shift 1.5."""
    found, predicted, names = [], [], ("norm.weight", "norm.bias")
    for seed in range(80):
        torch.manual_seed(seed)
        model, x = Ghost(), torch.randn(2, 32, 7, 7)
        y = model(x)
        y.backward(torch.randint_like(y, 2) * 2 - 1)
        found.append([float(model.get_parameter(name).grad.double().square().mean()) for name in names])
        if seed % 20 == 0:
            parameters = gs.inspect(model, (x,)).parameters
            predicted.append([parameters[name].gradient_second_moment for name in names])
    # Standard errors of 2 %; taps at the border count as those inside.
    assert np.mean(predicted, 0) == pytest.approx(np.mean(found, 0), rel=0.1)


class Chain(nn.Module):
    """Layers without biases in front of a norm; ``even``: of vectors of one length."""

    def __init__(self, depth, *, even=False):
        super().__init__()
        self.layers, self.even = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(depth))), even
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=64**-0.5)

    def forward(self, x):
        return F.rms_norm(self.layers(F.rms_norm(x, (64,), eps=1e-9) if self.even else x), (64,), eps=1e-9)


@pytest.mark.parametrize(("depth", "even"), [(1, False), (2, False), (3, False), (1, True)])
def test_the_length_of_a_vector_strays_by_every_layer_that_made_it(depth, even):
    """``E[1 / |y|^2]`` for ``y = W_k .. W_1 x``: each factor has n degrees of freedom, ``n / (n - 2)`` of its mean.

    A vector of one length is no factor. Predicted is ``n / (n - 2 k)`` for k factors, right to first order: for each pair of
    them ``(2 / n)^2`` is left.
    """
    torch.manual_seed(0)
    trace = gs.inspect(Chain(depth, even=even), (torch.randn(16, 64),))
    last = trace.modules[f"layers.{depth - 1}"][0]
    factors = depth + 1 - even
    exact = (64.0 / 62.0) ** factors * (1.0 - 1.0 / 64.0)  # one part in n of a gradient lies along the vector
    within = 0.003 + factors * (factors - 1) / 2 * 0.001
    assert last.gradient.second_moment * last.second_moment == pytest.approx(exact, rel=within)


@pytest.mark.parametrize("activation", [F.relu, F.silu])
def test_the_gain_of_a_standardised_weight_has_what_its_gradient_has_along_itself(activation):
    # One gradient for all places of a pool: the sum of g u over them is 5 to 30 times what unrelated g and u would have. Of the
    # weight that part goes, but not what x's covariance turned away from it: without that a sixth is missing behind a ReLU.
    shape, build = (8, 8, 12, 12), functools.partial(Standardised, activation)
    measured, predicted = measured_gradients(build, shape, 160), predicted_gradients(build, shape)
    for name in ("gain", "weight"):
        assert predicted[name] == pytest.approx(measured[name][0], rel=0.06 + 3.0 * measured[name][1] / measured[name][0]), name
