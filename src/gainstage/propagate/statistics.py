"""Statistics of what the graph starts from: present parameters and the inputs that the user gave."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gainstage.errors import NonFiniteError
from gainstage.graph import ParameterInfo
from gainstage.signal import Value, independent, measured


def parameter_moments(parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Mean and variance of the entries of each parameter, in float64.

    A mean within four standard errors of zero is taken as zero: it is what a zero-mean draw of that size shows.

    Raises:
        NonFiniteError: NaN or infinity in a parameter; names them all.
    """
    found: dict[str, tuple[float, float]] = {}
    bad: list[str] = []
    for name, tensor in parameters.items():
        data = tensor.detach()
        variance, mean = (float(v) for v in torch.var_mean(data.to(torch.float32), correction=0))
        if not (abs(mean) < float("inf") and variance < float("inf")):
            bad.append(name)
            continue
        if mean**2 * data.numel() < 16.0 * variance:
            variance, mean = variance + mean**2, 0.0
        elif variance < 1e-12 * mean**2:
            variance = 0.0
        found[name] = (mean, variance)
    if bad:
        raise NonFiniteError(f"NaN or infinity in parameter(s) {', '.join(bad[:8])}: initialise them before inspecting the model")
    return found


def parameter_value(info: ParameterInfo, index: int, mean: float, variance: float) -> Value:
    """Independent entries with these moments."""
    return independent(info.shape, mean, variance**0.5, lineage=1 << index, is_weight=True)


def input_value(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> Value:
    """Measured statistics of an input; standard normal where there is no data, or data that looks just like it.

    Raises:
        NonFiniteError: NaN or infinity in the input.
    """
    if tensor is None or tensor.is_meta:
        return independent(shape, 0.0, 1.0)
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"NaN or infinity in input {name!r}: give example inputs that are finite")
    value = measured(tensor)
    tolerance = 5.0 / max(tensor.numel(), 1) ** 0.5
    expected = independent(shape, 0.0, 1.0)
    near = abs(value.mean) < tolerance and bool((abs(value.table - expected.table) < 2.0 * tolerance).all())
    return expected if near else value
