"""Maxima of correlated places, against draws: near places, borders, and which place it is that gets the gradient."""

import numpy as np
import pytest
import torch
from gradients import assert_gradients_agree, measured_gradients, predicted_gradients
from torch import nn
from torch.nn import functional as F

import gainstage as gs
from gainstage.signal.patches import of_field
from gainstage.signal.quadrature import nodes

WINDOWS = np.array([[-1, 0, 1], *([i - 1, i, i + 1] for i in range(1, 9)), [8, 9, -1]])


def smooth(shape):
    """White noise under a sliding average, which is Gaussian."""
    return lambda x: F.avg_pool2d(x, shape, 1) * shape


@pytest.mark.parametrize(("kernel", "window", "stride", "padding"), [(2, 3, 1, 0), (3, 3, 2, 0), (3, 2, 2, 0), (5, 3, 2, 1)])
def test_pools_of_smooth_maps(kernel, window, stride, padding):
    """Level of the maxima, and of averages over 3 x 3 of them, which near ones rule."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.mean = nn.MaxPool2d(window, stride, padding), nn.AvgPool2d(3, 1)

        def forward(self, x):
            return self.mean(self.pool(smooth(kernel)(x)))

    model = Pooled()
    x = torch.randn(400, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    trace = gs.inspect(model, (torch.randn(32, 8, 16, 16),), gradients=False)
    pooled = model.pool(smooth(kernel)(x)).double()
    averages = model.mean(pooled)
    assert trace.modules["pool"][0].second_moment == pytest.approx(float(pooled.square().mean()), rel=0.015)
    assert trace.modules["pool"][0].mean == pytest.approx(float(pooled.mean()), rel=0.015)
    if padding == 0:  # else borders differ from the rest by their means
        assert trace.modules["mean"][0].variance == pytest.approx(float(averages.var()), rel=0.03)


def test_places_that_are_all_alike_are_one():
    """As correlations go to 1 the largest of a window is any of its entries, and windows side by side are one another."""
    found = of_field([WINDOWS], [np.where(WINDOWS >= 0, 1.0, 0.0)], nodes(), np.full(12, 1.0 - 1e-6), 0.0)
    assert found.mean == pytest.approx(0.0, abs=2e-3)
    assert found.deviation == pytest.approx(1.0, abs=2e-3)
    assert found.correlations == pytest.approx(np.ones(found.correlations.shape), abs=2e-3)


def test_what_is_not_correlated_is_not_drawn():
    assert of_field([WINDOWS], [np.ones(WINDOWS.shape)], nodes(), np.array([1.0, 0.0, 0.0]), 0.0) is None


def test_levels_of_places_scale_the_largest_of_them():
    """Twice as loud everywhere is twice as large; a place that is silent is 0, no less."""
    loud = np.where(WINDOWS >= 0, 2.0, 0.0)
    found = of_field([WINDOWS], [loud], np.maximum(nodes(), 0.0), np.array([1.0, 0.5, 0.2]), 0.0)
    assert found.louder[:, 4] == pytest.approx([2.0, 4.0])
    assert (found.louder[:, 0] < found.louder[:, 4]).all()
    silent = of_field([WINDOWS], [np.zeros(WINDOWS.shape)], np.maximum(nodes(), 0.0), np.array([1.0, 0.5, 0.2]), 0.0)
    assert (silent.louder == 0.0).all()


class LoudMiddle(nn.Module):
    """Padding makes the middle of a small map loud; it is the largest of most windows, and gets the gradient of all of them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.second, self.last = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.Conv2d(64, 16, 1, bias=False)

    def forward(self, x):
        return self.last(F.max_pool2d(self.second(self.first(x)), 3, 1, 1)).mean((2, 3))


def test_loud_places_are_the_largest_more_often():
    """Taken to be as often the largest as any other, the middle sends a tenth less to the first weights."""
    shape = (16, 16, 3, 3)
    assert_gradients_agree(predicted_gradients(LoudMiddle, shape), measured_gradients(LoudMiddle, shape, 100), 0.04)
