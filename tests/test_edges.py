"""Strides read the border of a map, where all samples have something in common, more often than other places."""

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs

DRAWS = 40


def strided():
    layers = [
        nn.Conv2d(8, 64, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    for _ in range(3):
        layers += [nn.Conv2d(64, 64, 1, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_what_samples_share_at_a_border_grows_with_strides():
    """Two samples have a cosine of .012, which were predicted to have none."""
    found, shape = [], (4, 8, 64, 64)
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        with torch.no_grad():
            x = strided()(torch.randn(shape)).double()
        level = float(x.square().mean())
        found.append((float(x.sum(0).square().mean()) / len(x) - level) / (len(x) - 1) / level)
    predicted = gs.inspect(strided(), (torch.randn(shape),), gradients=False).calls[-1].outputs[0].cosine(0)
    assert predicted == pytest.approx(np.mean(found), abs=0.003 + 3.0 * np.std(found) / DRAWS**0.5)
