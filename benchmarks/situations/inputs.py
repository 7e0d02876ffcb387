"""Correlated inputs: first layers on rows that were not seen when the statistics were gathered.

Over n rows uncorrelated outputs show a mean absolute correlation of ``sqrt(2 / (pi n))``. What is reported is the correlation in
the population, the known sampling error being subtracted, of the whitened outputs and of those with independent weights alike:
see Correlations. N outputs of fewer directions r cannot be uncorrelated: the root mean square of their correlations is at least
``sqrt((N - r) / (r (N - 1)))`` (L. Welch 1974), and a tenth is asked for above that, in squares. The mean of their sizes would be
least for outputs that are copies of each other.

A covariance that m rows told is as far from that of the population as the one that n held-out rows show, at ``sqrt(n / m)`` of
the size. Outputs that are uncorrelated over the m rows correlate by that in the population, whatever whitens them: each row of
the table says how much it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmarks.situations.rows import DRAWS, Measurement, Row, row_over
from torch import nn

import gainstage as gs
from gainstage.cli.models import cpu_torchvision

TENTH = 0.1
HALVINGS = 4  # more would tell the sampling error hardly better than the pairs that there are
Data = tuple[torch.Tensor, torch.Tensor]  # to gather statistics from, and not seen


@dataclass(frozen=True, slots=True)
class Case:
    """A model, the layer that reads the data, and data for each draw."""

    package: str
    name: str
    build: Callable[[], nn.Module]
    first: str
    data: Callable[[int], Data]


def measurements() -> list[Measurement]:
    """Made rows of known condition, tables and photographs."""
    return [Measurement(package=case.package, model=case.name, rows=partial(rows_of, case)) for case in cases()]


def rows_of(case: Case) -> Iterator[Row]:
    """Variance of the outputs, and their correlation over that with independent weights."""
    variances, ours, plain, ranks = [], [], [], []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        seen, unseen = case.data(seed)
        model = case.build()
        layer = model.get_submodule(case.first)
        stats = gs.measure_inputs(seen.split(100), first=layer, progress=False)
        gs.apply(model, gs.plan(model, (seen[:32],)), seed=seed)
        plain.append(Correlations.of(layer(unseen)))
        plan = gs.plan(model, (seen[:32],), inputs=stats)
        gs.apply(model, plan, seed=seed)
        whitened = layer(unseen)
        ours.append(Correlations.of(whitened))
        variances.append(float(whitened.detach().transpose(0, 1).flatten(1).double().var(1).mean()))
        mixing = plan.parameters[f"{case.first}.weight"].distribution.mixing
        assert mixing is not None
        ranks.append(mixing.rank)
    mine, others = Correlations.mean(ours), Correlations.mean(plain)
    outputs, rank = whitened.shape[1], float(np.mean(ranks))
    least = math.sqrt(max(0.0, outputs - rank) / (rank * (outputs - 1)))
    if least:
        quantity = f"rms correlation over that with independent weights, {outputs} outputs of {rank:g} directions"
        ratio, asked = mine.root_mean_square / others.root_mean_square, math.hypot(TENTH, least / others.root_mean_square)
    else:
        quantity, asked, ratio = "mean correlation over that with independent weights", TENTH, mine.absolute / others.absolute
    told = mine.left_by(len(seen) / len(unseen))
    left = math.hypot(told, least) / others.root_mean_square if least else math.sqrt(2.0 / math.pi) * told / others.absolute
    quantity += f"; {len(seen)} rows seen leave {left:.2g}"
    named = {"situation": "inputs", "package": case.package, "model": case.name}
    yield row_over([float(np.mean(variances))], **named, quantity="variance of what the first layer returns", asked=(0.9, 1.1))
    yield row_over([ratio], **named, quantity=quantity, asked=(0.0, asked))


@dataclass(frozen=True, slots=True)
class Correlations:
    """Between all pairs of outputs: means of ``|r|``, of ``r^2``, and of the sampling variance of r, as they are measured."""

    sizes: float
    squares: float
    variance: float

    @classmethod
    def of(cls, outputs: torch.Tensor) -> Correlations:
        """Of [samples, outputs, places...]; samples are independent, places of one are not.

        Two halves of the samples err independently: the mean of ``r_A r_B`` is the square of the population's correlation, and
        what ``r^2`` of all samples has beyond it is the variance of r. (Estimated from the fourth moments of the same samples
        that variance is a tenth to a fifth too small for tables of a few hundred rows: what strays far widens its own scale.)
        """
        values = outputs.detach().double().flatten(2).transpose(1, 2) if outputs.dim() > 2 else outputs.detach().double()[:, None]
        generator, products = torch.Generator().manual_seed(0), []
        for _ in range(HALVINGS):
            halves = torch.randperm(len(values), generator=generator).tensor_split(2)
            products.append(float(torch.mul(*(_between(values[half]) for half in halves)).mean()))
        r = _between(values)
        squares = float(r.square().mean())
        return cls(float(r.abs().mean()), squares, squares - float(np.mean(products)))

    @classmethod
    def mean(cls, draws: list[Correlations]) -> Correlations:
        """Over draws."""
        return cls(*(float(np.mean([getattr(draw, name) for draw in draws])) for name in ("sizes", "squares", "variance")))

    @property
    def absolute(self) -> float:
        """``sqrt(E[|r|]^2 - 2 s^2 / pi)``: of the population, whose correlations scatter normally about 0 from pair to pair.

        Those of independent weights are larger and scatter otherwise; there the difference is small, and makes the ratio larger.
        """
        return math.sqrt(max(0.0, self.sizes**2 - 2.0 * self.variance / math.pi))

    def left_by(self, more: float) -> float:
        """Root mean square in the population of what is uncorrelated over so many times as many samples, to first order."""
        return math.sqrt(self.variance / more)

    @property
    def root_mean_square(self) -> float:
        """``sqrt(E[r^2] - s^2)``: of the population."""
        return math.sqrt(max(0.0, self.squares - self.variance))


def _between(values: torch.Tensor) -> torch.Tensor:
    """Correlations of each pair of outputs, of values [samples, places, outputs]."""
    r = torch.corrcoef(values.flatten(0, 1).T)
    return r[*torch.triu_indices(*r.shape, 1)]


def cases() -> Iterator[Case]:
    """Made rows of known condition, tables and photographs."""
    for condition, copies in ((1e2, 0), (1e4, 0), (1e6, 0), (1e6, 16)):
        name = f"MLP, condition {condition:.0e}" + (f", {copies} columns twice more" if copies else "")
        yield Case("torch", name, lambda copies=copies: mlp(64 + 2 * copies), "0", made(condition, copies))
    for name in ("digits", "breast_cancer", "wine", "diabetes", "fair", "randhie"):
        columns, rows, data = table(name)
        yield Case("torch", f"MLP, {name} ({rows} rows of {columns})", lambda columns=columns: mlp(columns), "0", data)
    cpu_torchvision()
    import timm
    import torchvision
    from transformers import ViTConfig, ViTModel

    yield Case("timm", "resnet18, photographs", lambda: timm.create_model("resnet18"), "conv1", photographs)
    yield Case("torchvision", "vgg11, photographs", torchvision.models.vgg11, "features.0", photographs)
    settings: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    patches = "embeddings.patch_embeddings.projection"
    yield Case(
        "transformers",
        "ViT, photographs",
        lambda: ViTModel(ViTConfig(image_size=64, patch_size=8, **settings), add_pooling_layer=False),
        patches,
        photographs,
    )


def mlp(columns: int) -> nn.Module:
    """One hidden layer, no wider than its input."""
    hidden = min(columns, 64)
    return nn.Sequential(nn.Linear(columns, hidden), nn.GELU(), nn.Linear(hidden, 4))


def made(condition: float, copies: int) -> Callable[[int], Data]:
    """Gaussian rows of that condition number, with a mean; of some columns a copy, and one three times as large."""

    def data(seed: int) -> Data:
        random = np.random.default_rng(seed)
        turn = np.linalg.qr(random.standard_normal((64, 64)))[0]
        rows = random.standard_normal((40000, 64)) * np.logspace(0.0, -0.5 * np.log10(condition), 64) @ turn.T
        rows += random.standard_normal(64)
        whole = torch.tensor(np.concatenate([rows, rows[:, :copies], 3.0 * rows[:, :copies]], 1), dtype=torch.float32)
        return whole[:20000], whole[20000:]

    return data


def table(name: str) -> tuple[int, int, Callable[[int], Data]]:
    """Columns, rows, and splits of a table of scikit-learn's or statsmodels' in 7 parts and 3."""
    from sklearn import datasets
    from statsmodels import datasets as others

    load = getattr(datasets, f"load_{name}", None)
    values = getattr(others, name).load_pandas().data.to_numpy() if load is None else load().data
    whole = torch.tensor(values, dtype=torch.float32)

    def data(seed: int) -> Data:
        shuffled = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))]
        seen, unseen = shuffled.tensor_split([int(0.7 * len(whole))])
        return seen, unseen

    return whole.shape[1], len(whole), data


def photographs(seed: int) -> Data:
    """The 120 tiles of 64 x 64 of the two photographs that scikit-learn ships: 84 of them are seen."""
    from sklearn.datasets import load_sample_images

    tiles = []
    for image in load_sample_images().images:
        whole = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255.0
        tiles += [row.split(64, 2)[:10] for row in whole.split(64, 1)[:6]]
    shuffled = torch.stack([tile for row in tiles for tile in row])[np.random.default_rng(seed).permutation(120)]
    return shuffled[:84], shuffled[84:]
