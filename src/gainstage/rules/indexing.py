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
    by_dim: list[tuple[int, torch.Tensor]] = []
    for index in indices:
        d = by_dim[-1][0] + 1 if by_dim else 0
        if index is None:
            by_dim.append((d, torch.empty(0)))
            continue
        data = known_integers(index)
        parts = data.nonzero().unbind(1) if data.dtype in (torch.bool, torch.uint8) else (data,)
        by_dim += [(d + i, part) for i, part in enumerate(parts)]
    chosen = [(d, data) for d, data in by_dim if data.dtype == torch.int64 or data.numel()]
    dims = [d for d, _ in chosen]
    if dims != list(range(dims[0], dims[0] + len(dims))):
        x = permute(x, [*dims, *(d for d in range(len(x.dims)) if d not in dims)])
        dims = list(range(len(dims)))
    tensors = torch.functional.broadcast_tensors(*(data.long() for _, data in chosen))  # type: ignore[no-untyped-call]
    positive = [data % x.shape[d] for d, data in zip(dims, tensors, strict=True)]
    found = lookup(x, dims[0], positive[0]) if len(dims) == 1 else pick(x, dims[0], positive)
    return reshape(found, call.shape)


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
