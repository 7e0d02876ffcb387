"""The sweeps over width and depth: networks that are trained side by side learn as each does by itself."""

import math

import numpy as np
import pytest
import torch
from benchmarks.situations.drift import GRID, Residual, Together, lowest
from torch import nn


def test_networks_side_by_side_learn_as_by_themselves():
    torch.manual_seed(0)
    models, rates = [Residual(8, 1), Residual(8, 1)], (3e-2, 1e-3)
    x, y = torch.randn(2, 1, 16, 64).expand(2, 5, 16, 64), torch.randint(0, 10, (2, 1, 16)).expand(2, 5, 16)
    for model in models:
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    together = Together(models, [{name: rate for name, _ in models[0].named_parameters()} for rate in rates])
    found = torch.stack([together.step(x[:, step], y[:, step]) for step in range(5)], 1)
    for copy, (model, rate) in enumerate(zip(models, rates, strict=True)):
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for step in range(5):
            loss = torch.nn.functional.cross_entropy(model(x[copy, step]), y[copy, step])
            known = min(loss.item(), math.log(10.0))  # that of guessing is the most that counts
            assert float(found[copy, step]) == pytest.approx(known, rel=1e-4)  # single precision, summed in another order
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert float(found[:, -1].max()) < math.log(10.0) - 0.01  # they do learn these rows


def test_the_lowest_point_of_a_valley():
    octaves = np.log2(GRID)
    assert lowest(0.2 * (octaves + 3.3) ** 2 - 1.0) == pytest.approx(-3.3)
    assert lowest(np.minimum(0.2 * (octaves + 3.3) ** 2, 1.5)) == pytest.approx(-3.3)  # what is far off does not count
