"""Optimizers and small models whose first step is measured."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import gainstage as gs
from gainstage.optim.first import ROUNDING

ROOT = Path(__file__).parents[1]


REQUEST = 1e-2


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:2302.06675."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta_1, beta_2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                update = (beta_1 * average + (1 - beta_1) * p.grad).sign() + group["weight_decay"] * p
                p.sub_(group["lr"] * update)
                average.mul_(beta_2).add_(p.grad, alpha=1 - beta_2)


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "lion": Lion,
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.Muon,
}


def mlp():
    return nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    ), torch.randn(256, 64)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ), torch.randn(32, 3, 16, 16)  # fmt: skip


def transformer():
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Embedding(300, 64), layer, nn.LayerNorm(64), nn.Linear(64, 10)), torch.randint(0, 300, (16, 24))


MODELS = {"mlp": mlp, "convolutional": convolutional, "transformer": transformer}


def labelled_loss(output):
    return F.cross_entropy(output.flatten(0, -2), torch.arange(output[..., 0].numel()) % 10)


def prepared(make, scale=1.0, seed=1):
    """A model drawn from a plan, the plan, and the gradients of one batch."""
    torch.manual_seed(0)
    model, x = make()
    # Orthogonal matrices have the planned root mean square in every draw, so that nothing here is sampling error.
    plan = gs.initialize(model, (x,), seed=seed, distribution="orthogonal")
    (scale * labelled_loss(model(x))).backward()
    return model, x, plan, {name: parameter.grad for name, parameter in model.named_parameters()}


def step(model, groups):
    """Take the step with the optimizers that the groups name; the updates, and who made them."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    made_by = {name: group["optimizer"] for group in groups for name, _ in group["params"]}
    for kind in set(made_by.values()):
        OPTIMIZERS[kind]([group for group in groups if group["optimizer"] == kind]).step()
    return {name: (parameter.detach() - before[name]).double() for name, parameter in model.named_parameters()}, made_by


def rms(tensor):
    return float(tensor.detach().double().square().mean().sqrt())


def planned_size(name, plan):
    """Of these models' parameters, read off the plan by hand: levels for biases that start from zeros."""
    planned = plan.parameters[name]
    mean, std = planned.distribution.mean, planned.distribution.std
    if planned.blocks:
        return math.sqrt(sum(block.distribution.std**2 for block in planned.blocks) / len(planned.blocks))
    if mean or std:
        return math.hypot(mean, std)
    if name.endswith(("in_proj_bias", "out_proj.bias")):  # nn.MultiheadAttention calls no module for these
        return 1.0
    return math.sqrt(plan.predictions[f"{name.removesuffix('.bias')}@0"][0])


def realised(model, plan, groups, gradients):
    """First relative updates: over all entries, or those that the gradient reaches where these move alike."""
    updates, made_by = step(model, groups)
    found = {}
    for name, update in updates.items():
        sizes = gradients[name].abs()
        whole = made_by[name] in {"sgd", "radam", "muon"} or (made_by[name] == "adafactor" and update.dim() > 1)
        found[name] = rms(update if whole else update[sizes > ROUNDING * sizes.max()]) / planned_size(name, plan)
    return found


def assert_as_requested(found, tolerance=0.02):
    wrong = {name: value / REQUEST for name, value in found.items() if abs(value / REQUEST - 1) > tolerance}
    assert not wrong
