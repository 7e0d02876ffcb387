"""Quotients: linear attention that is normalised, values beside a column of ones, cut apart again; and means by known counts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gainstage as gs

WIDTH, LENGTH, DRAWS = 64, 36, 48


class LinearAttention(nn.Module):
    """As EfficientViT has it (Cai et al. 2023, arXiv:2205.14756)."""

    def __init__(self, *, width, padded):
        super().__init__()
        self.width, self.padded = width, padded
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = F.relu(q), F.relu(k)
        if self.padded:
            sums = q @ (k.mT @ F.pad(v, (0, 1), value=1.0))
            attended = sums[..., :-1] / (sums[..., -1:] + 1e-6)
        else:
            attended = (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)
        return self.out(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("width", [16, 32])
def test_normalised_linear_attention(width, padded):
    torch.manual_seed(0)
    model = LinearAttention(width=width, padded=padded)
    plan = gs.plan(model, (torch.randn(4, LENGTH, WIDTH),))
    (predicted,) = plan.predictions["@0"]
    found = []
    with torch.no_grad():
        for seed in range(DRAWS):
            gs.apply(model, plan, seed=seed)
            found.append(float(model(torch.randn(4, LENGTH, WIDTH)).square().mean()))
    error = float(np.std(found)) / np.mean(found) / DRAWS**0.5
    assert error < 0.05
    first_order = 3.0 / width
    assert abs(math.log(predicted / np.mean(found))) < first_order + 3 * error, (predicted, np.mean(found))


@pytest.mark.parametrize("repeated", [False, True])
def test_a_sum_is_divided_by_its_own_count(repeated):
    """Means of k terms have 1/k of the second moment, however wide the counts are written; sums and counts apart had 1.59."""
    counts = torch.tensor([1, 1, 2, 3, 9, 8] * 8)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("node", torch.arange(len(counts)).repeat_interleave(counts))
            self.register_buffer("count", counts[:, None].float().repeat(1, 16 if repeated else 1))

        def forward(self, x):
            return torch.zeros(len(counts), 16).index_add_(0, self.node, x) / self.count

    found = gs.inspect(Mean(), (torch.randn(int(counts.sum()), 16, generator=torch.Generator().manual_seed(0)),)).modules[""][0]
    assert abs(found.second_moment / float((1 / counts).mean()) - 1.0) < 1e-6
