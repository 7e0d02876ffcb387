"""Places that are loud in all their channels, where these read few numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.signal.quadrature import gamma_scales

DRAWS, PLACES = 60, 256


def two_layers(numbers: int, activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(numbers, 128), activation(), nn.Linear(128, 128), activation(), nn.Linear(128, 64))


def moments(model: nn.Sequential, x: torch.Tensor) -> list[float]:
    """Mean squares of what the activations put out."""
    found = []
    for layer in model:
        x = layer(x)
        found += [] if isinstance(layer, nn.Linear) else [float(x.square().mean())]
    return found


@pytest.mark.parametrize(
    ("source", "numbers", "activation"),
    [
        (torch.randn, 1, nn.Tanh),
        (torch.randn, 2, nn.Tanh),
        (torch.randn, 8, nn.Tanh),
        (torch.randn, 2, nn.Sigmoid),
        (torch.randn, 3, nn.SiLU),
        (torch.rand, 2, nn.Tanh),
        (torch.rand, 8, nn.Tanh),
        (torch.rand, 3, nn.SiLU),
    ],
)
def test_channels_of_a_place_are_loud_together(source, numbers, activation):
    torch.manual_seed(0)
    model = two_layers(numbers, activation)
    plan = gs.plan(model, (source(8192, numbers),))
    found = []
    for seed in range(DRAWS):
        gs.apply(model, plan, seed=seed)
        with torch.no_grad():
            found.append(moments(model, source(PLACES, numbers)))
    errors = np.std(found, axis=0, ddof=1) / np.mean(found, axis=0) / DRAWS**0.5
    predicted = [plan.predictions[f"{layer}@0"][0] for layer in (1, 3)]
    off = np.abs(np.log(predicted / np.mean(found, axis=0)))
    assert (off < 0.025 + 3.0 * errors).all(), (off, errors)  # levels are taken to be gamma variables


@pytest.mark.parametrize("variance", [0.05, 0.4, 2.0])
def test_points_of_a_gamma_variable_have_its_moments(variance):
    scales, mass = gamma_scales(variance)
    found = [float(mass @ scales ** (2 * power)) for power in range(4)]
    np.testing.assert_allclose(found, [1.0, 1.0, 1.0 + variance, (1.0 + variance) * (1.0 + 2.0 * variance)], rtol=1e-9)


def test_rows_of_one_length_make_gaussian_channels_of_gaussian_numbers():
    """Given its weights a channel of eight normal numbers is normal; only rows of different lengths make levels differ."""
    torch.manual_seed(0)
    x = torch.randn(16 * PLACES, 8)
    x = x / x.square().mean(0).sqrt()

    def level(rows: torch.Tensor) -> float:
        return float(nn.functional.silu(x @ rows.T).square().mean())

    def predicted(layer: nn.Module) -> float:
        calls = gs.inspect(nn.Sequential(layer, nn.SiLU()), (x,), gradients=False).calls
        return next(call.outputs[0].second_moment for call in calls if call.path == "1")

    rows = torch.randn(4096, 8)
    rows = rows / rows.square().sum(1).mean().sqrt()
    free, held = nn.Linear(8, 4096, bias=False), nn.utils.parametrizations.weight_norm(nn.Linear(8, 4096, bias=False))
    with torch.no_grad():
        free.weight.copy_(rows)
        held.weight = rows
        held.parametrizations.weight.original0.fill_(1.0)
    even = rows / rows.norm(dim=1, keepdim=True)
    for layer, found in ((free, level(rows)), (held, level(even))):
        assert abs(np.log(predicted(layer) / found)) < 0.01  # fourth moments of 4096 rows and places
    assert abs(np.log(predicted(held) / 0.3557)) < 2e-3  # E[silu(z)^2] of a normal z
    assert predicted(free) > 1.02 * predicted(held)
