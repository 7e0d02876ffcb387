"""Situation 6: what dropout of every kind adds to second moments is taken off where it acts, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from benchmarks.measure import forward_pass
from benchmarks.situations.models import Subject, from_timm, from_torch, from_transformers
from benchmarks.situations.rows import DRAWS, Measurement, Row, row_over
from benchmarks.zoo.reference import Example
from torch import nn

import gainstage as gs
from gainstage.cli.models import cpu_torchvision

ASKED = (0.8, 1.25)
DEPTH = 20
RATES = (0.1, 0.5, 0.75)


def measurements() -> list[Measurement]:
    """Networks of 20 dropout layers at three rates."""
    return [
        Measurement(package=subject.package, model=f"{subject.name}, p = {p:g}", rows=partial(rows_of, subject, p))
        for p in RATES
        for subject in subjects(p)
    ]


def subjects(p: float) -> tuple[Subject, ...]:
    """Plain stacks, whose last layer is at level 1 if every layer before was, and transformers, held to their plan."""
    return (
        from_torch("Dropout", partial(_stack, nn.Linear, nn.ReLU, lambda: nn.Dropout(p))),
        from_torch("Dropout1d", partial(_stack, partial(nn.Conv1d, kernel_size=1), nn.ReLU, lambda: nn.Dropout1d(p))),
        from_torch("AlphaDropout", partial(_stack, nn.Linear, nn.SELU, lambda: nn.AlphaDropout(p))),
        from_torch("TransformerEncoder", lambda: _encoder(p)),
        Subject("torchvision", "StochasticDepth, blocks of convnext", lambda: _convnext(p)),
        from_timm("vit_tiny_patch16_224", "vit, 20 blocks, DropPath", depth=DEPTH, drop_path_rate=p, size=224),
        from_timm(
            "vit_tiny_patch16_224", "vit, 20 blocks, all others", depth=DEPTH, drop_rate=p, pos_drop_rate=p, proj_drop_rate=p,
            attn_drop_rate=p,
        ),
        from_transformers(
            "gpt2", "gpt2, 20 blocks", num_hidden_layers=DEPTH, attn_pdrop=p, resid_pdrop=p, embd_pdrop=p,
        ),
    )  # fmt: skip


class _Stack(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module], activation: type[nn.Module], noise: Callable[[], nn.Module]) -> None:
        super().__init__()
        blocks = (nn.Sequential(layer(1024, 1024), activation(), noise()) for _ in range(DEPTH))
        self.blocks, self.last = nn.Sequential(*blocks), layer(1024, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(self.blocks(x)).sin()  # the last layer is no head, whose level is another
        return output


def _stack(layer: Callable[..., nn.Module], activation: type[nn.Module], noise: Callable[[], nn.Module]) -> Example:
    shape = (256, 1024) if layer is nn.Linear else (16, 1024, 16)
    return Example(_Stack(layer, activation, noise), (torch.randn(shape),))


def _encoder(p: float) -> Example:
    layer = nn.TransformerEncoderLayer(96, 4, 384, dropout=p, batch_first=True, norm_first=True)
    return Example(nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False), (torch.randn(8, 24, 96),))


def _convnext(p: float) -> Example:
    cpu_torchvision()
    from torchvision.models.convnext import CNBlock

    return Example(nn.Sequential(*(CNBlock(64, 1.0, p) for _ in range(DEPTH))), (torch.randn(16, 64, 14, 14),))


def rows_of(subject: Subject, p: float) -> Iterator[Row]:
    """Second moments of the outputs of blocks over those planned; of a plain stack its last layer's, as it is."""
    first = subject.draw(0)
    plan = gs.plan(first.model, first.args, first.kwargs)
    found: list[Mapping[str, tuple[str, float]]] = []
    for seed in range(2 * DRAWS if isinstance(first.model, _Stack) else DRAWS):  # without norms a draw strays more
        example = subject.draw(seed)
        gs.apply(example.model, plan, seed=seed)
        found.append(forward_pass(example))
    named = {"situation": "dropout", "package": subject.package, "model": f"{subject.name}, p = {p:g}", "asked": ASKED}
    means = {key: float(np.mean([draw[key][1] for draw in found])) for key in found[0]}
    if isinstance(first.model, _Stack):
        yield row_over([means["last@0"]], **named, quantity="second moment after 20 layers")
    else:
        ratios = [means[key] / plan.predictions[key][0] for key, (kind, _) in found[0].items() if kind in BLOCKS]
        yield row_over(ratios, **named, quantity="second moment of blocks over planned")


BLOCKS = {"TransformerEncoderLayer", "CNBlock", "Block", "GPT2Block"}
