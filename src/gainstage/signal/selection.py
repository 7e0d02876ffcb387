"""Entries picked by known integers along several dimensions at once, or entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gainstage.signal.axes import Axis, Dim
from gainstage.signal.gather import levelled, same_index_table
from gainstage.signal.marginal import Marginal
from gainstage.signal.movement import merge_dim
from gainstage.signal.quadrature import Array
from gainstage.signal.value import Value


def pick(x: Value, first: int, indices: Sequence[torch.Tensor]) -> Value:
    """``x[..., i, j, ...]`` for integers along consecutive dimensions, which the dimensions of the integers replace.

    ``K[S] = sum over A of P(two places agree in the coordinates A and no others | S) K_x[A]``.
    """
    for d in range(first, first + len(indices)):
        x = merge_dim(x, d)
    varying = [i for i in range(len(indices)) if x.dims[first + i]]
    picked = [indices[i] for i in varying]
    position = sum(len(dim) for dim in x.dims[:first])
    shares, dims = _agreements(picked, indices[0])
    table = np.moveaxis(x.table, range(position, position + len(picked)), range(len(picked)))
    mixed = np.tensordot(shares, table, axes=(range(len(picked)), range(len(picked))))
    rank = shares.ndim - len(picked)
    mixed = np.moveaxis(mixed, range(rank), range(position, position + rank))
    return _made(x, (*x.dims[:first], *dims, *x.dims[first + len(indices) :]), mixed)


def gathered(x: Value, dim: int, index: torch.Tensor) -> Value:
    """``x[..., i[...], ...]``: along one dimension each entry is picked by an integer of its own."""
    equal, dims = same_index_table(index)
    position = sum(bool(size > 1) for size in index.shape[:dim])
    for d in range(len(x.dims)):
        x = merge_dim(x, d)
    table = x.table
    for d in reversed(range(len(x.dims))):
        at = sum(len(axes) for axes in x.dims[:d])
        if d != dim and x.dims[d] and not dims[d]:  # one coordinate of several
            table = np.take(table, 1, axis=at)
    at = sum(1 for d in range(dim) if dims[d])
    other, same = (np.take(table, i, axis=at) for i in (0, 1)) if x.dims[dim] else (table, table)
    if dims[dim]:
        other, same = (np.expand_dims(part, position) for part in (other, same))
    found = _made(
        x, tuple(_kept(x, d, size, dims[d], dim) for d, size in enumerate(index.shape)), equal * same + (1.0 - equal) * other
    )
    return found if x.levels is None else levelled(found, x, _squares(x, dim, index, dims))


def _squares(x: Value, dim: int, index: torch.Tensor, dims: Sequence[Dim]) -> Array:
    """Mean squares of what is gathered, over that of the whole, entry by entry."""
    assert x.levels is not None
    wide = x.levels.reshape(_by_dim(x, x.levels.shape)) ** 2
    other = [d for d in range(len(x.dims)) if d != dim]
    for d in other:
        if wide.shape[d] > 1:
            wide = wide.take(range(index.shape[d]), axis=d)
        if bool((index == index.narrow(d, 0, 1)).all()):
            index = index.narrow(d, 0, 1)
    if wide.shape[dim] > 1:
        picks = index.cpu().numpy()
        shape = [max(pair) for pair in zip(wide.shape, picks.shape, strict=True)]
        wide, picks = (np.broadcast_to(part, [*shape[:dim], part.shape[dim], *shape[dim + 1 :]]) for part in (wide, picks))
        wide = np.take_along_axis(wide, picks, axis=dim)
    return np.asarray(wide.reshape([n for n, axes in zip(wide.shape, dims, strict=True) if axes]))


def _by_dim(x: Value, shape: Sequence[int]) -> list[int]:
    """Sizes of a profile with one entry for each dimension, each of which has one axis at most."""
    sizes = iter(shape)
    return [next(sizes) if axes else 1 for axes in x.dims]


def _kept(x: Value, d: int, size: int, fresh: Dim, dim: int) -> Dim:
    """Axes of a dimension after gathering along another one: those of the first coordinates."""
    if d == dim or not fresh:
        return fresh
    axis = x.dims[d][0]
    return (axis,) if axis.size == size else (axis.part(0, size, 1),)


def _agreements(indices: Sequence[torch.Tensor], like: torch.Tensor) -> tuple[Array, tuple[tuple[Axis, ...], ...]]:
    """``P(two places agree in exactly the coordinates A | S)``, [*A, *S], and the axes of S."""
    _, dims = same_index_table(like)
    rank = sum(len(dim) for dim in dims)
    found = np.ones((2,) * (len(indices) + rank))
    for agreed in np.ndindex(*(2,) * len(indices)):
        flat = torch.zeros_like(like, dtype=torch.int64)
        for index, counts in zip(indices, agreed, strict=True):
            if counts:
                flat = flat * (int(index.max()) + 1) + index.to(torch.int64)
        found[agreed] = same_index_table(flat)[0] if any(agreed) else 1.0
    for position in range(len(indices)):  # "at least these" less "also this one"
        at_least, also = np.take(found, 0, axis=position), np.take(found, 1, axis=position)
        found = np.stack([at_least - also, also], axis=position)
    return found, dims


def _made(x: Value, dims: tuple[Dim, ...], table: Array) -> Value:
    return Value(
        dims=dims,
        mean=x.mean,
        table=np.asarray(table),
        marginal=Marginal(object(), lambda: x.marginal.values),
        source=object(),
        lineage=x.lineage,
        stray=x.stray.hidden(),
        is_weight=x.is_weight,
    )
