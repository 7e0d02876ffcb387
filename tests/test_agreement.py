"""Two tensors made of one are alike at the same pairs of places, so that sums of their products are more than terms of chance."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs

PLACES, CHANNELS, READ = 96, 24, 16
DRAWS = 96


class Additive(nn.Module):
    """Additive attention as Swiftformer has it: ``sum over n of (w . q_n) q_n``, queries divided by their norms or not."""

    def __init__(self, *, normalised):
        super().__init__()
        self.query = nn.Linear(READ, CHANNELS)
        self.weight = nn.Parameter(torch.randn(CHANNELS, 1))
        self.normalised = normalised

    def forward(self, x):
        q = self.query(x)
        if self.normalised:
            q = nn.functional.normalize(q, dim=-1)
        return ((q @ self.weight) * q).sum(1)


class Linear(nn.Module):
    """Keys times values, summed over places by a product of entries."""

    def __init__(self):
        super().__init__()
        self.keys, self.values = nn.Linear(READ, 8), nn.Linear(READ, 8)

    def forward(self, x):
        return (self.keys(x)[..., :, None] * self.values(x)[..., None, :]).sum(1)


@pytest.mark.parametrize(
    "build",
    [lambda: Additive(normalised=False), lambda: Additive(normalised=True), Linear],
    ids=["additive", "additive, normalised", "keys times values"],
)
def test_sums_of_products_of_what_one_tensor_made(build):
    torch.manual_seed(0)
    model = build()
    plan = gs.plan(model, (torch.randn(4, PLACES, READ),))
    (predicted,) = plan.predictions["@0"]
    found = []
    with torch.no_grad():
        for seed in range(DRAWS):
            gs.apply(model, plan, seed=seed)
            found.append(float(model(torch.randn(4, PLACES, READ)).square().mean()))
    error = float(np.std(found)) / np.mean(found) / DRAWS**0.5
    assert abs(math.log(predicted / np.mean(found))) < 0.08 + 3 * error
    assert error < 0.06
