"""Situation 7: realised over requested relative updates of the first step, and how far the best one drifts over width and depth.

The second part trains residual networks on the digits of scikit-learn: for each size the relative update with the least training
loss over the last fifth of the steps, by a parabola through the points of a grid of half octaves near the best one. The drift is
the range of its logarithm over sizes, in octaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
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
STEPS, BATCH, SEEDS = 120, 128, 2
GRID = tuple(2.0 ** (-0.5 * k) for k in range(3, 15))
OCTAVES = 0.5
WIDTHS, DEPTHS = (32, 64, 128, 256), (2, 4, 8, 16)


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
    return [*each(SUBJECTS, rows_of), sweep("width", [(n, 4) for n in WIDTHS]), sweep("depth", [(64, k) for k in DEPTHS])]


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


class Residual(nn.Module):
    """Blocks ``x + W_2 relu(W_1 norm(x))`` between two linear layers."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.enter, self.head, self.norm = nn.Linear(64, width), nn.Linear(width, 10), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def sweep(along: str, sizes: list[tuple[int, int]]) -> Measurement:
    """Over residual networks of these widths and depths."""
    said = f"residual networks on digits, {along} {sizes[0][along == 'depth']} to {sizes[-1][along == 'depth']}"
    return Measurement(package="torch", model=said, rows=partial(drift, said, sizes))


def drift(said: str, sizes: list[tuple[int, int]]) -> Iterator[Row]:
    """Range over sizes of the best relative update at spectral norms, in octaves."""
    best = [math.log2(best_update(lambda size=size: Residual(*size))) for size in sizes]  # type: ignore[misc]
    yield row_over(
        [max(best) - min(best)], situation="rates", package="torch", model=said, quantity="drift of the best rate, octaves",
        asked=(0.0, OCTAVES),
    )  # fmt: skip


def best_update(build: Callable[[], nn.Module]) -> float:
    """Where a parabola through the points within an octave of the best one is lowest, in the logarithm of the rate."""
    losses = np.array([np.mean([trained(build, update, seed) for seed in range(SEEDS)]) for update in GRID])
    near = np.abs(np.arange(len(GRID)) - int(losses.argmin())) <= 2
    octaves = np.log2(GRID)[near]
    square, linear, _ = np.polyfit(octaves, losses[near], 2)
    lowest = -linear / (2.0 * square) if square > 0.0 else octaves[losses[near].argmin()]
    return float(2.0 ** np.clip(lowest, octaves.min(), octaves.max()))


def trained(build: Callable[[], nn.Module], update: float, seed: int) -> float:
    """Mean log of the training loss over the last fifth of the steps; that of guessing where it is no number."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x, y = ((images - images.mean()) / images.std()).float(), labels.long()
    torch.manual_seed(seed)
    model = build()
    plan = gs.initialize(model, (x[:BATCH],), seed=seed)
    optimizer = torch.optim.Adam(gs.param_groups(model, plan, relative_update=update, norm="spectral", optimizer="adam"))
    order = torch.randint(0, len(x), (STEPS, BATCH), generator=torch.Generator().manual_seed(seed))
    losses = []
    for rows in order:
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = float(loss.detach())
        losses.append(min(found, math.log(10.0)) if math.isfinite(found) else math.log(10.0))
    return math.log(float(np.mean(losses[-STEPS // 5 :])))
