"""Small modules on maps in which each parameter has a known role."""

from __future__ import annotations

import torch
from role_models import W
from torch import nn
from torch.nn import functional as F


def conv(cin=W, cout=W, size=3, **options):
    return nn.Conv2d(cin, cout, size, padding=size // 2, bias=False, **options)


class ResidualBlock(nn.Module):
    def __init__(self, *, downsample=False):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(W), conv(), nn.BatchNorm2d(W)
        self.shortcut = nn.Sequential(nn.AvgPool2d(1), conv(size=1), nn.BatchNorm2d(W)) if downsample else nn.Identity()

    def forward(self, x):
        h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(h + self.shortcut(x))


class LayerScaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise, self.norm = conv(groups=W), nn.GroupNorm(1, W)
        self.wide, self.narrow = nn.Linear(W, 2 * W), nn.Linear(2 * W, W)
        self.gamma = nn.Parameter(torch.full((W, 1, 1), 1e-6))

    def forward(self, x):
        h = self.norm(self.depthwise(x)).permute(0, 2, 3, 1)
        return x + self.gamma * self.narrow(F.gelu(self.wide(h))).permute(0, 3, 1, 2)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = conv(), conv(2 * W)

    def forward(self, x):
        x = torch.cat((x, self.one(x)), 1)
        return torch.cat((x, self.two(torch.relu(x))), 1)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.three, self.five, self.last = conv(size=1), conv(), conv(size=5), conv(3 * W + W)

    def forward(self, x):
        pooled = F.max_pool2d(x, 3, 1, 1)
        return self.last(torch.cat((self.one(x).relu(), self.three(x).relu(), self.five(x).relu(), pooled), 1))


class Siblings(nn.Module):
    """ResNeXt written out: one stream, and one branch that is a sum of four."""

    def __init__(self):
        super().__init__()
        self.paths = nn.ModuleList(nn.Sequential(conv(W, 2), nn.ReLU(), conv(2, W)) for _ in range(3))
        self.head = conv()

    def forward(self, x):
        return self.head(sum(path(x) for path in self.paths[1:]) + self.paths[0](x))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep = conv(), nn.Conv2d(W, W, 2, stride=2)
        self.up, self.last = nn.ConvTranspose2d(W, 2 * W, 2, stride=2), conv(3 * W)

    def forward(self, x):
        skip = self.down(x).relu()
        return self.last(torch.cat((self.up(self.deep(skip).relu()), skip), 1))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.reduce, self.expand, self.last = conv(), conv(W, 2, 1), conv(2, W, 1), conv()

    def forward(self, x):
        h = self.conv(x)
        h = h * torch.sigmoid(h)
        gate = self.expand(self.reduce(h.mean((2, 3), keepdim=True)).relu())
        return self.last(h * F.hardsigmoid(gate))


class StandardisedConv(nn.Module):
    """Weight standardisation with a gain, as in normaliser-free networks."""

    def __init__(self):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(W, W, 3, 3)), nn.Parameter(torch.ones(W, 1, 1, 1))

    def forward(self, x):
        flat = self.weight.reshape(1, W, -1)
        weight = F.batch_norm(flat, None, None, (self.gain * 0.1).view(-1), training=True).reshape_as(self.weight)
        return x + 0.2 * F.conv2d(x.relu(), weight, padding=1)
