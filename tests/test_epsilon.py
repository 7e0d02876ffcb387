"""A norm next to its epsilon: quiet channels are cut down more than loud ones, and what a level strays by is left in part."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs

DRAWS = 300
NORMAL_EPS = 0.05


def inverted(channels: int = 64) -> nn.Sequential:
    """A kernel of nine taps for each channel, whose variances differ, between two batch norms."""
    return nn.Sequential(
        nn.Conv2d(16, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.BatchNorm2d(channels, eps=NORMAL_EPS),
        nn.Hardswish(),
    )  # fmt: skip


def grouped() -> nn.Sequential:
    """Few channels to a group, and a group norm over them and all places."""
    return nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.GroupNorm(16, 32, eps=2.0 * NORMAL_EPS), nn.ReLU())


def draw(model: nn.Sequential, *, exact: bool) -> None:
    """Normal weights; ``exact``: with the mean square that they have on average, which is all that is read of them."""
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            std = 0.1 if layer.groups == 1 else 0.15
            with torch.no_grad():
                values = torch.randn_like(layer.weight)
                layer.weight.copy_(std * ((values - values.mean()) / values.std(unbiased=False) if exact else values))


@pytest.mark.parametrize("build", [inverted, grouped])
def test_levels_and_spreads_behind_a_norm_that_divides_by_little(build):
    torch.manual_seed(0)
    model = build()
    shape = (2, model[0].in_channels, 16, 16)
    draw(model, exact=True)
    predicted = {c.path: c.outputs[0] for c in gs.inspect(model, (torch.randn(shape),), gradients=False).calls if c.path}
    found: dict[str, list[float]] = {name: [] for name in predicted}
    with torch.no_grad():
        for _ in range(DRAWS):
            draw(model, exact=False)
            x = torch.randn(shape)
            for name, layer in model.named_children():
                x = layer(x)
                found[name].append(float(x.double().square().mean()))
    norms = [name for name, layer in model.named_children() if getattr(layer, "eps", 0.0) >= NORMAL_EPS]
    for name in [*norms, str(len(model) - 1)]:
        levels = np.array(found[name])
        error = levels.std(ddof=1) / levels.mean() / DRAWS**0.5
        assert abs(math.log(predicted[name].second_moment / levels.mean())) < 4.0 * error + 0.005, name  # squares are near gamma
        spread = float(np.log(levels).std(ddof=1))
        assert abs(math.log(predicted[name].spread / spread)) < 4.0 / math.sqrt(2.0 * DRAWS) + 0.1, name
