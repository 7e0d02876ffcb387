"""Samples that a coin changed: of two, one of which lost a branch, batch norm leaves one louder; labels that are dropped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs

DRAWS = 300
WIDTH, SIZE = 24, 8


class Block(nn.Module):
    """A branch that a coin drops for a whole sample, and what pools and activations in it put out."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(WIDTH, 96, 1, bias=False), nn.Conv2d(96, WIDTH, 1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(96), nn.BatchNorm2d(WIDTH)
        self.function, self.pool, self.drop = nn.SiLU(), nn.AdaptiveAvgPool2d(1), drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.function(self.norm(self.enter(x)))
        y = self.last(self.leave(y + 0.1 * self.pool(y)))
        return x + y * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(1.0 - self.drop) / (1.0 - self.drop)


def build(drop: float) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), *[Block(drop) for _ in range(3)])


@pytest.mark.parametrize(("samples", "drop"), [(2, 0.2), (4, 0.25)])
def test_levels_of_samples_are_averaged_over(samples, drop):
    torch.manual_seed(0)
    shape = (samples, 3, SIZE, SIZE)
    predicted = {c.path: c.outputs[0] for c in gs.inspect(build(drop), (torch.randn(shape),), gradients=False).calls}
    found: dict[str, list[float]] = {}

    def note(name: str, output: torch.Tensor) -> None:
        found.setdefault(name, []).append(float(output.square().mean()))

    with torch.no_grad():
        for _ in range(DRAWS):
            model = build(drop)
            for name, module in model.named_modules():
                module.register_forward_hook(lambda _m, _i, y, name=name: note(name, y))
            model(torch.randn(shape))
    for name in ("3.function", "4.function", "3.pool", "4.pool"):
        levels = np.array(found[name])
        error = float(levels.std(ddof=1) / levels.mean()) / DRAWS**0.5
        assert abs(math.log(predicted[name].second_moment / levels.mean())) < 4.0 * error + 0.01, name  # to second order
        if name.endswith("pool"):
            spread = float(np.log(levels).std(ddof=1))
            assert abs(math.log(predicted[name].spread / spread)) < 4.0 / math.sqrt(2.0 * DRAWS) + 0.1, name


def test_samples_of_one_level_are_left_alone():
    torch.manual_seed(0)
    x = torch.randn(2, 3, SIZE, SIZE)
    even, dropped = (gs.inspect(build(drop), (x,), gradients=False).calls for drop in (0.0, 0.3))
    pools = [next(c.outputs[0] for c in calls if c.path == "4.pool") for calls in (even, dropped)]
    assert pools[1].spread > 3.0 * pools[0].spread


class Labelled(nn.Module):
    """Rows of labels, half of which a coin replaces by the label of nothing, as guidance without a classifier asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 64), nn.Linear(64, 64)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        dropped = torch.rand(len(labels)) < 0.5
        return self.out(self.table(torch.where(dropped, 10, labels)))


def test_labels_that_a_coin_drops_can_be_looked_up():
    """No mixture of two labels is a row; of equal rows, the fan-in of a look-up being 1, any draw of the coins has the level."""
    torch.manual_seed(0)
    model, labels = Labelled(), torch.arange(8)
    plan = gs.plan(model, (labels,))
    found = []
    for seed in range(DRAWS):
        gs.apply(model, plan, seed=seed)
        found.append(float(model(labels).detach().square().mean()))
    predicted = gs.verify(model, (labels,), plan=plan).rows[-1].predicted
    assert abs(np.mean(found) / predicted - 1.0) < 3.0 * np.std(found) / DRAWS**0.5 / predicted
