"""Ops that draw random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gainstage.rules.registry import Call, rule
from gainstage.signal import Value, coins, combine, dropout, independent
from gainstage.signal.copies import replace
from gainstage.signal.marginal import Marginal
from gainstage.signal.quadrature import cumulative

aten = torch.ops.aten


@rule(aten.dropout.default)
def elementwise_dropout(call: Call, x: Value, p: float, train: bool) -> Value:
    """Inverted dropout: ``E[x^2] / (1 - p)``, mean and correlations unchanged."""
    return dropout(x, 1.0 - p) if train and 0.0 < p < 1.0 else x


@rule(aten.feature_dropout.default)
def channel_dropout(call: Call, x: Value, p: float, train: bool) -> Value:
    """Dropout of whole channels: the positions of one channel share the coin."""
    return dropout(x, 1.0 - p, shared=range(2, len(x.dims))) if train and 0.0 < p < 1.0 else x


@rule(aten.bernoulli.p)
def bernoulli(call: Call, x: Value, p: float = 0.5, **kwargs: Any) -> Value:
    """Independent coins: mean p, second moment p."""
    return coins(call.shape, p)


@rule(aten.bernoulli.default)
def bernoulli_of(call: Call, x: Value, **kwargs: Any) -> Value:
    """Coins that are thrown with the probabilities x: ``1[u < x]`` for a uniform u."""
    return combine(torch.lt, uniform(call), x)


@rule(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
def empty(call: Call, *args: Any, **kwargs: Any) -> Value:
    """Memory that something else is written into."""
    return independent(call.shape, 0.0, 0.0)


@rule(aten.rand.default, aten.rand_like.default)
def uniform(call: Call, *args: Any, **kwargs: Any) -> Value:
    """Uniform on [0, 1)."""
    return between(call.shape, 0.0, 1.0)


@rule(aten.uniform.default)
def uniform_between(call: Call, x: Value, low: float = 0.0, high: float = 1.0, **kwargs: Any) -> Value:
    """Uniform on [low, high)."""
    return between(call.shape, low, high)


def between(shape: tuple[int, ...], low: float, high: float) -> Value:
    """Independent entries, uniform between two numbers."""
    x = independent(shape, 0.5 * (low + high), (high - low) * 12.0**-0.5)
    return replace(x, marginal=Marginal(object(), lambda: low + (high - low) * cumulative()))


@rule(aten.exponential.default)
def exponential(call: Call, x: Value, rate: float = 1.0, **kwargs: Any) -> Value:
    """Independent entries with density ``rate exp(-rate t)``."""
    found = independent(call.shape, 1.0 / rate, 1.0 / rate)
    return replace(found, marginal=Marginal(object(), lambda: -np.log(cumulative()[::-1]) / rate))


@rule(aten.randn.default, aten.randn_like.default)
def normal(call: Call, *args: Any, **kwargs: Any) -> Value:
    """Standard normal."""
    return independent(call.shape, 0.0, 1.0)
