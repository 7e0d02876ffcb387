"""Gradients past a maximum over a concatenation, against autograd over draws."""

from functools import partial

import pytest
import torch
from gradients import assert_gradients_agree, measured_gradients, predicted_gradients
from torch import nn
from torch.nn import functional as F

import gainstage as gs


class PooledParts(nn.Module):
    """A smooth part and a rough one under one maximum; two windows hold every other place, and borders have fewer."""

    def __init__(self):
        super().__init__()
        self.smooth, self.rough = nn.Conv2d(32, 48, 3, padding=1, bias=False), nn.Conv2d(32, 48, 1, bias=False)
        self.last, self.norm = nn.Conv2d(96, 32, 1, bias=False), nn.BatchNorm2d(32)

    def forward(self, x):
        parts = [F.avg_pool2d(self.smooth(x), 3, 1, 1).relu(), self.rough(x).relu()]
        return self.norm(self.last(F.max_pool2d(torch.cat(parts, dim=1), 3, 2)))


def test_parts_under_a_maximum_are_followed_by_themselves():
    shape = (4, 32, 17, 17)
    measured = measured_gradients(PooledParts, shape, 60)
    # What a norm's divisor strays by is known to a few per cent; with the parts as one, half the gradient is missing.
    assert_gradients_agree(predicted_gradients(PooledParts, shape), measured, 0.06)


def test_a_bias_whose_gradient_cancels_but_for_what_the_relu_stops():
    class Biased(PooledParts):
        def __init__(self):
            super().__init__()
            self.rough = nn.Conv2d(32, 48, 1)

    shape = (4, 32, 17, 17)
    mean, error = measured_gradients(Biased, shape, 60)["rough.bias"]
    assert predicted_gradients(Biased, shape, draws=1)["rough.bias"] == pytest.approx(mean, abs=0.15 * mean + 2 * error)


class LargestPoint(nn.Module):
    """Features of a set of points, of which the largest goes on."""

    def __init__(self, largest):
        super().__init__()
        self.point, self.whole = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)
        self.largest = largest

    def forward(self, x):
        return self.whole(self.largest(self.point(x)).relu())


LARGEST = {
    "amax": lambda h: h.amax(1),
    "max": lambda h: h.max(1)[0],
    "adaptive pool": lambda h: F.adaptive_max_pool1d(h.transpose(1, 2), 1)[..., 0],
    "adaptive pool over parts": lambda h: F.adaptive_max_pool1d(h.transpose(1, 2), 3).transpose(1, 2),
    "pool with places": lambda h: F.max_pool1d(h.transpose(1, 2), 4, return_indices=True)[0].transpose(1, 2),
}


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_of_a_set_gets_the_gradient(name):
    shape = (16, 20, 32)
    build = partial(LargestPoint, LARGEST[name])
    trace = gs.inspect(build(), (torch.randn(shape),), loss=lambda y: y.square().mean())
    assert trace.sampled == trace.sampled_backward == ()
    assert_gradients_agree(predicted_gradients(build, shape), measured_gradients(build, shape, 60), 0.06)


class PooledEverywhere(nn.Module):
    """A maximum around every place, and their average: all windows that have an entry as their largest send it the same."""

    def __init__(self, stride):
        super().__init__()
        self.conv, self.stride = nn.Conv2d(16, 16, 1, bias=False), stride

    def forward(self, x):
        return F.max_pool2d(self.conv(x), 3, self.stride, 1).mean((2, 3))


@pytest.mark.parametrize("stride", [1, 2])
def test_windows_that_share_their_largest_entry_add_up(stride):
    """Were their gradients independent, a third would be left at stride 1 and three quarters at stride 2."""
    found = []
    for seed in range(60):
        torch.manual_seed(seed)
        model, outputs = PooledEverywhere(stride), []
        model.conv.register_forward_hook(lambda _module, _args, y, outputs=outputs: (y.retain_grad(), outputs.append(y))[1])
        y = model(torch.randn(4, 16, 12, 12))
        y.backward(torch.randn_like(y))
        found.append(float(outputs[0].grad.square().mean()))
    measured = sum(found) / len(found)
    torch.manual_seed(0)
    trace = gs.inspect(PooledEverywhere(stride), (torch.randn(4, 16, 12, 12),))
    predicted = trace.modules["conv"][0].gradient.second_moment
    assert predicted == pytest.approx(measured, rel=0.08)  # at borders the average window is not the product of averages


class PooledBehindNorms(nn.Module):
    """Overlapping windows between two batch norms; those at the far border have fewer entries."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.second, self.norm2, self.head = nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32), nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.first(x))), 3, 2, ceil_mode=True)
        return self.head(F.relu(self.norm2(self.second(x))).mean((2, 3)))


def test_what_overlapping_windows_send_back_has_the_sum_that_they_got():
    """Behind a batch norm that is zero, and nearly all of it passes the ReLU: shifts of the norm in front get next to nothing."""
    shape = (16, 8, 14, 14)
    predicted, measured = predicted_gradients(PooledBehindNorms, shape, draws=3), measured_gradients(PooledBehindNorms, shape, 60)
    shift, scale = predicted.pop("norm1.bias"), predicted["norm1.weight"]
    assert shift < 0.05 * scale  # 77 times as much if pairs within two windows are counted twice
    assert shift == pytest.approx(measured.pop("norm1.bias")[0], rel=0.6)
    assert_gradients_agree(predicted, measured, 0.1)


class PooledAtBorders(nn.Module):
    """A small map, of which most windows lie in part outside: what they hold, they share with the others."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.second, self.norm2, self.head = nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64), nn.Linear(64, 10)
        self.mean = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.first(x))), 3, 1, 1)
        x = self.mean(F.relu(self.norm2(self.second(x))))
        return self.head(x.flatten(1))


def test_windows_that_a_border_cuts_share_most_of_what_they_hold():
    """Of 3 x 3 windows on 3 x 3 places four hold 4 and four hold 6: as if all held 9, half a gradient is missing."""
    shape, levels = (32, 16, 3, 3), []
    for seed in range(40):
        torch.manual_seed(1000 + seed)
        model = PooledAtBorders()
        model.mean.register_forward_hook(lambda _module, _args, y: levels.append(float(y.detach().square().mean())))
        model(torch.randn(shape))
    torch.manual_seed(0)
    trace = gs.inspect(PooledAtBorders(), (torch.randn(shape),))
    assert trace.modules["mean"][0].second_moment == pytest.approx(sum(levels) / len(levels), rel=0.03)
    predicted, measured = (
        found(PooledAtBorders, shape, draws=n) for found, n in ((predicted_gradients, 2), (measured_gradients, 100))
    )
    del measured["norm1.bias"]  # what comes back has no sum
    assert_gradients_agree(predicted, measured, 0.05)
