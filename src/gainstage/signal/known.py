"""Values of known tensors: their own averages over pairs of entries, nothing random about them."""

from __future__ import annotations

import numpy as np
import torch

from gainstage.signal.axes import axes_of, new_dims
from gainstage.signal.marginal import Marginal
from gainstage.signal.patterns import pairs_of
from gainstage.signal.quadrature import sample_quantiles
from gainstage.signal.value import Value

LARGE = 1e18  # a mask's minus infinity has no moments


def measured(tensor: torch.Tensor, **extra: object) -> Value:
    """Value of a known tensor: its own averages over pairs of entries, its own distribution of entries."""
    data = tensor.detach().to("cpu", torch.float64)
    dims = new_dims(tuple(data.shape))
    axes = axes_of(dims)
    table = pairs_of(data.reshape([axis.size for axis in axes]).numpy())
    entries = data.reshape(-1).numpy() if data.numel() else np.zeros(1)  # of nothing there is nothing to say
    mean = float(entries.mean())
    if entries.size > 65536:  # the distribution of entries needs no more
        entries = entries[:: entries.size // 32768]
    return Value(
        dims=dims,
        mean=mean,
        table=table,
        marginal=Marginal(object(), lambda: sample_quantiles(entries)),
        source=object(),
        **extra,  # type: ignore[arg-type]
    )


def known(tensor: torch.Tensor) -> Value:
    """Value of a constant: nothing about it is random, its entries are at hand."""
    return measured(tensor.to(torch.float64).clamp(-LARGE, LARGE), constant=tensor)
