"""Situation 7: realised over requested relative updates of the first step; how far the best one drifts is in drift.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.situations.drift import sweeps
from benchmarks.situations.models import Subject, each, from_timm, from_torch, from_torchvision, from_transformers
from benchmarks.situations.rows import DRAWS, Measurement, Row, row_over
from benchmarks.zoo.reference import Example
from torch import nn

import gainstage as gs
from gainstage.graph import tensor_leaves
from gainstage.optim.first import ROUNDING

REQUEST = 1e-3
LEAST = 4096  # entries: the rms of one draw is then known to about 1 %, and 8 draws to half a percent
OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}


def _encoder() -> Example:
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10))
    return Example(model, (torch.randn(32, 24, 64),))


SUBJECTS = (
    from_torch("TransformerEncoder", _encoder),
    from_torchvision("resnet18", size=64, batch=16),
    from_timm("vit_tiny_patch16_224", "vit_tiny, 4 blocks", depth=4, img_size=64, size=64, batch=8),
    from_transformers("gpt2", n_layer=2, n_head=4, n_embd=128, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
)


def measurements() -> list[Measurement]:
    """First steps of each optimizer on each model; then the sweeps."""
    return [*each(SUBJECTS, rows_of), *sweeps()]


def rows_of(subject: Subject) -> Iterator[Row]:
    """Over all parameters with LEAST entries or more that the plan draws, mean over draws."""
    first = subject.draw(0)
    plan = gs.plan(first.model, first.args, first.kwargs)
    for optimizer in OPTIMIZERS:
        found = [realised(subject.draw(seed), plan, seed, optimizer) for seed in range(DRAWS)]
        means = [float(np.mean([draw[name] for draw in found])) / REQUEST for name in found[0]]
        yield row_over(
            means, situation="rates", package=subject.package, model=subject.name, quantity=f"{optimizer}, realised over asked",
            asked=(0.98, 1.02),
        )  # fmt: skip


def realised(example: Example, plan: gs.Plan, seed: int, optimizer: str) -> dict[str, float]:
    """Rms of the first update over that of the weights before it; sign optimizers over entries that the gradient reaches."""
    model = example.model
    gs.apply(model, plan, seed=seed)
    result = model(*example.args, **(example.kwargs or {}))
    logits = tensor_leaves(result)[0]
    F.cross_entropy(logits.flatten(0, -2), torch.randint(0, logits.shape[-1], (logits[..., 0].numel(),))).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    groups = gs.param_groups(model, plan, relative_update=REQUEST, optimizer=optimizer, gradients=gradients)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    OPTIMIZERS[optimizer](groups).step()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.numel() >= LEAST and plan.parameters[name].distribution.std > 0.0 and name in gradients:
            update = (parameter.detach() - before[name]).double()
            sizes = gradients[name].abs()
            whole = optimizer in ("sgd", "radam", "adafactor")
            moved = update if whole else update[sizes > ROUNDING * sizes.max()]
            found[name] = float(moved.square().mean().sqrt() / before[name].double().square().mean().sqrt())
    return found
