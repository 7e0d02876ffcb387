"""Training runs of the demonstration: two initializations, the same everything else, several learning rates and seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch.nn import functional as F

from gainstage.apply import apply
from gainstage.demo.digits import Digits, load_digits
from gainstage.demo.network import DeepConvNet
from gainstage.plan import Plan

BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One run. Without a plan the network keeps what its constructor drew."""

    plan: Plan | None
    learning_rate: float
    seed: int
    epochs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Mean training loss of every epoch, and accuracy on the test set after it."""

    setup: Setup
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]


def train(setup: Setup, digits: Digits) -> Curve:
    """AdamW at a constant learning rate, batches in an order that the seed decides."""
    torch.manual_seed(setup.seed)
    model = DeepConvNet()
    if setup.plan is not None:
        apply(model, setup.plan, seed=setup.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.learning_rate)
    order = torch.Generator().manual_seed(setup.seed)
    losses, accuracies = [], []
    for _ in range(setup.epochs):
        total = 0.0
        for batch in torch.split(torch.randperm(len(digits.labels), generator=order), BATCH):
            loss = F.cross_entropy(model(digits.images[batch]), digits.labels[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / len(digits.labels))
        with torch.no_grad():
            right = model(digits.test_images).argmax(1) == digits.test_labels
        accuracies.append(right.double().mean().item())
    return Curve(setup=setup, losses=tuple(losses), accuracies=tuple(accuracies))


def train_all(setups: Sequence[Setup]) -> Iterator[Curve]:
    """Curves as they are finished, two processes at a time where there are two cores."""
    workers = min(2, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        for future in as_completed([pool.submit(_train, setup) for setup in setups]):
            yield future.result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _train(setup: Setup) -> Curve:
    return train(setup, load_digits())


def final(values: Sequence[float]) -> float:
    """The mean of the last three epochs: single ones jump."""
    last = values[-3:]
    return sum(last) / len(last)
