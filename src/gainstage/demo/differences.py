"""What tells samples apart: the share of a second moment that differs from one sample to another, predicted and measured."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gainstage.propagate import Trace

# Where two entries agree in all digits of double precision.
SMALLEST = 2.0**-52
SINGLE_PRECISION = 2.0**-24  # half the distance from 1 to the next number


def predicted_differences(trace: Trace) -> dict[str, float]:
    """``1 - E[x_i x_j] / E[x^2]`` at each convolution and linear layer, i and j the same entry of two samples."""
    layers = {call.path for call in trace.calls if call.module_type.rpartition(".")[2] in {"Conv2d", "Linear"}}
    return {path: max(1.0 - signals[0].cosine(0), SMALLEST) for path, signals in trace.modules.items() if path in layers}


def measured_differences(model: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """The same, from a forward pass in double precision: the mean over all entries and all pairs of the images."""
    model = copy.deepcopy(model).double()
    found: dict[str, float] = {}

    def measure(path: str, output: torch.Tensor) -> None:
        entries = output.flatten(1)
        # Of n samples the mean over pairs of x_i x_j is (n mean(x)^2 - mean(x^2)) / (n - 1), so that 1 - cosine is n/(n-1)
        # times the variance over samples, over the second moment.
        variance = entries.var(dim=0, unbiased=True).mean()
        found[path] = max((variance / entries.square().mean()).item(), SMALLEST)

    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda _, __, output, path=path: measure(path, output))
    with torch.no_grad():
        model(images.double())
    return found
