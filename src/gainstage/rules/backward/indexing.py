"""Gradients of look-ups: each row gets the sum of what its copies got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gainstage.rules.backward.registry import BackwardCall, Gradient, backward
from gainstage.rules.indexing import known_integers, places_in_windows
from gainstage.rules.scatter import integers_along, shares_at
from gainstage.signal import Value, affine, filter_dim, lookup, lookup_gradient, permute, reshape

aten = torch.ops.aten


@backward(aten.embedding.default)
def embedding(call: BackwardCall, g: Value, weight: Value, index: Value, *args: Any) -> tuple[Gradient, ...]:
    """Sum over the tokens of a row."""
    return lookup_gradient(g, known_integers(index), weight.shape[0]), None


@backward(aten.index_select.default)
def index_selected(call: BackwardCall, g: Value, x: Value, dim: int, index: Value) -> tuple[Gradient, ...]:
    """Sum over the copies of a row."""
    dim %= len(x.dims)
    return _rows(g, x, [dim], [known_integers(index)]), None, None


@backward(aten.unfold.default)
def windows(call: BackwardCall, g: Value, x: Value, dim: int, size: int, step: int) -> tuple[Gradient, ...]:
    """Sum over the windows that hold an entry."""
    dim %= len(x.dims)
    inside = permute(g, [*range(dim + 1), len(g.dims) - 1, *range(dim + 1, len(g.dims) - 1)])
    return _rows(inside, x, [dim], [places_in_windows(x.shape[dim], size, step)]), None, None, None


@backward(aten.index.Tensor, aten._unsafe_index.Tensor)
def indexed(call: BackwardCall, g: Value, x: Value, indices: Sequence[Value | None]) -> tuple[Any, ...]:
    """Sum over the copies of each entry of the indexed dimensions."""
    dims = [d for d, index in enumerate(indices) if index is not None]
    found = [known_integers(index) for index in indices if index is not None]
    if dims != list(range(dims[0], dims[0] + len(dims))) or any(index.dtype in (torch.bool, torch.uint8) for index in found):
        raise NotImplementedError("gradient of an index by masks, or over dimensions that are apart")
    return _rows(g, x, dims, found), None


@backward(aten.index_add.default)
def added_at(
    call: BackwardCall, g: Value, x: Value, dim: int, index: Value, source: Value, *, alpha: float = 1.0
) -> tuple[Gradient, ...]:
    """The gradient itself, and its copies at the places that the entries went to."""
    return g, None, None, affine(lookup(g, dim % len(x.dims), known_integers(index)), float(alpha))


@backward(aten.scatter_add.default)
def scattered(call: BackwardCall, g: Value, x: Value, dim: int, index: Value, source: Value) -> tuple[Gradient, ...]:
    """As :func:`added_at`."""
    dim %= len(x.dims)
    return g, None, None, lookup(g, dim, integers_along(index, dim, source.shape))


@backward(aten.scatter_reduce.two)
def reduced(
    call: BackwardCall, g: Value, x: Value, dim: int, index: Value, source: Value, reduce: str, *, include_self: bool = True
) -> tuple[Gradient, ...]:
    """As :func:`added_at`, each by its share in the sum or mean."""
    dim %= len(x.dims)
    kept, matrix = shares_at(integers_along(index, dim, source.shape), x.shape[dim], reduce, include_self=include_self)
    return filter_dim(g, dim, np.diag(kept)), None, None, filter_dim(g, dim, matrix.T), None


def _rows(g: Value, x: Value, dims: Sequence[int], indices: Sequence[torch.Tensor]) -> Value:
    """The indexed dimensions as one in front, the sum over equal indices, and everything back in its place."""
    tensors = torch.functional.broadcast_tensors(*(index.long() for index in indices))  # type: ignore[no-untyped-call]
    sizes = [x.shape[d] for d in dims]
    flat = torch.zeros_like(tensors[0])
    for index, size in zip(tensors, sizes, strict=True):
        flat = flat * size + index % size
    first, rank = dims[0], flat.dim()
    others = [d for d in range(len(g.dims)) if not first <= d < first + rank]
    summed = lookup_gradient(permute(g, [*range(first, first + rank), *others]), flat, int(np.prod(sizes)))
    split = reshape(summed, (*sizes, *summed.shape[1:]))
    order = [*dims, *(d for d in range(len(x.dims)) if d not in dims)]
    return permute(split, np.argsort(order).tolist())
