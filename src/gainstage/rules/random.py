"""Ops that draw random numbers."""

from __future__ import annotations

from typing import Any

import torch

from gainstage.rules.registry import Call, rule
from gainstage.signal import Value, coins, dropout, independent

aten = torch.ops.aten


@rule(aten.dropout.default)
def elementwise_dropout(call: Call, x: Value, p: float, train: bool) -> Value:
    """Inverted dropout: ``E[x^2] / (1 - p)``, mean and correlations unchanged."""
    return dropout(x, 1.0 - p) if train and 0.0 < p < 1.0 else x


@rule(aten.feature_dropout.default)
def channel_dropout(call: Call, x: Value, p: float, train: bool) -> Value:
    """Dropout of whole channels: the positions of one channel share the coin."""
    return dropout(x, 1.0 - p, shared=range(2, len(x.dims))) if train and 0.0 < p < 1.0 else x


@rule(aten.bernoulli.p, aten.bernoulli.default)
def bernoulli(call: Call, x: Value, p: float = 0.5, **kwargs: Any) -> Value:
    """Independent coins: mean p, second moment p."""
    return coins(call.shape, p)


@rule(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
def empty(call: Call, *args: Any, **kwargs: Any) -> Value:
    """Memory that something else is written into."""
    return independent(call.shape, 0.0, 0.0)


@rule(aten.rand.default, aten.rand_like.default)
def uniform(call: Call, *args: Any, **kwargs: Any) -> Value:
    """Uniform on [0, 1)."""
    return independent(call.shape, 0.5, 12.0**-0.5)


@rule(aten.randn.default, aten.randn_like.default)
def normal(call: Call, *args: Any, **kwargs: Any) -> Value:
    """Standard normal."""
    return independent(call.shape, 0.0, 1.0)
