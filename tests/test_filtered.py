"""Averages of neighbours less what lies in the middle, and sums of such: little is left, and known all the same."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gainstage as gs
from gainstage.signal import affine, combine, filter_dim, independent, neighbours
from gainstage.signal.axes import Axis

SIZE = 7


def averaging(size):
    """Windows of three, fewer at the border."""
    windows = (np.abs(np.subtract.outer(np.arange(size), np.arange(size))) <= 1).astype(float)
    return windows / windows.sum(1, keepdims=True)


def pooled(x):
    return filter_dim(filter_dim(x, 2, averaging(SIZE)), 3, averaging(SIZE))


@pytest.mark.parametrize("mean", [0.0, 0.8])
@pytest.mark.parametrize("smoothed", [0, 3])
def test_what_is_left_of_a_map_less_its_own_average_is_exact(smoothed, mean):
    """Of white noise, averaged a few times before, then moved towards and away from its averages: all is one matrix of places.

    Averages leave a mean as it is, and nothing of it in a difference.
    """
    one = np.kron(averaging(SIZE), averaging(SIZE))
    x, exact = independent((2, 3, SIZE, SIZE), mean, 1.0), np.eye(SIZE**2)
    for _ in range(smoothed):
        x, exact = pooled(x), one @ exact
    for step in (0.7, -0.4):
        moved = combine(torch.sub, pooled(x), x)
        left = (one - np.eye(SIZE**2)) @ exact
        found = np.mean(np.diag(left @ left.T))
        assert moved.second_moment == pytest.approx(found, rel=1e-9)
        assert float(moved.table[1, 1, 0, 0]) == pytest.approx(apart(left), rel=1e-6, abs=1e-9 * found)
        profile = moved.second_moment * np.broadcast_to(moved.levels, moved.shape)[0, 0] ** 2
        np.testing.assert_allclose(profile.ravel(), np.diag(left @ left.T), rtol=1e-6)
        x, exact = combine(torch.add, x, affine(moved, step)), exact + step * left
    assert x.second_moment == pytest.approx(mean**2 + np.mean(np.diag(exact @ exact.T)), rel=1e-9)
    if mean:  # what each place has of the mean over all
        rows = (mean**2 + exact @ exact.T).mean(1)
        np.testing.assert_allclose(np.broadcast_to(x.leaning(), x.shape)[0, 0].ravel(), rows / rows.mean(), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 30])
@pytest.mark.parametrize("reach", [1, 3, 12])
def test_what_picked_places_share_is_read_off_the_distances_between_them(size, reach):
    """``M E M'`` by lag, of rows with one entry (a copy, a permutation) or none (padding)."""
    rng = np.random.default_rng(size)
    picks = np.zeros((18, size))
    picks[np.arange(18), rng.integers(0, size, 18)] = rng.normal(size=18)
    picks[[0, 7]] = 0.0
    excess = np.linspace(1.0, -0.3, min(reach, size))
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    exact = picks @ np.where(distance < len(excess), excess[np.minimum(distance, len(excess) - 1)], 0.0) @ picks.T
    axis = Axis(size)
    lags, (other, same) = neighbours.filtered(neighbours.Neighbours((axis,), excess), axis, picks)
    np.testing.assert_allclose(lags, [np.diagonal(exact, lag).mean() for lag in range(len(lags))], rtol=1e-9, atol=1e-12)
    assert same == pytest.approx(np.trace(exact) / 18, rel=1e-9)
    assert other == pytest.approx((exact.sum() - np.trace(exact)) / (18 * 17), rel=1e-9, abs=1e-12)


def apart(left):
    """Average over pairs of places in other rows and other columns."""
    pairs = (left @ left.T).reshape(SIZE, SIZE, SIZE, SIZE)
    other = 1.0 - np.eye(SIZE)
    return float(np.einsum("ijkl,ik,jl->", pairs, other, other)) / other.sum() ** 2


class Pooling(nn.Module):
    """A stream that blocks move away from the averages of its neighbours, each behind a norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.GroupNorm(1, 32)

    def forward(self, x):
        x = F.avg_pool2d(self.stem(x), 3, 1, 1, count_include_pad=False)
        outputs = []
        for _ in range(3):
            y = self.norm(x)
            outputs.append(F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y)
            x = x + 0.5 * outputs[-1]
        return (*outputs, x)


def test_blocks_that_average_neighbours():
    torch.manual_seed(0)
    model, x = Pooling(), torch.randn(4, 3, 14, 14)
    trace = gs.inspect(model, (x,))
    predicted = [signal.second_moment for signal in trace.calls[-1].outputs]
    found = []
    with torch.no_grad():
        for _ in range(60):
            model.stem.reset_parameters()
            found.append([float(y.square().mean()) for y in model(torch.randn_like(x))])
    assert predicted == pytest.approx(np.mean(found, axis=0), rel=0.05)  # of 60 draws, 1 %; the border of the stem


class Smoothed(nn.Module):
    """Behind a ReLU a map has a mean; a pool moves it towards its neighbours, and batch norm takes away what all places share."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.mix, self.second = nn.Conv2d(48, 64, 1, bias=False), nn.BatchNorm2d(64)

    def forward(self, x):
        x = torch.relu(self.first(self.stem(x)))
        for _ in range(2):
            x = x + 0.8 * (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x)
        y = self.second(self.mix(x))
        return y[:, :, 0], y[:, :, 5:9, 5:9], F.avg_pool2d(y, 2)


def test_borders_of_a_smoothed_map_behind_a_batch_norm():
    """Averages over fewer places are louder, but what all places have in common is less there, and goes."""
    torch.manual_seed(0)
    model, x = Smoothed().train(), torch.randn(4, 3, 14, 14)
    predicted = [signal.second_moment for signal in gs.inspect(model, (x,)).calls[-1].outputs]
    found = []
    with torch.no_grad():
        for _ in range(60):
            model.stem.reset_parameters()
            model.mix.reset_parameters()
            found.append([float(y.square().mean()) for y in model(torch.randn_like(x))])
    assert predicted == pytest.approx(np.mean(found, axis=0), rel=0.06)  # of 60 draws, 2 %
