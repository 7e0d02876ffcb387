"""Several tasks on one trunk: plans under other loss weights, and the trunk's gradients by task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.situations.rows import DRAWS, Measurement, Row, row_over
from torch import nn

import gainstage as gs
from gainstage.cli.models import cpu_torchvision
from gainstage.verify import measure_tasks

Losses = Mapping[str, Callable[[Any], torch.Tensor]]
BATCH = 32


class Case(NamedTuple):
    """A model with several outputs, its inputs and its losses by the number of the draw.

    ``draws``: of weights and inputs for each drawing of labels, so many that a mean square is known to 1 % at the median.
    """

    package: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    losses: Callable[[int], Losses]
    draws: int


class Weighted(nn.Module):
    """A model that multiplies its losses itself and returns their sum."""

    def __init__(self, model: nn.Module, losses: Losses, weights: tuple[float, ...]) -> None:
        super().__init__()
        self.model, self.losses, self.weights = model, losses, weights

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The weighted sum."""
        output = self.model(**inputs)
        return torch.stack([w * loss(output) for w, loss in zip(self.weights, self.losses.values(), strict=True)]).sum()


def measurements() -> list[Measurement]:
    """Models with two or three heads."""
    return [Measurement(package=case.package, model=case.name, rows=partial(rows_of, case)) for case in cases()]


def rows_of(case: Case) -> Iterator[Row]:
    """Distributions that differ between loss weights; median error of the gradients of each shared parameter, by task."""
    plans = []
    for weights in ((1.0, 1.0, 1.0), (1000.0, 1e-3, 7.0)):
        torch.manual_seed(0)
        losses = case.losses(0)
        model = Weighted(case.build(), losses, weights[: len(losses)])
        plans.append(gs.plan(model, (), case.inputs(0)))
    differing = sum(
        parameter.distribution != plans[1].parameters[name].distribution or parameter.blocks != plans[1].parameters[name].blocks
        for name, parameter in plans[0].parameters.items()
    )
    median = float(np.median(errors(case)))
    for quantity, asked, value in (
        ("parameters planned otherwise under other loss weights", (0.0, 0.0), float(differing)),
        ("median error of gradients by task and parameter", (0.0, 0.02), median),
    ):
        yield row_over([value], situation="tasks", package=case.package, model=case.name, quantity=quantity, asked=asked)


def errors(case: Case) -> list[float]:
    """``|log(predicted / measured)|`` of second moments, means over the same labels.

    Labels are data, which predictions see as they are; of the measured ones each is a mean over draws of weights and inputs.
    """
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        model, inputs, losses = case.build(), case.inputs(seed), case.losses(seed)
        plan = gs.initialize(model, (), inputs, seed=seed)
        found = gs.task_gradients(model, (), inputs, losses=losses)
        measured = [found.measured, *(_measured(case, model, plan, seed + DRAWS * k) for k in range(1, case.draws))]
        for task in found.predicted:
            for name in found.shared:
                mean = float(np.mean([squares[task].get(name, 0.0) for squares in measured]))
                pairs.setdefault((task, name), []).append((found.predicted[task].get(name, 0.0), mean))
    means = [np.mean(found, axis=0) for found in pairs.values()]
    return [abs(float(np.log(predicted / measured))) for predicted, measured in means if min(predicted, measured) > 1e-12]


def _measured(case: Case, model: nn.Module, plan: gs.Plan, seed: int) -> Mapping[str, Mapping[str, float]]:
    """Mean squares of gradients, by task and parameter, of another draw of weights and inputs; labels stay."""
    gs.apply(model, plan, seed=seed)
    return measure_tasks(model, (), case.inputs(seed), case.losses(seed % DRAWS))[1]


def labels(classes: int, seed: int, *shape: int) -> torch.Tensor:
    """Classes drawn by chance."""
    return torch.randint(classes, shape or (BATCH,), generator=torch.Generator().manual_seed(1000 + seed))


def cross_entropy(logits: Callable[[Any], torch.Tensor], classes: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """The loss of a head; the classes are data, which predictions see as they are."""
    return lambda y: F.cross_entropy(logits(y), classes)


def images(name: str, size: int) -> Callable[[int], dict[str, torch.Tensor]]:
    """Standard normal ones."""
    return lambda seed: {name: torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(seed))}


def cases() -> list[Case]:
    """Models with two or three heads, as their packages build them."""
    cpu_torchvision()
    import timm
    import torchvision
    from transformers import BertConfig, BertForPreTraining

    def distilled() -> nn.Module:
        model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=4, num_classes=10)
        model.set_distilled_training(True)
        return model

    sizes = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=200)
    return [
        Case("timm", "DeiT, label and teacher", distilled, images("x", 64), lambda seed: {
            "label": cross_entropy(lambda y: y[0], labels(10, seed)),
            "teacher": cross_entropy(lambda y: y[1], labels(10, seed + 50)),
        }, draws=48),
        Case("transformers", "BERT, words and next sentence", lambda: BertForPreTraining(sizes).eval(),
             lambda seed: {"input_ids": labels(200, seed, BATCH, 24)}, lambda seed: {
            "words": cross_entropy(lambda y: y.prediction_logits.flatten(0, 1), labels(200, seed + 1, BATCH * 24)),
            "next": cross_entropy(lambda y: y.seq_relationship_logits, labels(2, seed + 2)),
        }, draws=96),
        Case("torchvision", "GoogLeNet, two auxiliary heads",
             lambda: torchvision.models.googlenet(aux_logits=True, init_weights=False, num_classes=10),
             images("x", 96), lambda seed: {
            "main": cross_entropy(lambda y: y.logits, labels(10, seed)),
            "first": cross_entropy(lambda y: y.aux_logits1, labels(10, seed)),
            "second": cross_entropy(lambda y: y.aux_logits2, labels(10, seed)),
        }, draws=8),
    ]  # fmt: skip
