"""Small models that are checked, healthy, and what was found wrong."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import gainstage as gs
from gainstage.capture import capture
from gainstage.graph import fingerprint
from gainstage.plan import Block, Distribution, Family, ParameterPlan, Plan

WIDTH = 48


class Block2(nn.Module):
    """A pre-norm transformer block with attention written out, as models do."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    """Embedding, two blocks, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(97, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.blocks = nn.ModuleList(Block2() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 97, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mlp(depth=4):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 10),
    )  # fmt: skip


def features():
    return (torch.randn(32, WIDTH),)


def images():
    return (torch.randn(16, 3, 12, 12),)


def tokens():
    return (torch.randint(97, (8, 24)),)


MODELS = {"mlp": (mlp, features), "convolutional": (convolutional, images), "language": (Language, tokens)}


def build(name, seed=0):
    torch.manual_seed(seed)
    make, inputs = MODELS[name]
    return make(), inputs()


def plan_for(model, args):
    """A plan made by hand: matrices normal with He's deviation, the fused projection in two blocks, vectors constant."""
    graph = capture(model, args)
    parameters = {}
    for name, info in graph.parameters.items():
        std = 0.1 if "embed" in name else math.sqrt(1.5 / math.prod(info.shape[1:]))
        is_scale = ("norm" in name and name.endswith("weight")) or (len(info.shape) == 1 and name.endswith("weight"))
        drawn = Distribution(family=Family.NORMAL, std=std)
        constant = Distribution(family=Family.CONSTANT, mean=float(is_scale))
        parameters[name] = ParameterPlan(
            name=name,
            aliases=info.aliases,
            shape=info.shape,
            dtype=str(info.dtype).removeprefix("torch."),
            role="hidden",
            distribution=drawn if len(info.shape) > 1 else constant,
            blocks=(Block(0, 0, WIDTH, Distribution(family=Family.UNIFORM, std=0.05)),) if name.endswith("qkv.weight") else (),
        )
    made = {"policy": "by hand", "fingerprint": fingerprint(graph), "training": graph.training}
    probe = copy.deepcopy(model)
    apply(probe, Plan(parameters=parameters, **made), seed=12345)
    calls = [call for call in gs.inspect(probe, args, gradients=False).calls if call.outputs]
    return Plan(
        parameters=parameters,
        predictions={f"{call.path}@{call.call}": tuple(s.second_moment for s in call.outputs) for call in calls},
        spreads={f"{call.path}@{call.call}": tuple(s.spread for s in call.outputs) for call in calls},
        **made,
    )


def apply(model, plan, seed):
    from gainstage.apply import apply as write

    write(model, plan, seed=seed)


def faults(check):
    return [(str(finding.kind), finding.where) for finding in check.findings if finding.kind.is_fault]
