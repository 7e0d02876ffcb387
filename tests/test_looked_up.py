"""Biases of positions that a small network makes of known coordinates, against draws of the real layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs

SIDE = 6


class Bias(nn.Module):
    """Of each pair of places in a window, by their distance along both sides; a sigmoid bounds it."""

    def __init__(self, *, bounded: bool) -> None:
        super().__init__()
        self.bounded = bounded
        self.hidden, self.heads = nn.Linear(2, 64), nn.Linear(64, 8, bias=False)
        along = torch.arange(1 - SIDE, SIDE, dtype=torch.float32) / (SIDE - 1)
        self.register_buffer("table", torch.stack(torch.meshgrid(along, along, indexing="ij"), dim=-1)[None])
        places = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None, :] + SIDE - 1
        self.register_buffer("index", (2 * SIDE - 1) * apart[0] + apart[1])
        for layer, std in ((self.hidden, 2.0), (self.heads, 64**-0.5)):
            nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(self.hidden.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.heads(torch.relu(self.hidden(self.table))).view(-1, 8)
        bias = rows[self.index.view(-1)].view(SIDE**2, SIDE**2, 8).permute(2, 0, 1)
        return x + (16.0 * torch.sigmoid(bias) if self.bounded else bias)


@pytest.mark.parametrize("bounded", [True, False])
def test_keys_of_one_query_share_what_their_coordinates_do(bounded):
    """The variance over the keys of a query, by 200 draws; of any two rows of the table it was predicted 2.5 times too large.

    A fifth for the lengths of coordinates, which a sigmoid behind the look-up takes to be alike; else a twentieth, for width.
    """
    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(float(Bias(bounded=bounded)(torch.zeros(1)).double().var(-1).mean()))
    predicted = []
    for seed in range(8):
        torch.manual_seed(seed)
        signal = gs.inspect(Bias(bounded=bounded), (torch.zeros(1),), gradients=False).calls[-1].outputs[0]
        predicted.append(signal.second_moment * (1.0 - signal.cosine(2)))
    error = np.std(found) / len(found) ** 0.5
    assert np.mean(predicted) == pytest.approx(np.mean(found), abs=(0.2 if bounded else 0.05) * np.mean(found) + 3.0 * error)


class Window(nn.Module):
    """Attention in a window, with such a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.bias = nn.Linear(32, 64), nn.Linear(32, 64), Bias(bounded=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = (layer(x).unflatten(-1, (8, 8)).transpose(1, 2) for layer in (self.query, self.key))
        return self.bias(query @ key.mT / 8**0.5).softmax(-1)


def test_a_query_sees_one_draw_of_a_smooth_bias():
    """Entropy and second moment of the weights over 100 draws; of independent keys the weights were predicted half as loud again.

    A tenth for the lengths of coordinates, as above: what a sigmoid makes of them is loud where they are long.
    """
    x = torch.randn(4, SIDE**2, 32, generator=torch.Generator().manual_seed(0))
    entropies, squares = [], []
    for seed in range(100):
        torch.manual_seed(seed)
        with torch.no_grad():
            weights = Window()(x).double()
        entropies.append(float(torch.special.entr(weights).sum(-1).mean()) / np.log(SIDE**2))
        squares.append(float(weights.square().mean()))
    trace = gs.inspect(Window(), (x,), gradients=False)
    assert trace.attention[0].entropy == pytest.approx(np.mean(entropies), rel=0.03)
    assert trace.calls[-1].outputs[0].second_moment == pytest.approx(np.mean(squares), rel=0.1)
