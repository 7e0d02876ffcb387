"""Second moments of every module output over draws of weights and inputs, kept on disk so that a run can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.zoo.reference import Example
from torch import nn

from gainstage.graph import tensor_leaves

DRAWS = Path(__file__).with_name("draws")  # not in version control: any run can make them again
FEWEST, MOST = 16, 64
SETTLED = 0.01  # standard error of the mean at which drawing stops


@dataclass(frozen=True, slots=True)
class Measured:
    """Moments of one module output over the draws."""

    module_type: str
    moments: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over draws."""
        return float(np.mean(self.moments))

    @property
    def error(self) -> float:
        """Standard error of the mean, relative to it."""
        return float(np.std(self.moments, ddof=1) / len(self.moments) ** 0.5 / self.mean) if self.mean > 0 else 0.0

    @property
    def spread(self) -> float:
        """Standard deviation of the log moment from draw to draw."""
        positive = [moment for moment in self.moments if moment > 0]
        return float(np.std(np.log(positive), ddof=1)) if len(positive) > 1 else 0.0


Pass = Callable[[Example], dict[str, tuple[str, float]]]


def measured(name: str, draw: Callable[[int], Example], run: Pass, *, most: int = MOST) -> dict[str, Measured]:
    """What ``run`` finds in each draw, by its keys. Resumes where an earlier run stopped.

    Draws until nine in ten modules have settled, at least FEWEST and at most ``most`` times.
    """
    path = DRAWS / (name.replace(":", "_") + ".json")
    kept: list[dict[str, tuple[str, float]]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    while len(kept) < FEWEST or (len(kept) < most and not _has_settled(kept)):
        kept.append(run(draw(1 + len(kept))))
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(kept), encoding="utf-8")
        partial.replace(path)
    return collected(kept[:most])


def forward_pass(example: Example, *, with_grad: bool = False) -> dict[str, tuple[str, float]]:
    """``"path@call"`` -> type and mean square of the call's first floating-point output in one forward pass.

    ``with_grad``: for models that differentiate inside forward.
    """
    found: dict[str, tuple[str, float]] = {}

    def note(key: str, module: nn.Module, tensor: torch.Tensor) -> None:
        found[key] = (type(module).__name__, _mean_square(tensor))

    with torch.set_grad_enabled(with_grad), module_outputs(example.model, note):
        example.model(*example.args, **(example.kwargs or {}))
    return found


def backward_pass(example: Example) -> dict[str, tuple[str, float]]:
    """``"path@call"`` and parameter name -> type and mean square of the gradient; outputs' weights are signs."""
    found: dict[str, tuple[str, float]] = {}

    def note(key: str, module: nn.Module, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda g: found.__setitem__(key, (type(module).__name__, _mean_square(g))))

    with module_outputs(example.model, note):
        result = example.model(*example.args, **(example.kwargs or {}))
    outputs = [tensor for tensor in tensor_leaves(result) if tensor.requires_grad]
    torch.autograd.backward(outputs, [_signs(tensor) for tensor in outputs])
    for name, parameter in example.model.named_parameters():
        if parameter.grad is not None:
            found[name] = ("parameter", _mean_square(parameter.grad))
    return found


def _signs(tensor: torch.Tensor) -> torch.Tensor:
    """Independent weights of mean 0 and second moment 1: signs, whose mean square does not stray."""
    return torch.randint_like(tensor, 2).mul_(2.0).sub_(1.0)


def _mean_square(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean())


@contextmanager
def module_outputs(model: nn.Module, note: Callable[[str, nn.Module, torch.Tensor], None]) -> Iterator[None]:
    """Call ``note`` with the key, the module and the first floating-point output of every module call."""
    calls: dict[str, int] = {}

    def hook_of(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            call = calls[path] = calls.get(path, -1) + 1
            tensors = tensor_leaves(output)
            if tensors and tensors[0].is_floating_point():
                note(f"{path}@{call}", module, tensors[0])

        return hook

    handles = [module.register_forward_hook(hook_of(path)) for path, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def collected(draws: list[dict[str, tuple[str, float]]]) -> dict[str, Measured]:
    """Moments by key, of keys that are in every draw."""
    keys = [key for key in draws[0] if all(key in draw for draw in draws)]
    return {key: Measured(draws[0][key][0], tuple(draw[key][1] for draw in draws)) for key in keys}


def _has_settled(draws: list[dict[str, tuple[str, float]]]) -> bool:
    return float(np.quantile([item.error for item in collected(draws).values()], 0.9)) < SETTLED


def one_thread() -> None:
    """Let two runs share two cores, and be reproducible."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
