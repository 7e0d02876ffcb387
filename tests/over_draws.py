"""The mean over draws of weights and inputs of what a model returns."""

from __future__ import annotations

import math

import numpy as np
import torch


def second_moment_over_draws(make: object, shape: tuple[int, ...], count: int) -> tuple[float, float]:
    """Mean over draws of weights and inputs of the second moment, and its relative standard error."""
    assert callable(make)
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            found.append(float(model(torch.randn(shape)).double().square().mean()))
    return float(np.mean(found)), float(np.std(found) / np.mean(found) / math.sqrt(count))
