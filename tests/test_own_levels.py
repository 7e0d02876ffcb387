"""Tensors times functions of the mean square of their own entries: channels that respond more than others."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gainstage as gs

SAMPLES, PLACES, CHANNELS = 4, 9, 512


class Response(nn.Module):
    """Channels over places that have something in common, times their norms over these, relative to those of other channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(128, CHANNELS, bias=False), nn.Linear(CHANNELS, 64, bias=False)

    def forward(self, x, common):
        y = F.gelu(self.first(x + common))
        norms = y.norm(p=2, dim=1, keepdim=True)
        scaled = y * (norms / (norms.mean(-1, keepdim=True) + 1e-6))
        return scaled, self.second(y + scaled), y / norms


def test_loud_channels_times_their_norms_become_louder():
    torch.manual_seed(0)
    model, found = Response(), []

    def inputs():
        return torch.randn(SAMPLES, PLACES, 128), torch.randn(SAMPLES, 1, 128)

    predicted = [signal.second_moment for signal in gs.inspect(model, inputs()).calls[-1].outputs]
    with torch.no_grad():
        for _ in range(60):
            for layer in (model.first, model.second):
                layer.reset_parameters()
            found.append([float(y.square().mean()) for y in model(*inputs())])
    assert predicted == pytest.approx(np.mean(found, axis=0), rel=0.06)  # of 60 draws, 1.3 %
