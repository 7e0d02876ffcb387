"""The reference models of the accuracy benchmark: builders of real architectures with example inputs, nothing downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gainstage.cli.models import cpu_torchvision

BATCH = 2
_TRANSFORMERS = Path(__file__).with_name("transformers.json")


@dataclass(frozen=True, slots=True)
class Example:
    """A model in train mode with the arguments of one call."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None


def reference_models() -> dict[str, Callable[[int], Example]]:
    """Name -> builder; weights and inputs depend on the seed that a builder is given, and on nothing else."""
    found: dict[str, Callable[[int], Example]] = {}
    for name in _TORCHVISION:
        found[f"torchvision:{name}"] = seeded(lambda name=name: _torchvision(name))
    for name in _TIMM:
        found[f"timm:{name}"] = seeded(lambda name=name: _timm(name))
    for entry in json.loads(_TRANSFORMERS.read_text(encoding="utf-8")):
        found[f"transformers:{entry['model_type']}"] = seeded(lambda entry=entry: _transformers(entry))
    for name, build in _PLAIN.items():
        found[f"torch:{name}"] = seeded(build)
    return found


def seeded(build: Callable[[], Example]) -> Callable[[int], Example]:
    """A builder of the model in train mode; weights and inputs depend on the seed alone."""

    def built(seed: int) -> Example:
        torch.manual_seed(seed)
        example = build()
        example.model.train()
        return example

    return built


_TORCHVISION = (
    "resnet50", "vgg16", "densenet121", "inception_v3", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vit_b_16",
    "swin_t", "regnet_y_400mf",
)  # fmt: skip
_TIMM = (
    "resnext50_32x4d", "mixer_s16_224", "deit_tiny_patch16_224", "coatnet_nano_rw_224", "nfnet_l0", "ghostnet_100",
    "xcit_nano_12_p16_224", "poolformer_s12", "gmlp_s16_224", "maxvit_pico_rw_256",
)  # fmt: skip


def _torchvision(name: str) -> Example:
    options = {"init_weights": True} if name == "inception_v3" else {}
    size = 299 if name == "inception_v3" else 224
    model = cpu_torchvision().models.get_model(name, weights=None, **options)
    return Example(model, (torch.randn(BATCH, 3, size, size),))


def _timm(name: str) -> Example:
    cpu_torchvision()
    import timm

    model = timm.create_model(name)
    size = model.default_cfg["input_size"][-1]
    return Example(model, (torch.randn(BATCH, 3, size, size),))


def _transformers(entry: Mapping[str, Any]) -> Example:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cpu_torchvision()  # before transformers, which imports it
    import transformers

    config = transformers.CONFIG_MAPPING[entry["model_type"]](**entry["config"])
    model = getattr(transformers, entry["class"])(config)
    return Example(model, (), {name: _input(spec) for name, spec in entry["inputs"].items()})


def _input(spec: Mapping[str, Any]) -> Any:
    dtype = getattr(torch, spec["dtype"])
    if "value" in spec:
        return torch.full(spec["shape"], spec["value"], dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(spec["shape"], dtype=dtype)
    return torch.randint(spec["low"], spec["high"], spec["shape"], dtype=dtype)


class _UNet(nn.Module):
    """Two levels down and up, skips by concatenation, transposed convolutions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = self._block(3, width)
        self.down = nn.ModuleList([self._block(width, 2 * width), self._block(2 * width, 4 * width)])
        self.grow = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2), nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)]
        )
        self.up = nn.ModuleList([self._block(4 * width, 2 * width), self._block(2 * width, width)])
        self.head = nn.Conv2d(width, 5, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = [self.enter(x)]
        for block in self.down:
            levels.append(block(nn.functional.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([levels.pop(), grow(x)], dim=1))
        return self.head(x)


class _Recurrent(nn.Module):
    """Two layers of an LSTM or GRU in both directions, and a head on every step."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.cells = kind(48, 64, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(x)[0])


def _encoder() -> Example:
    layer = nn.TransformerEncoderLayer(96, 4, 384, batch_first=True)
    return Example(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), (torch.randn(4, 24, 96),))


class _CrossAttention(nn.Module):
    """Attention of one sequence to another."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(96, 4, batch_first=True)
        self.head = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, y, y)[0])


_PLAIN: dict[str, Callable[[], Example]] = {
    "transformer_encoder": _encoder,
    "multihead_attention": lambda: Example(_CrossAttention(), (torch.randn(4, 12, 96), torch.randn(4, 20, 96))),
    "lstm": lambda: Example(_Recurrent(nn.LSTM), (torch.randn(4, 20, 48),)),
    "gru": lambda: Example(_Recurrent(nn.GRU), (torch.randn(4, 20, 48),)),
    "unet": lambda: Example(_UNet(), (torch.randn(BATCH, 3, 48, 48),)),
}
