"""Gradients through what moves entries, writes them, or leaves some without any: prediction against draws."""

from functools import cache

import pytest
import torch
from gradients import assert_gradients_agree, measured_gradients, predicted_gradients
from torch import nn
from torch.nn import functional as F

import gainstage as gs
from gainstage.propagate.backward import unit_gradient
from gainstage.rules import Call, rule_of
from gainstage.rules.backward import BackwardCall, backward_rules
from gainstage.signal import Value, independent

WIDTH = 96
tokens, image = (4, 12, WIDTH), (8, 32, 10, 10)


class Upsampled(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.first, self.second, self.mode = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1), mode

    def forward(self, x):
        return self.second(F.interpolate(self.first(x), size=(15, 15), mode=self.mode))


class Picked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("order", torch.tensor([3, 3, 0, 11, 7, 3]))

    def forward(self, x):
        x = self.first(x)[:, self.order].roll(2, dims=1)
        return self.second(F.normalize(x, dim=-1))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.down(torch.lerp(F.glu(self.up(x)), x, 0.3)).tril()


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(self.first(x).relu()).cumsum(1)


class Written(nn.Module):
    """Halves that are written into one tensor, and a token that is replaced."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.token = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = x.new_empty(x.shape)
        y[..., :48] = self.first(x).relu()
        y[..., 48:] = self.second(x)
        y[:, 0] = 2.0 * self.token(x[:, 1])
        return self.out(y)


class Padded(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.first, self.second, self.mode = nn.Conv1d(16, 64, 1), nn.Conv1d(64, 64, 5), mode

    def forward(self, x):
        return self.second(F.pad(self.first(x), (3, 2), mode=self.mode))


MORE = {
    "written in place": (Written, tokens, 0.05),
    "running": (Running, tokens, 0.05),
    "nearest": (lambda: Upsampled("nearest"), image, 0.05),
    "bilinear": (lambda: Upsampled("bilinear"), image, 0.05),
    "picked": (Picked, tokens, 0.06),
    "gated linear unit": (Gated, tokens, 0.05),
}


PADDED = (8, 16, 24)


@cache
def padded_gradients(mode):
    return measured_gradients(lambda: Padded(mode), PADDED, 40)


@pytest.mark.parametrize("long", [512, 0])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_gradients_through_padding_that_repeats_entries(mode, long, monkeypatch):
    """By a matrix, and, as in long lines, with an equal share of the margin for all entries."""
    monkeypatch.setattr("gainstage.rules.backward.shapes.LONG", long)
    torch.manual_seed(0)
    assert not gs.inspect(Padded(mode), (torch.randn(PADDED),)).sampled_backward
    predicted = predicted_gradients(lambda: Padded(mode), PADDED, draws=10)  # 1,024 weights stray by 3 %, the mean of ten by 1 %
    assert_gradients_agree(predicted, padded_gradients(mode), 0.05)


@pytest.mark.parametrize("case", MORE)
def test_gradients_through_moves(case):
    build, shape, tolerance = MORE[case]
    assert_gradients_agree(predicted_gradients(build, shape), measured_gradients(build, shape, 40), tolerance)


def test_noise_that_is_drawn_beside_a_branch_takes_no_gradient():
    """Stochastic depth of torchvision and timm: ``x * empty_like(x).bernoulli_(q) / q``."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            y = self.inner(x)
            return self.last(x + y * y.new_empty(len(y), 1).bernoulli_(0.5).div_(0.5))

    trace = gs.inspect(Noisy(), (torch.randn(8, 16),))
    (inner,) = trace.modules["inner"]
    (last,) = trace.modules["last"]
    assert inner.gradient.second_moment == pytest.approx(2 * 4 / 48 * last.gradient.second_moment, rel=0.35)  # U(-1/4, 1/4)


ASKED = {
    "mul": (torch.ops.aten.mul.Tensor, [(8, 32), (8, 32)]),
    "div": (torch.ops.aten.div.Tensor, [(8, 32), (8, 32)]),
    "linear": (torch.ops.aten.linear.default, [(8, 32), (16, 32), (16,)]),
    "conv2d": (torch.ops.aten.conv2d.default, [(2, 4, 8, 8), (6, 4, 3, 3), (6,)]),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_gradient_that_is_not_asked_for_is_left_out_and_changes_no_other(name):
    op, shapes = ASKED[name]
    operands = [independent(shape, 1.0, 0.5) for shape in shapes]
    output = rule_of(op)(Call(op, (op(*(torch.zeros(shape) for shape in shapes)).shape,)), *operands)
    g = unit_gradient(output)
    every, one = (backward_rules()[op](BackwardCall(op, output, wanted), g, *operands) for wanted in (None, frozenset({0})))
    assert all(isinstance(gradient, Value) for gradient in every)
    assert not any(one[1:])
    assert (one[0].table == every[0].table).all()


class PoolLessIdentity(nn.Module):
    """What a pool adds to a stream that a kernel reads at every second place, all of them alike."""

    def __init__(self):
        super().__init__()
        self.norm, self.pool = nn.GroupNorm(1, 8), nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.conv = nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x):
        y = self.norm(x)
        return self.conv(x + self.pool(y) - y).mean((2, 3))


def test_a_pool_less_its_input_has_no_gradient_for_a_shift():
    """Averages sum to 1, so that the sum of ``P'g - g`` is zero wherever g is loud; else it is as large as for the scale."""
    torch.manual_seed(0)
    parameters = gs.inspect(PoolLessIdentity(), (torch.randn(2, 8, 12, 12),)).parameters
    shift, scale = (parameters[f"norm.{name}"].gradient_second_moment for name in ("bias", "weight"))
    assert shift <= 1e-9 * scale
