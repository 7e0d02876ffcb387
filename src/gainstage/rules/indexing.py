"""Look-ups and indexing by known integers and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gainstage.rules.registry import Call, rule
from gainstage.rules.shapes import kept_apart
from gainstage.signal import Value, affine, contract, filter_dim, gathered, lookup, permute, pick, reshape, take
from gainstage.signal.copies import replace

aten = torch.ops.aten

LARGEST = 2  # mode of a bag: 0 is the sum, 1 the mean
MOST_SHARES = 2**24  # coefficients of the map from rows to bags; more are left to samples


def known_integers(index: Value) -> torch.Tensor:
    """The integers themselves: an index that is not known cannot be followed."""
    if index.constant is None:
        raise NotImplementedError("an index that depends on data")
    return index.constant


@rule(aten.embedding.default)
def embedding(call: Call, weight: Value, index: Value, padding_idx: int = -1, *args: Any) -> Value:
    """Rows of the weight: the fan-in of a look-up is 1. Equal tokens share a row.

    Where all that is looked up is padding it is 0, which that row is kept at.
    """
    rows = known_integers(index)
    found = lookup(weight, 0, rows)
    return affine(found, 0.0) if padding_idx >= 0 and bool((rows == padding_idx).all()) else found


@rule(aten.embedding_bag.padding_idx, aten.embedding_bag.default)
def embedding_bag(
    call: Call, weight: Value, indices: Value, offsets: Value, scale_grad_by_freq: bool = False, mode: int = 0,
    sparse: bool = False, per_sample_weights: Value | None = None, include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Value | None, ...]:  # fmt: skip
    """Sum or mean of the rows in each bag: ``A w``, with how often each row that is there lies in each bag.

    Of rows with weights, in bags of one size: ``sum over k of s_bk w_bk``, the rows of a bag independent of their weights.
    """
    rows, starts = known_integers(indices), known_integers(offsets)
    starts = starts[:-1] if include_last_offset else starts
    size = len(rows) // max(len(starts), 1)
    if per_sample_weights is not None and padding_idx in (None, -1) and torch.equal(starts, size * torch.arange(len(starts))):
        bags = (len(starts), size)
        picked = reshape(lookup(weight, 0, rows), (*bags, weight.shape[1]))
        return contract(reshape(per_sample_weights, bags), picked, "bk", "bkd", "bd"), None, None, None
    bag = torch.searchsorted(starts.contiguous(), torch.arange(len(rows)), right=True) - 1
    if padding_idx is not None:
        bag, rows = bag[rows != padding_idx], rows[rows != padding_idx]
    counts = torch.bincount(bag, minlength=len(starts))
    if per_sample_weights is not None or mode == LARGEST or not bool((counts > 0).all()):
        raise NotImplementedError("rows with weights in bags of many sizes, the largest of rows, or bags without any")
    used, which = rows.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    if len(starts) * len(used) > MOST_SHARES:
        raise NotImplementedError("a map of so many rows to so many bags")
    shares = torch.zeros(len(starts), len(used), dtype=torch.float64)
    shares.index_put_((bag, which), torch.ones(len(rows), dtype=torch.float64), accumulate=True)
    shares = shares / counts[:, None] if mode else shares
    return filter_dim(lookup(weight, 0, used), 0, shares.numpy()), None, None, None


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def indexed(call: Call, x: Value, indices: Sequence[Value | None]) -> Value:
    """Rows by integers or masks; where the indexed dimensions are apart, theirs come first in the result."""
    places = places_along(x, indices)
    dims, positive = [d for d, _ in places], [index for _, index in places]
    if x.added is not None and len(dims) > 1 and len(places) == sum(index is not None for index in indices):
        return kept_apart(
            x,
            lambda y: indexed(call, replace(y, added=None), indices),
            lambda known: aten.index(known, [None if index is None else index.constant for index in indices]),
        )
    if dims != list(range(dims[0], dims[0] + len(dims))):
        x = permute(x, [*dims, *(d for d in range(len(x.dims)) if d not in dims)])
        dims = list(range(len(dims)))
    found = lookup(x, dims[0], positive[0]) if len(dims) == 1 else pick(x, dims[0], positive)
    return reshape(found, call.shape)


def places_along(x: Value, indices: Sequence[Value | None]) -> list[tuple[int, torch.Tensor]]:
    """Dimensions that are indexed, and the places along each, of one shape: a mask stands for the places where it is on."""
    chosen: list[tuple[int, torch.Tensor]] = []
    d = 0
    for index in indices:
        parts: Sequence[torch.Tensor | None] = (None,)
        if index is not None:
            data = known_integers(index)
            parts = data.nonzero().unbind(1) if data.dtype in (torch.bool, torch.uint8) else (data.long(),)
        chosen += [(d + i, part % x.shape[d + i]) for i, part in enumerate(parts) if part is not None]
        d += len(parts)
    tensors = torch.functional.broadcast_tensors(*(part for _, part in chosen))  # type: ignore[no-untyped-call]
    return [(d, part) for (d, _), part in zip(chosen, tensors, strict=True)]


@rule(aten.index_select.default)
def index_selected(call: Call, x: Value, dim: int, index: Value) -> Value:
    """Rows along one dimension."""
    return lookup(x, dim % len(x.dims), known_integers(index))


@rule(aten.unfold.default)
def windows(call: Call, x: Value, dim: int, size: int, step: int) -> Value:
    """Windows along one dimension, the places of each as the last one: entries that several of them hold are the same."""
    dim %= len(x.dims)
    places = places_in_windows(x.shape[dim], size, step)
    if size == step:
        found = reshape(take(x, dim, 0, places.numel()), (*x.shape[:dim], *places.shape, *x.shape[dim + 1 :]))
    else:
        found = lookup(x, dim, places)
    return permute(found, [*(d for d in range(len(found.dims)) if d != dim + 1), dim + 1])


def places_in_windows(length: int, size: int, step: int) -> torch.Tensor:
    """Places [windows, size] along a dimension of this length."""
    return step * torch.arange((length - size) // step + 1)[:, None] + torch.arange(size)


@rule(aten.gather.default)
def gather(call: Call, x: Value, dim: int, index: Value, *, sparse_grad: bool = False) -> Value:
    """``x[..., i[...], ...]``: entries that are picked from one coordinate share it."""
    return gathered(x, dim % len(x.dims), known_integers(index))


@rule(aten.take_along_dim.default)
def take_along(call: Call, x: Value, index: Value, dim: int | None = None) -> Value:
    """As :func:`gather`; dimensions of size 1 are broadcast."""
    if dim is None:
        return reshape(lookup(reshape(x, (-1,)), 0, known_integers(index).reshape(-1)), call.shape)
    return gathered(x, dim % len(x.dims), known_integers(index).expand(call.shape))
