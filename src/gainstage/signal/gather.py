"""Look-ups: rows of a tensor picked by known integers."""

from __future__ import annotations

import numpy as np
import torch

from gainstage.signal.axes import Axis, axes_of, new_dims
from gainstage.signal.movement import merge_dim
from gainstage.signal.quadrature import Array
from gainstage.signal.value import Marginal, Value, spread_pairs


def same_index_table(index: torch.Tensor) -> tuple[Array, tuple[tuple[Axis, ...], ...]]:
    """Probability that two entries of an integer tensor are equal, by the coordinates that they share."""
    dims = new_dims(tuple(index.shape))
    axes = axes_of(dims)
    flat = index.reshape([axis.size for axis in axes]).cpu().numpy()
    _, flat_ids = np.unique(flat, return_inverse=True)
    ids = flat_ids.reshape(flat.shape)
    count = int(ids.max()) + 1 if ids.size else 1
    averaged = np.empty((2,) * len(axes))
    for subset in np.ndindex(*averaged.shape):
        kept = [p for p, same in enumerate(subset) if same]
        others = [p for p, same in enumerate(subset) if not same]
        rows = np.transpose(ids, kept + others).reshape(int(np.prod([flat.shape[p] for p in kept])), -1)
        keys = rows + count * np.arange(rows.shape[0])[:, None]
        _, frequency = np.unique(keys, return_counts=True)
        averaged[subset] = float((frequency.astype(float) ** 2).sum()) / (rows.shape[0] * rows.shape[1] ** 2)
    return spread_pairs(averaged, tuple(axis.size for axis in axes)), dims


def lookup(weight: Value, dim: int, index: torch.Tensor) -> Value:
    """``weight`` with one dimension replaced by those of ``index``: entries with the same index share the row."""
    equal, index_dims = same_index_table(index)
    position = sum(len(d) for d in weight.dims[:dim])
    weight = merge_dim(weight, dim)
    if weight.dims[dim]:
        table = np.moveaxis(weight.table, position, 0)
        other, same = table[0], table[1]
    else:
        other = same = weight.table
    extra = equal.ndim
    before = position
    shaped = equal.reshape((1,) * before + equal.shape + (1,) * (same.ndim - before))
    expand_at = tuple(range(before, before + extra))
    mixed = shaped * np.expand_dims(same, expand_at) + (1.0 - shaped) * np.expand_dims(other, expand_at)
    dims = (*weight.dims[:dim], *index_dims, *weight.dims[dim + 1 :])
    return Value(
        dims=dims,
        mean=weight.mean,
        table=mixed,
        marginal=Marginal(object(), lambda: weight.marginal.values),
        source=object(),
        lineage=weight.lineage,
        log_variance=weight.log_variance,
    )
