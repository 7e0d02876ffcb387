"""Draw tensors that have a given table: the way to treat an op without a rule, and the judge of those that have one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.known import measured
from gainstage.signal.pairing import spectrum
from gainstage.signal.quadrature import Array, between_nodes
from gainstage.signal.traits import Logits
from gainstage.signal.value import Value

LEAST_VARIED, CERTAIN = (
    1e-2,
    6.0,
)  # variance of levels that is looked at; standard errors by which it has to be more than an error


def draw(values: Sequence[Value], generator: np.random.Generator) -> list[torch.Tensor]:
    """One joint sample of several tensors, float64. Values on one latent with the same axes are functions of one sample."""
    latents: dict[tuple[object, ...], Array] = {}
    tensors = []
    for value in values:
        if value.constant is not None:
            tensors.append(value.constant)
            continue
        if value.logits is not None and value.logits.table is value.table:
            tensors.append(_softmax_of(value.logits, generator).reshape(value.shape))
            continue
        key = (value.marginal.latent, *value.axes)
        if key not in latents:
            latents[key] = _correlated_normals(value, generator)
        sample = between_nodes(latents[key], value.marginal.values)
        tensors.append(torch.from_numpy(sample.reshape(value.shape)))
    return tensors


def _softmax_of(logits: Logits, generator: np.random.Generator) -> torch.Tensor:
    """Probabilities that sum to 1, from a sample of what they are the softmax of."""
    (sample,) = draw([logits.of], generator)
    prior = logits.of.prior
    return (sample if prior is None else sample + prior).softmax(logits.dim).nan_to_num(0.0)


def _correlated_normals(value: Value, generator: np.random.Generator) -> Array:
    """Normals with the correlations of the latent: white noise, each component brought to its size."""
    sizes = [axis.size for axis in value.axes]
    noise = generator.standard_normal(sizes)
    white = np.zeros((2,) * len(sizes))
    white[(1,) * len(sizes)] = 1.0
    wanted = np.maximum(spectrum(value.correlation(), sizes), 0.0)
    factors = np.sqrt(wanted / np.maximum(spectrum(white, sizes), 1e-300))
    return np.asarray(np.broadcast_to(_scaled_components(noise, factors), sizes))


def _scaled_components(part: Array, factors: Array) -> Array:
    """Sum of the components of ``part``, each times its factor; the first axis of ``factors`` tells mean from deviation."""
    if (factors == factors.flat[0]).all():
        return np.asarray(part * factors.flat[0])
    axis = part.ndim - factors.ndim
    mean = part.mean(axis=axis, keepdims=True)
    return _scaled_components(mean, factors[0]) + _scaled_components(part - mean, factors[1])


def pooled(samples: Sequence[torch.Tensor]) -> tuple[float, Array]:
    """Mean and table of raw second moments over several samples of one tensor."""
    tables = [measured(sample) for sample in samples]
    mean = float(np.mean([value.mean for value in tables]))
    return mean, np.asarray(np.mean([value.table for value in tables], axis=0))


def common_profile(samples: Sequence[torch.Tensor]) -> Array | None:
    """Levels that all samples of a tensor have in common: where an axis has loud and quiet coordinates by design.

    Along each axis, relative to the sample's own: mean squares whose variance over coordinates is more than their error. Of the
    deviations from 1 as much is kept as is not due to the error, the share ``1 - 1 / F``.
    """
    sizes = [size for size in samples[0].shape if size > 1]
    if len(samples) < 2:
        return None
    squares = np.stack([sample.double().reshape(sizes).square().numpy() for sample in samples])
    profile = np.ones((1,) * len(sizes))
    for position, size in enumerate(sizes):
        along = squares.mean(axis=tuple(p + 1 for p in range(len(sizes)) if p != position))
        whole = along.mean(axis=1, keepdims=True)
        if not (whole > 0.0).all():
            return None
        along = along / whole
        error = float(along.var(axis=0, ddof=1).mean()) / len(samples)
        variance = float(along.mean(axis=0).var(ddof=1))
        if variance > LEAST_VARIED and variance > error * (1.0 + CERTAIN * (2.0 / (size - 1)) ** 0.5):
            kept = 1.0 + (1.0 - error / variance) * (along.mean(axis=0) - 1.0)
            profile = profile * np.sqrt(np.maximum(kept, 0.0)).reshape([-1 if p == position else 1 for p in range(len(sizes))])
    return levels.normalised(profile)
