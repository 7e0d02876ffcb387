"""Correlated inputs: first layers on rows that were not seen when the statistics were gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from benchmarks.situations.rows import DRAWS, Row, row_over
from torch import nn

import gainstage as gs
from gainstage.cli.models import cpu_torchvision

Data = tuple[torch.Tensor, torch.Tensor]  # to gather statistics from, and not seen


@dataclass(frozen=True, slots=True)
class Case:
    """A model, the layer that reads the data, and data for each draw."""

    package: str
    name: str
    build: Callable[[], nn.Module]
    first: str
    data: Callable[[int], Data]


def measure() -> list[Row]:
    """Variance, and the mean absolute correlation between outputs, over that with independent weights."""
    rows = []
    for case in cases():
        variances, ratios = [], []
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            seen, unseen = case.data(seed)
            model = case.build()
            layer = model.get_submodule(case.first)
            stats = gs.measure_inputs(seen.split(100), first=layer, progress=False)
            gs.apply(model, gs.plan(model, (seen[:32],)), seed=seed)
            plain = correlation(layer(unseen))
            gs.apply(model, gs.plan(model, (seen[:32],), inputs=stats), seed=seed)
            outputs = channels_last(layer(unseen))
            variances.append(float(outputs.var(0).mean()))
            ratios.append(correlation(outputs) / plain)
        for quantity, asked, found in (
            ("variance of what the first layer returns", (0.9, 1.1), variances),
            ("mean correlation over that with independent weights", (0.0, 0.1), ratios),
        ):
            values = [float(np.mean(found))]
            rows.append(
                row_over(values, situation="inputs", package=case.package, model=case.name, quantity=quantity, asked=asked)
            )
    return rows


def channels_last(outputs: torch.Tensor) -> torch.Tensor:
    """[rows, outputs] of rows or of maps."""
    return (outputs if outputs.dim() == 2 else outputs.movedim(1, -1).flatten(0, -2)).detach().double()


def correlation(outputs: torch.Tensor) -> float:
    """Mean absolute correlation between two outputs."""
    found = np.corrcoef(channels_last(outputs).numpy().T)
    return float(np.abs(found[~np.eye(len(found), dtype=bool)]).mean())


def cases() -> Iterator[Case]:
    """Made rows of known condition, tables and photographs."""
    for condition, copies in ((1e2, 0), (1e4, 0), (1e6, 0), (1e6, 16)):
        name = f"MLP, condition {condition:.0e}" + (f", {copies} columns twice more" if copies else "")
        yield Case("torch", name, lambda copies=copies: mlp(64 + 2 * copies), "0", made(condition, copies))
    for name in ("digits", "breast_cancer", "wine", "diabetes"):
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
    """Columns, rows, and splits of a table of scikit-learn's in 7 parts and 3."""
    from sklearn import datasets

    whole = torch.tensor(getattr(datasets, f"load_{name}")().data, dtype=torch.float32)

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
