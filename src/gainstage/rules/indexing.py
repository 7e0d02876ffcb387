"""Look-ups and indexing by known integers and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gainstage.rules.registry import Call, rule
from gainstage.signal import Value, gathered, lookup, permute, pick, reshape

aten = torch.ops.aten


def known_integers(index: Value) -> torch.Tensor:
    """The integers themselves: an index that is not known cannot be followed."""
    if index.constant is None:
        raise NotImplementedError("an index that depends on data")
    return index.constant


@rule(aten.embedding.default)
def embedding(call: Call, weight: Value, index: Value, *args: Any) -> Value:
    """Rows of the weight: the fan-in of a look-up is 1. Equal tokens share a row."""
    return lookup(weight, 0, known_integers(index))


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def indexed(call: Call, x: Value, indices: Sequence[Value | None]) -> Value:
    """Rows by integers or masks; where the indexed dimensions are apart, theirs come first in the result."""
    places = places_along(x, indices)
    dims, positive = [d for d, _ in places], [index for _, index in places]
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
