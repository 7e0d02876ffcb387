"""Look-ups and indexing by known integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gainstage.rules.registry import Call, rule
from gainstage.signal import Value, lookup, reshape

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(call: Call, weight: Value, index: Value, *args: Any) -> Value:
    """Rows of the weight: the fan-in of a look-up is 1. Equal tokens share a row."""
    assert index.constant is not None
    return lookup(weight, 0, index.constant)


@rule(aten.index.Tensor)
def indexed(call: Call, x: Value, indices: Sequence[Value | None]) -> Value:
    """Rows by integer tensors along consecutive dimensions."""
    dims = [d for d, index in enumerate(indices) if index is not None]
    picked = [index.constant for index in indices if index is not None]
    assert all(index is not None for index in picked)
    known = [index for index in picked if index is not None]
    tensors = list(torch.functional.broadcast_tensors(*known))  # type: ignore[no-untyped-call]
    first = dims[0]
    assert dims == list(range(first, first + len(dims)))
    sizes = [x.shape[d] for d in dims]
    flat = torch.zeros_like(tensors[0], dtype=torch.int64)
    for index, size in zip(tensors, sizes, strict=True):
        flat = flat * size + index.to(torch.int64) % size
    shape = [*x.shape[:first], -1, *x.shape[first + len(dims) :]]
    return reshape(lookup(reshape(x, shape), first, flat), call.shape)


@rule(aten.index_select.default)
def index_selected(call: Call, x: Value, dim: int, index: Value) -> Value:
    """Rows along one dimension."""
    assert index.constant is not None
    return lookup(x, dim % len(x.dims), index.constant)
