"""The architecture of the demonstration: deep, convolutional, and without normalization."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

CHANNELS = (24, 48, 64)
CONVOLUTIONS = 5  # for each stage
HIDDEN = 64
CLASSES = 10


class Stage(nn.Module):
    """Convolutions of 3 x 3, each followed by GELU, and a pool that halves the map."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        sizes = [channels_in, *[channels] * CONVOLUTIONS]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] -> [B, channels, H/2, W/2]."""
        for conv in self.convs:
            x = F.gelu(conv(x))
        return F.max_pool2d(x, 2)


class DeepConvNet(nn.Module):
    """The layout of VGG (Simonyan & Zisserman 2015) for images of 8 x 8: 15 convolutions and 3 linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(a, b) for a, b in zip((1, *CHANNELS), CHANNELS, strict=False))
        self.hidden = nn.ModuleList([nn.Linear(CHANNELS[-1], HIDDEN), nn.Linear(HIDDEN, HIDDEN)])
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 1, 8, 8] -> logits [B, 10]."""
        for stage in self.stages:
            x = stage(x)
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.gelu(layer(x))
        logits: torch.Tensor = self.head(x)
        return logits
