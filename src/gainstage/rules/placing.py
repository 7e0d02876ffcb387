"""Entries that are put, or added, at known places of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from gainstage.rules.conditions import choose
from gainstage.rules.indexing import known_integers, places_along
from gainstage.rules.registry import Call, rule
from gainstage.rules.scatter import sums_at
from gainstage.rules.shapes import with_places
from gainstage.signal import Value, affine, combine, expand, filter_dim, known, lookup, reshape

aten = torch.ops.aten


@rule(aten.index_put.default)
def places_replaced(call: Call, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False) -> Value:
    """Known places are entries of another tensor. Whole rows, each once: the two one after the other, and then in order."""
    places = places_along(x, indices)
    dims, tensors = [d for d, _ in places], [index for _, index in places]
    if dims != list(range(dims[0], dims[0] + len(dims))):
        raise NotImplementedError("places along dimensions that are apart")
    first, count, shape = dims[0], len(dims), tensors[0].shape
    if not shape.numel():
        return x
    rows = expand(values, (*x.shape[:first], *shape, *x.shape[first + count :]))
    rows = reshape(rows, (*x.shape[:first], shape.numel(), *x.shape[first + count :]))
    flat = [index.reshape(-1) for index in tensors]
    if accumulate and count > 1:
        raise NotImplementedError("places along several dimensions that are added to")
    if accumulate:
        return combine(torch.add, x, filter_dim(rows, first, sums_at(flat[0], x.shape[first])))
    if count == 1 and len(set(flat[0].tolist())) == len(flat[0]):
        return with_places(x, rows, first, flat[0].tolist())
    number = torch.full(x.shape[first : first + count], -1)
    number[tuple(flat)] = torch.arange(shape.numel())
    return _put(x, values if prod(values.shape) == 1 else rows, first, number)


def _put(x: Value, rows: Value, first: int, number: torch.Tensor) -> Value:
    """``x`` with the rows of another tensor, by number, along consecutive dimensions; where the number is -1, it stays.

    A row that is put somewhere is independent of where: numbers elsewhere cycle over the rows, which are not seen there.
    """
    taken = number >= 0
    mask = known(taken.reshape(*taken.shape, *(1,) * (len(x.dims) - first - taken.dim())))
    if prod(rows.shape) > 1:
        spare = torch.arange(number.numel()).reshape(number.shape) % rows.shape[first]
        rows = lookup(rows, first, torch.where(taken, number, spare))
    return choose(mask, rows, x)


@rule(aten.masked_scatter.default)
def mask_filled(call: Call, x: Value, mask: Value, source: Value) -> Value:
    """Entries under a known mask are those of another tensor, in order; whole rows where the mask covers these."""
    taken = torch.broadcast_to(known_integers(mask).bool(), call.shape)
    rank = taken.dim()
    while rank > 1 and bool((taken == taken[..., :1]).all()):
        taken, rank = taken[..., 0], rank - 1
    width = call.shape[rank:]
    number = torch.where(taken, taken.reshape(-1).cumsum(0).reshape(taken.shape) - 1, -1)
    rows = reshape(source, (prod(source.shape) // prod(width), *width))
    return _put(expand(x, call.shape), rows, 0, number)


@rule(aten.index_add.default)
def rows_added(call: Call, x: Value, dim: int, index: Value, source: Value, *, alpha: float = 1) -> Value:
    """``x + A source``: A has a one for each row, at the known place that it is added to."""
    dim %= len(x.dims)
    summed = filter_dim(source, dim, sums_at(known_integers(index), x.shape[dim]))
    return combine(torch.add, x, affine(summed, float(alpha)))
