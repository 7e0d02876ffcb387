"""Values of known tensors: their own averages over pairs of entries, nothing random about them."""

from __future__ import annotations

import numpy as np
import torch

from gainstage.signal.axes import axes_of, new_dims
from gainstage.signal.marginal import Marginal
from gainstage.signal.quadrature import Array, sample_quantiles
from gainstage.signal.value import Value

LARGE = 1e18  # a mask's minus infinity has no moments


def spread_pairs(averaged: Array, sizes: tuple[int, ...]) -> Array:
    """Turn averages over all pairs into averages over pairs that differ.

    In ``averaged`` index 0 of an axis means "averaged over all pairs of coordinates", equal ones included, which is
    ``K[0] + (K[1] - K[0]) / n``; solved for ``K[0]`` along each axis of size n.
    """
    table = averaged.copy()
    for position, size in enumerate(sizes):
        same, mixed = np.take(table, 1, axis=position), np.take(table, 0, axis=position)
        table = np.stack([(size * mixed - same) / (size - 1), same], axis=position)
    return table


def measured(tensor: torch.Tensor, **extra: object) -> Value:
    """Value of a known tensor: its own averages over pairs of entries, its own distribution of entries."""
    data = tensor.detach().to("cpu", torch.float64)
    dims = new_dims(tuple(data.shape))
    axes = axes_of(dims)
    flat = data.reshape([axis.size for axis in axes])
    averaged = np.empty((2,) * len(axes))
    for subset in np.ndindex(*averaged.shape):
        others = [position for position, same in enumerate(subset) if not same]
        cell = flat.mean(dim=others) if others else flat
        averaged[subset] = float(cell.square().mean())
    table = spread_pairs(averaged, tuple(axis.size for axis in axes))
    entries = flat.reshape(-1).numpy()
    if entries.size > 65536:  # the distribution of entries needs no more
        entries = entries[:: entries.size // 32768]
    return Value(
        dims=dims,
        mean=float(flat.mean()),
        table=table,
        marginal=Marginal(object(), lambda: sample_quantiles(entries)),
        source=object(),
        **extra,  # type: ignore[arg-type]
    )


def known(tensor: torch.Tensor) -> Value:
    """Value of a constant: nothing about it is random, its entries are at hand."""
    return measured(tensor.to(torch.float64).clamp(-LARGE, LARGE), constant=tensor)
