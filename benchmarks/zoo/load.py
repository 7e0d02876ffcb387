"""The models of the zoo benchmark: one builder each, and examples of their inputs; nothing is downloaded.

A model is built once; its inputs are made anew for each seed.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.zoo.awkward import awkward_models
from torch import nn

from gainstage.cli.models import cpu_torchvision

ZOOS = ("transformers", "timm", "torchvision", "awkward")
BATCH = 2
SMALL = 96  # pixels: tried first, as draws take time
_HERE = Path(__file__).parent

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in train mode, and its arguments by seed."""

    model: nn.Module
    arguments: Callable[[int], Arguments]
    differentiates: bool = False  # inside forward, so that gradients have to be on


def zoo_models(zoo: str, *, every: bool = False) -> dict[str, Callable[[], Loaded]]:
    """Name -> builder. ``every``: of timm all models, instead of one of each module."""
    match zoo:
        case "transformers":
            entries = json.loads((_HERE / "model_types.json").read_text(encoding="utf-8"))
            return {entry["model_type"]: partial(_transformers, entry) for entry in entries}
        case "torchvision":
            return {row["name"]: partial(_torchvision, row) for row in _listed(zoo)}
        case "timm":
            names = _all_of_timm() if every else [row["name"] for row in _listed(zoo)]
            return {name: partial(_timm, name) for name in names}
    return {name: partial(_awkward, name) for name in awkward_models()}


def _listed(zoo: str) -> list[dict[str, str]]:
    with (_HERE / f"{zoo}.tsv").open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def _all_of_timm() -> list[str]:
    cpu_torchvision()
    import timm

    return list(timm.list_models())


def _transformers(entry: Mapping[str, Any]) -> Loaded:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cpu_torchvision()  # before transformers, which imports it
    import transformers

    config = transformers.CONFIG_MAPPING[entry["model_type"]](**entry["config"])
    model = getattr(transformers, entry["class"])(config)

    def arguments(seed: int) -> Arguments:
        torch.manual_seed(seed)
        return (), {name: _example(spec) for name, spec in entry["inputs"].items()}

    return Loaded(model.train(), arguments)


def _example(spec: Mapping[str, Any]) -> Any:
    if "dtype" not in spec:
        return spec["value"]
    dtype = getattr(torch, spec["dtype"])
    if "shape" not in spec:
        return torch.tensor(spec["value"], dtype=dtype)
    if "value" in spec:
        return torch.full(spec["shape"], spec["value"], dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(spec["shape"], dtype=dtype)
    return torch.randint(spec["low"], spec["high"], spec["shape"], dtype=dtype)


def _torchvision(row: Mapping[str, str]) -> Loaded:
    name = row["name"]
    options: dict[str, Any] = {"weights_backbone": None} if row["task"] == "segmentation" else {}
    if name in {"googlenet", "inception_v3"}:
        options["init_weights"] = False
    model = cpu_torchvision().models.get_model(name, weights=None, **options)
    return _images(model.train(), int(row["input"].split("x")[-1]))


def _timm(name: str) -> Loaded:
    cpu_torchvision()
    import timm

    model = timm.create_model(name)
    return _images(model.train(), model.default_cfg["input_size"][-1])


def _images(model: nn.Module, size: int) -> Loaded:
    """Small images where the model takes them: one that does not raises at once."""

    def arguments(pixels: int, seed: int) -> Arguments:
        torch.manual_seed(seed)
        return (torch.randn(BATCH, 3, pixels, pixels),), {}

    try:
        with torch.no_grad():
            model(*arguments(SMALL, 0)[0])
    except (RuntimeError, AssertionError, ValueError):
        return Loaded(model, partial(arguments, size))
    return Loaded(model, partial(arguments, SMALL))


def _awkward(name: str) -> Loaded:
    build = awkward_models()[name]

    def arguments(seed: int) -> Arguments:
        example = build(seed)
        return example.args, example.kwargs or {}

    return Loaded(build(0).model, arguments, differentiates=name == "pinn")
