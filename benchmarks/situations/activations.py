"""Situation 3: gains of 1,000 randomly composed activations against brute-force integration, and of modules of others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.situations.rows import Measurement, Row, row_over
from torch import nn

import gainstage as gs
from gainstage.cli.models import cpu_torchvision

COUNT = 1000
ERROR, MILLISECONDS = 1e-3, 10.0
_Z = np.linspace(-7.0, 7.0, 400_001)
_DENSITY = np.exp(-0.5 * _Z**2) / np.exp(-0.5 * _Z**2).sum()
_ATOMS: tuple[tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[np.ndarray], np.ndarray]], ...] = (
    (torch.relu, lambda u: np.maximum(u, 0.0)),
    (torch.tanh, np.tanh),
    (torch.sin, np.sin),
    (torch.abs, np.abs),
    (F.softplus, lambda u: np.logaddexp(u, 0.0)),
    (F.hardtanh, lambda u: np.clip(u, -1.0, 1.0)),
    (lambda u: (u > 0.0).to(u.dtype), lambda u: (u > 0.0).astype(float)),
    (torch.sigmoid, lambda u: 1.0 / (1.0 + np.exp(-u))),
    (torch.floor, np.floor),
    (lambda u: torch.exp(-(u**2)), lambda u: np.exp(-(u**2))),
    (lambda u: F.leaky_relu(u, 1.7), lambda u: np.where(u > 0.0, u, 1.7 * u)),
    (lambda u: F.leaky_relu(u, -0.6), lambda u: np.where(u > 0.0, u, -0.6 * u)),
    (F.silu, lambda u: u / (1.0 + np.exp(-u))),
)


def composed(seed: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[np.ndarray], np.ndarray]]:
    """One to four activations with affine maps between them, in torch and in NumPy, and a constant so that none vanishes."""
    rng = np.random.default_rng(seed)
    chosen = [_ATOMS[i] for i in rng.integers(len(_ATOMS), size=rng.integers(1, 5))]
    maps = [(rng.uniform(0.5, 2.5), rng.normal()) for _ in chosen]

    def f(z: torch.Tensor) -> torch.Tensor:
        for (atom, _), (scale, shift) in zip(chosen, maps, strict=True):
            z = atom(scale * z + shift)
        return z + 0.1

    def g(z: np.ndarray) -> np.ndarray:
        for (_, atom), (scale, shift) in zip(chosen, maps, strict=True):
            z = atom(scale * z + shift)
        return z + 0.1

    return f, g


def measurements() -> list[Measurement]:
    """Composed functions, and the activation modules of three packages."""
    return [
        Measurement(package="composed", model=f"{COUNT} random functions", rows=rows_of_composed),
        *(
            Measurement(package=package, model=f"{len(modules)} modules", rows=partial(rows_of_modules, package, modules))
            for package, modules in modules_of_others().items()
        ),
    ]


def rows_of_composed() -> Iterator[Row]:
    """Errors and times."""
    gs.gain(torch.relu)  # not the first call, which loads torch's functional calls
    errors, milliseconds = [], []
    for seed in range(COUNT):
        f, g = composed(seed)
        start = time.process_time()
        found = gs.gain(f)
        milliseconds.append(1e3 * (time.process_time() - start))
        errors.append(abs(found / float(_DENSITY @ g(_Z) ** 2) ** -0.5 - 1.0))
    named = {"situation": "activations", "package": "composed", "model": f"{COUNT} random functions"}
    yield row_over(errors, **named, quantity="relative error of the gain", asked=(0.0, ERROR))
    yield row_over(milliseconds, **named, quantity="milliseconds of processor", asked=(0.0, MILLISECONDS))


def modules_of_others() -> dict[str, list[nn.Module]]:
    """What the packages offer as activations of one entry."""
    cpu_torchvision()
    from timm.layers import activations as of_timm
    from transformers.activations import ACT2FN

    plain = (
        "ReLU", "GELU", "SiLU", "Mish", "ELU", "CELU", "SELU", "Tanh", "Hardswish", "Hardsigmoid", "Hardshrink", "Softshrink",
        "Softplus", "Softsign", "Tanhshrink", "LogSigmoid", "RReLU", "PReLU", "ReLU6", "LeakyReLU", "Sigmoid",
    )  # fmt: skip
    from_timm = ("Swish", "Mish", "HardSwish", "HardSigmoid", "HardMish", "PReLU", "GELU", "GELUTanh", "QuickGELU")
    return {
        "torch": [getattr(nn, name)() for name in plain],
        "timm": [getattr(of_timm, name)() for name in from_timm],
        "transformers": [ACT2FN[name] for name in ("gelu_new", "gelu_10", "gelu_fast", "quick_gelu", "laplace", "relu2", "mish")],
    }


def rows_of_modules(package: str, modules: list[nn.Module]) -> Iterator[Row]:
    """Against the mean square over 4 million stratified samples, in single precision as the module is used."""
    below = (torch.arange(2**22, dtype=torch.float64) + 0.5) / 2**22
    z = (2.0**0.5 * torch.special.erfinv(2.0 * below - 1.0)).float()
    with torch.no_grad():
        errors = [abs(gs.gain(module) * float(module(z).double().square().mean()) ** 0.5 - 1.0) for module in modules]
    named = {"situation": "activations", "package": package, "model": f"{len(modules)} modules"}
    yield row_over(errors, **named, quantity="relative error of the gain", asked=(0.0, ERROR))
