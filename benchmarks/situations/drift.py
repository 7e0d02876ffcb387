"""How far the best relative update drifts over width and depth.

Residual networks learn the digits of scikit-learn, with noise of half their deviation that is drawn anew for each step, so that
nothing is memorised. For each size and rate the mean logarithm of the loss over the last fifth of the steps, mean over seeds;
the best rate is where a parabola through all points within half a unit of the least is lowest, in the logarithm of the rate.
The drift is the range of that over sizes, in octaves; its standard error by leaving out one seed at a time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.situations.rows import Measurement, Row, row_over
from numpy.typing import NDArray
from torch import nn

import gainstage as gs

STEPS, BATCH, SEEDS, NOISE = 120, 128, 6, 0.5
GRID = tuple(2.0 ** (-0.5 * k) for k in range(3, 15))
OCTAVES = 0.5
NEAR = 0.5
WIDTHS, DEPTHS = (32, 64, 128, 256), (2, 4, 8, 16)


def sweeps() -> list[Measurement]:
    """Over width and over depth."""
    return [_sweep("width", [(n, 4) for n in WIDTHS]), _sweep("depth", [(64, k) for k in DEPTHS])]


def _sweep(along: str, sizes: list[tuple[int, int]]) -> Measurement:
    said = f"residual networks on digits, {along} {sizes[0][along == 'depth']} to {sizes[-1][along == 'depth']}"
    return Measurement(package="torch", model=said, rows=partial(_drift, said, sizes))


def _drift(said: str, sizes: list[tuple[int, int]]) -> Iterator[Row]:
    """Range over sizes of the best relative update at spectral norms."""
    losses = [trained(*size) for size in sizes]
    best = [lowest(found.mean(0)) for found in losses]
    left_out = [[lowest(np.delete(found, seed, 0).mean(0)) for seed in range(SEEDS)] for found in losses]
    variances = [(SEEDS - 1.0) * np.var(values) for values in left_out]
    error = math.sqrt(variances[int(np.argmin(best))] + variances[int(np.argmax(best))])
    yield row_over(
        [max(best) - min(best)], situation="rates", package="torch", model=said, asked=(0.0, OCTAVES),
        quantity=f"drift of the best rate, octaves (standard error {error:.2f})",
    )  # fmt: skip


def lowest(losses: NDArray[np.float64]) -> float:
    """Where the parabola is lowest, as a logarithm to base 2."""
    near = losses <= losses.min() + NEAR
    square, linear, _ = np.polyfit(np.log2(GRID)[near], losses[near], 2)
    return float(-0.5 * linear / square)


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


def trained(width: int, depth: int) -> NDArray[np.float64]:
    """[seeds, rates]: networks of all seeds and rates are trained side by side, each as by itself."""
    x, y = _digits()
    models, rates = [], []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = Residual(width, depth)
        plan = gs.initialize(model, (x[:BATCH],), seed=seed)
        groups = gs.param_groups(model, plan, relative_update=GRID[0], norm="spectral", optimizer="adam")
        own = {name: group["lr"] for group in groups for name, _ in group["params"]}
        models += [model] * len(GRID)
        rates += [{name: rate * update / GRID[0] for name, rate in own.items()} for update in GRID]
    together = Together(models, rates)
    losses = [together.step(x[rows] + noise, y[rows]) for rows, noise in _batches(len(x))]
    return torch.stack(losses[-STEPS // 5 :]).log().mean(0).view(SEEDS, len(GRID)).double().numpy()


@cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    return ((images - images.mean()) / images.std()).float(), labels.long()


def _batches(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows and noise for each step, the same for all rates of a seed: [seeds x rates, batch] and [seeds x rates, batch, 64]."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
    for _ in range(STEPS):
        rows = [torch.randint(0, count, (BATCH,), generator=one) for one in generators]
        noise = [NOISE * torch.randn(BATCH, 64, generator=one) for one in generators]
        yield torch.stack(rows).repeat_interleave(len(GRID), 0), torch.stack(noise).repeat_interleave(len(GRID), 0)


class Together:
    """Copies of one network that Adam trains side by side, each parameter of each copy at its own rate.

    Adam as Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1, have it, with their constants.
    """

    def __init__(self, models: Sequence[nn.Module], rates: Sequence[dict[str, float]]) -> None:
        own = [{name: p.detach() for name, p in model.named_parameters()} for model in models]
        self.parameters = {name: torch.stack([each[name] for each in own]).requires_grad_() for name in own[0]}
        self.rates = {
            name: torch.tensor([rate[name] for rate in rates]).view(-1, *(1,) * (p.dim() - 1))
            for name, p in self.parameters.items()
        }
        self.means = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.squares = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.count = 0
        base = copy.deepcopy(models[0]).to("meta")
        self.run = torch.vmap(lambda parameters, x: torch.func.functional_call(base, parameters, (x,)))

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One update; the loss before it, that of guessing where it is no number or larger. [copies]."""
        logits = self.run(self.parameters, x)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(len(y), -1).mean(1)
        gradients = torch.autograd.grad(losses.sum(), list(self.parameters.values()))
        self.count += 1
        first, second = 1.0 - 0.9**self.count, 1.0 - 0.999**self.count
        with torch.no_grad():
            for (name, p), g in zip(self.parameters.items(), gradients, strict=True):
                mean, square = self.means[name], self.squares[name]
                mean.lerp_(g, 0.1)
                square.lerp_(g * g, 0.001)
                p.sub_(self.rates[name] * (mean / first) / ((square / second).sqrt() + 1e-8))
        guessing = math.log(10.0)
        return losses.detach().nan_to_num(nan=guessing).clamp(max=guessing)
