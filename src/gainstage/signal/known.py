"""Values of known tensors: their own averages over pairs of entries, nothing random about them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gainstage.signal.axes import axes_of, new_dims
from gainstage.signal.marginal import Marginal
from gainstage.signal.patterns import pairs_of
from gainstage.signal.quadrature import Array, sample_quantiles
from gainstage.signal.value import Value

MOST_NUMBERS = 32  # centres or frequencies that are looked at one by one
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


def few_along_one(numbers: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
    """A few different numbers along a dimension of a tensor of this shape that has size 1; the same along all others."""
    if not any(size > 1 and own == 1 for size, own in zip(numbers.shape, shape, strict=True)):
        return None
    numbers = _without_copies(numbers)
    varying = [d for d, size in enumerate(numbers.shape) if size > 1]
    is_row = len(varying) == 1 and shape[varying[0]] == 1 and numbers.numel() <= MOST_NUMBERS
    return numbers if is_row and len(set(numbers.reshape(-1).tolist())) == numbers.numel() else None


def numbers_along(numbers: torch.Tensor | None, x: Value) -> Array | None:
    """Known numbers of one sign that differ along one axis of x, such as the sizes of neighbourhoods or the lengths of samples.

    One for each coordinate of that axis, in an array with one dimension for each axis.
    """
    numbers = None if numbers is None else _without_copies(numbers)
    varying = [] if numbers is None else [d - numbers.dim() for d, size in enumerate(numbers.shape) if size > 1]
    if numbers is None or len(varying) != 1 or len(x.dims[varying[0]]) != 1 or numbers.numel() != x.shape[varying[0]]:
        return None
    if not bool((numbers > 0.0).all() or (numbers < 0.0).all()):
        return None
    position = x.axes.index(x.dims[varying[0]][0])
    return numbers.double().reshape([-1 if p == position else 1 for p in range(len(x.axes))]).numpy()


def _without_copies(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers with size 1 in place of each dimension along which they are the same."""
    for d, size in enumerate(numbers.shape):
        first = numbers.narrow(d, 0, min(size, 1))
        if size > 1 and torch.equal(first, numbers.narrow(d, 1, 1)) and torch.equal(first.expand_as(numbers), numbers):
            numbers = first
    return numbers
