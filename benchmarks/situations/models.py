"""Models of other people for the situations: package, name, and a builder of a small one with inputs. Nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmarks.situations.rows import Measurement, Row
from benchmarks.zoo.reference import Example, seeded
from torch import nn

from gainstage.cli.models import cpu_torchvision


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to measure on."""

    package: str
    name: str
    build: Callable[[], Example]

    def draw(self, seed: int) -> Example:
        """In train mode, with weights and inputs from this seed."""
        return seeded(self.build)(seed)


def from_timm(name: str, said: str = "", *, size: int = 0, batch: int = 2, **options: Any) -> Subject:
    """A model of timm; ``said``: how the table names it where options change it."""

    def build() -> Example:
        cpu_torchvision()
        import timm

        model = timm.create_model(name, **options)
        side = size or model.default_cfg["input_size"][-1]
        return Example(model, (torch.randn(batch, 3, side, side),))

    return Subject("timm", said or name, build)


def from_torchvision(name: str, *, size: int = 224, batch: int = 2, **options: Any) -> Subject:
    """A model of torchvision, classification or segmentation."""

    def build() -> Example:
        model = cpu_torchvision().models.get_model(name, weights=None, **options)
        return Example(model, (torch.randn(batch, 3, size, size),))

    return Subject("torchvision", name, build)


def from_transformers(model_type: str, said: str = "", *, head: str = "CausalLM", length: int = 48, **config: Any) -> Subject:
    """A small model of transformers on tokens; ``config`` adds to two layers, four heads of 32, and 500 tokens."""

    def build() -> Example:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        cpu_torchvision()  # before transformers, which imports it
        import transformers

        made = transformers.CONFIG_MAPPING[model_type](**{**_SMALL, **config})
        kind = getattr(transformers, f"AutoModelFor{head}")
        tokens = partial(torch.randint, 5, 500, (2, length))
        inputs = {"input_ids": tokens()} | ({"decoder_input_ids": tokens()} if made.is_encoder_decoder else {})
        return Example(kind.from_config(made), (), inputs)

    return Subject("transformers", said or model_type, build)


_SMALL: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
    "use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def from_torch(name: str, build: Callable[[], Example]) -> Subject:
    """Modules of torch.nn, put together as its documentation does."""
    return Subject("torch", name, build)


def each(subjects: Iterable[Subject], rows_of: Callable[[Subject], Iterable[Row]]) -> list[Measurement]:
    """The measurement of each, under its own name."""
    return [Measurement(package=one.package, model=one.name, rows=partial(rows_of, one)) for one in subjects]


class Cross(nn.Module):
    """Attention to a sequence of another width, with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, kdim=48, vdim=32, batch_first=True)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The weighted values."""
        output: torch.Tensor = self.attention(q, k, v)[0]
        return output
