"""Entries that are added up at places which integers name: the sum over the neighbours of a node in a graph network."""

from __future__ import annotations

import numpy as np
import torch

from gainstage.rules.indexing import known_integers
from gainstage.rules.registry import Call, rule
from gainstage.signal import Value, combine, filter_dim
from gainstage.signal.quadrature import Array

aten = torch.ops.aten

# Coefficients of the map from entries to places; larger ones are left to samples.
_LARGEST = 2**24


@rule(aten.scatter_add.default)
def scattered(call: Call, x: Value, dim: int, index: Value, source: Value) -> Value:
    """``y_p = x_p + sum_j [i_j = p] s_j`` along one dimension, for integers that are the same at all others."""
    dim %= len(x.dims)
    return combine(torch.add, x, filter_dim(source, dim, sums_at(integers_along(index, dim, source.shape), x.shape[dim])))


@rule(aten.scatter_reduce.two)
def reduced(call: Call, x: Value, dim: int, index: Value, source: Value, reduce: str, *, include_self: bool = True) -> Value:
    """Sums or means at the places; without ``include_self`` the old entries stay where nothing comes."""
    dim %= len(x.dims)
    kept, matrix = shares_at(integers_along(index, dim, source.shape), x.shape[dim], reduce, include_self=include_self)
    if not include_self and kept.any() and x.second_moment > 0.0:
        raise NotImplementedError("old entries at some places, new ones at the others")
    return combine(torch.add, filter_dim(x, dim, np.diag(kept)), filter_dim(source, dim, matrix))


def shares_at(index: torch.Tensor, size: int, reduce: str, *, include_self: bool) -> tuple[Array, Array]:
    """How much of each old entry is in a sum or mean, [places], and how much of each new one, [places, entries]."""
    if reduce not in ("sum", "mean"):
        raise NotImplementedError("the largest, smallest or product of entries that meet")
    matrix = sums_at(index, size)
    counts = matrix.sum(1)
    kept = np.ones_like(counts) if include_self else (counts == 0.0).astype(float)
    whole = counts + kept if reduce == "mean" else np.ones_like(counts)
    return kept / whole, matrix / whole[:, None]


def integers_along(index: Value, dim: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The integers along one dimension, where they are the same at all others and there is one for each entry."""
    integers = known_integers(index)
    first = integers[tuple(slice(None) if d == dim else slice(0, 1) for d in range(integers.dim()))]
    if tuple(integers.shape) != shape or not bool((integers == first).all()):
        raise NotImplementedError("integers that differ along other dimensions")
    return first.reshape(-1)


def sums_at(index: torch.Tensor, size: int) -> Array:
    """``[i_j = p]``, [places, entries]."""
    if size * index.numel() > _LARGEST:
        raise NotImplementedError("a map of so many entries to so many places")
    return np.asarray((index.reshape(1, -1) % size == torch.arange(size)[:, None]).double().numpy())
