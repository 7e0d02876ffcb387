"""Draw tensors that have a given table: the way to treat an op without a rule, and the judge of those that have one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.axes import axes_of, new_dims
from gainstage.signal.pairing import spectrum
from gainstage.signal.patterns import averaged, pairs_of
from gainstage.signal.quadrature import Array, between_nodes
from gainstage.signal.traits import Logits
from gainstage.signal.value import Value

LEAST_VARIED, CERTAIN = (
    1e-2,
    6.0,
)  # variance of levels that is looked at; standard errors by which it has to be more than an error


def draw(values: Sequence[Value], generator: np.random.Generator) -> list[torch.Tensor]:
    """One joint sample of several tensors, float64. Values on one latent with the same axes are functions of one sample."""
    return draw_often(values, generator, 1)[0]


def draw_often(values: Sequence[Value], generator: np.random.Generator, count: int) -> list[list[torch.Tensor]]:
    """``count`` joint samples, the same as if they were drawn one after the other."""
    keys = [_key(value, place) for place, value in enumerate(values)]
    latents = {key: _drawn(value) for key, value in zip(keys, values, strict=True) if _drawn(value).constant is None}
    noise: dict[object, list[Array]] = {key: [] for key in latents}
    for _ in range(count):
        for key, value in latents.items():
            noise[key].append(generator.standard_normal([axis.size for axis in value.axes]))
    normals = {key: _correlated_normals(value, np.stack(noise[key])) for key, value in latents.items()}
    found = [_samples(value, normals.get(key), count) for key, value in zip(keys, values, strict=True)]
    return [list(each) for each in zip(*found, strict=True)] if found else [[] for _ in range(count)]


def _is_softmax(value: Value) -> bool:
    return value.constant is None and value.logits is not None and value.logits.table is value.table


def _drawn(value: Value) -> Value:
    """The value that is drawn for this one: for a softmax its logits."""
    return _drawn(value.logits.of) if _is_softmax(value) and value.logits is not None else value


def _key(value: Value, place: int) -> object:
    """What values that are functions of one sample have in common."""
    return place if _is_softmax(value) else (value.marginal.latent, *value.axes)


def _samples(value: Value, normals: Array | None, count: int) -> Sequence[torch.Tensor]:
    if value.constant is not None:
        return [value.constant] * count
    if value.logits is not None and _is_softmax(value):
        return [_softmax_of(value.logits, each).reshape(value.shape) for each in _samples(value.logits.of, normals, count)]
    assert normals is not None
    return list(torch.from_numpy(between_nodes(normals, value.marginal.values).reshape(count, *value.shape)))


def _softmax_of(logits: Logits, sample: torch.Tensor) -> torch.Tensor:
    """Probabilities that sum to 1, from a sample of what they are the softmax of."""
    prior, fields = logits.of.prior, logits.of.fields
    sample = sample if fields is None else sample + fields[0]
    return (sample if prior is None else sample + prior).softmax(logits.dim).nan_to_num(0.0)


def _correlated_normals(value: Value, noise: Array) -> Array:
    """Normals with the correlations of the latent: white noise, draw by draw, each component brought to its size."""
    sizes = [axis.size for axis in value.axes]
    white = np.zeros((2,) * len(sizes))
    white[(1,) * len(sizes)] = 1.0
    wanted = np.maximum(spectrum(value.correlation(), sizes), 0.0)
    factors = np.sqrt(wanted / np.maximum(spectrum(white, sizes), 1e-300))
    return np.asarray(np.broadcast_to(_scaled_components(noise, factors), noise.shape))


def _scaled_components(part: Array, factors: Array) -> Array:
    """Sum of the components of ``part``, each times its factor; the first axis of ``factors`` tells mean from deviation."""
    if (factors == factors.flat[0]).all():
        return np.asarray(part * factors.flat[0])
    axis = part.ndim - factors.ndim
    mean = averaged(part, axis)
    return _scaled_components(mean, factors[0]) + _scaled_components(part - mean, factors[1])


def pooled(samples: Sequence[torch.Tensor]) -> tuple[float, Array]:
    """Mean and table of raw second moments over several samples of one tensor."""
    data = torch.stack(list(samples)).to("cpu", torch.float64)
    sizes = [axis.size for axis in axes_of(new_dims(tuple(samples[0].shape)))]
    return float(data.mean()), pairs_of(data.reshape(len(samples), *sizes).numpy(), draws=1)


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
        blocks = squares.reshape(len(samples), -1, size, math.prod(sizes[position + 1 :]))
        along = averaged(averaged(blocks, 3), 1).reshape(len(samples), size)
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
