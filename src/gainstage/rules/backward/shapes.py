"""Gradients of ops that move entries: moved back; copies are summed, parts get zeros around them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from gainstage.rules.backward.registry import BackwardCall, Gradient, backward
from gainstage.rules.backward.sums import inside, summed_over, to_shape, zeros
from gainstage.rules.conditions import kept
from gainstage.rules.shapes import LONG, padding
from gainstage.signal import Value, affine, filter_dim, join, permute, reorder, reshape, select, take

aten = torch.ops.aten


@backward(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int, aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip
def viewed(call: BackwardCall, g: Value, x: Value, *args: Any, **kwargs: Any) -> tuple[Gradient, ...]:
    """The view back."""
    return (reshape(g, x.shape),)


@backward(aten.permute.default)
def permuted(call: BackwardCall, g: Value, x: Value, dims: Sequence[int]) -> tuple[Gradient, ...]:
    """The inverse permutation."""
    return (permute(g, np.argsort([d % len(x.dims) for d in dims]).tolist()),)


@backward(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def transposed(call: BackwardCall, g: Value, x: Value, dim0: int, dim1: int) -> tuple[Gradient, ...]:
    """The same exchange."""
    order = list(range(len(x.dims)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return (permute(g, order),)


@backward(aten.t.default, aten.numpy_T.default)
def matrix_transposed(call: BackwardCall, g: Value, x: Value) -> tuple[Gradient, ...]:
    """All dimensions reversed."""
    return (permute(g, list(range(len(x.dims)))[::-1]),)


@backward(aten.mT.default, aten.mH.default, aten.adjoint.default)
def matrices_transposed(call: BackwardCall, g: Value, x: Value) -> tuple[Gradient, ...]:
    """The last two dimensions exchanged back."""
    return transposed(call, g, x, -2, -1)


@backward(aten.movedim.int)
def moved(call: BackwardCall, g: Value, x: Value, source: int, destination: int) -> tuple[Gradient, ...]:
    """Moved back."""
    order = list(range(len(x.dims)))
    order.insert(source % len(order), order.pop(destination))
    return (permute(g, order),)


@backward(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expanded(call: BackwardCall, g: Value, x: Value, *args: Any, **kwargs: Any) -> tuple[Gradient, ...]:
    """Sum over the copies."""
    return (to_shape(g, x.shape),)


@backward(aten.repeat.default, aten.tile.default)
def repeated(call: BackwardCall, g: Value, x: Value, repeats: Sequence[int]) -> tuple[Gradient, ...]:
    """Sum over the copies."""
    shape = (1,) * (len(repeats) - len(x.dims)) + x.shape
    pairs = [n for count, size in zip(repeats, shape, strict=True) for n in (count, size)]
    summed = summed_over(reshape(g, pairs), [2 * d for d, count in enumerate(repeats) if count > 1])
    return (reshape(summed, x.shape),)


@backward(aten.repeat_interleave.self_int)
def interleaved(
    call: BackwardCall, g: Value, x: Value, repeats: int, dim: int | None = None, **kwargs: Any
) -> tuple[Gradient, ...]:
    """Sum over the copies."""
    flat = dim is None
    at = 0 if dim is None else dim % len(x.dims)
    shape = (int(np.prod(x.shape)),) if flat else x.shape
    wide = [*shape[: at + 1], repeats, *shape[at + 1 :]]
    return (reshape(summed_over(reshape(g, wide), [at + 1]), x.shape),)


@backward(aten.slice.Tensor)
def sliced(
    call: BackwardCall, g: Value, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> tuple[Gradient, ...]:
    """Zeros around the part."""
    dim %= len(x.dims)
    size = x.shape[dim]
    places = range(size)[slice(start, end, step)]
    if step == 1:
        return (inside(g, dim, places.start, size),)
    matrix = np.zeros((size, len(places)))
    matrix[list(places), range(len(places))] = 1.0
    return (filter_dim(g, dim, matrix),)


@backward(aten.narrow.default)
def narrowed(call: BackwardCall, g: Value, x: Value, dim: int, start: int, length: int) -> tuple[Gradient, ...]:
    """Zeros around the part."""
    return (inside(g, dim, int(start) % x.shape[dim], x.shape[dim]),)


@backward(aten.select.int)
def selected(call: BackwardCall, g: Value, x: Value, dim: int, index: int) -> tuple[Gradient, ...]:
    """Zeros at all other indices."""
    dim %= len(x.dims)
    one = reshape(g, (*x.shape[:dim], 1, *x.shape[dim + 1 :]))
    return (inside(one, dim, int(index) % x.shape[dim], x.shape[dim]),)


@backward(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.tensor_split.sections)
def in_pieces(call: BackwardCall, g: Sequence[Gradient], x: Value, *args: Any, dim: int = 0) -> tuple[Gradient, ...]:
    """The pieces together again."""
    dim = args[1] if len(args) > 1 else dim
    parts = [zeros(piece.dims) if part is None else part for part, piece in zip(g, call.output, strict=True)]
    return (join(parts, dim),)


@backward(aten.unbind.int)
def unbound(call: BackwardCall, g: Sequence[Gradient], x: Value, dim: int = 0) -> tuple[Gradient, ...]:
    """The parts together again."""
    dim %= len(x.dims)
    shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :])
    parts = [zeros(piece.dims) if part is None else part for part, piece in zip(g, call.output, strict=True)]
    return (join([reshape(part, shape) for part in parts], dim),)


@backward(aten.cat.default, aten.concat.default, aten.concatenate.default)
def concatenated(call: BackwardCall, g: Value, tensors: Sequence[Value], dim: int = 0) -> tuple[Any, ...]:
    """Each its part."""
    bounds = np.cumsum([0, *(0 if x.shape == (0,) else x.shape[dim] for x in tensors)])
    return (tuple(None if a == b else take(g, dim, int(a), int(b)) for a, b in pairwise(bounds)),)


@backward(aten.slice_scatter.default)
def slice_replaced(
    call: BackwardCall,
    g: Value,
    x: Value,
    src: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> tuple[Gradient, ...]:
    """The other tensor its part; of the tensor what is left, zero in between."""
    size = x.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    places = list(range(first, last, step))
    own = np.eye(size)
    own[places] = 0.0
    return (filter_dim(g, dim % len(x.dims), own), take(g, dim, first, last, step))


@backward(aten.select_scatter.default)
def index_replaced(call: BackwardCall, g: Value, x: Value, src: Value, dim: int, index: int) -> tuple[Gradient, ...]:
    """The other tensor its part; of the tensor what is left, zero in between."""
    dim, index = dim % len(x.dims), int(index) % x.shape[dim]
    rest, part = slice_replaced(call, g, x, src, dim, index, index + 1)
    assert part is not None
    return (rest, reshape(part, src.shape))


@backward(aten.stack.default)
def stacked(call: BackwardCall, g: Value, tensors: Sequence[Value], dim: int = 0) -> tuple[Any, ...]:
    """Each its part."""
    return (tuple(reshape(select(g, dim, i), x.shape) for i, x in enumerate(tensors)),)


@backward(aten.roll.default)
def rolled(call: BackwardCall, g: Value, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> tuple[Gradient, ...]:
    """Shifted back: the same entries at other places."""
    for shift, dim in zip(shifts, dims, strict=True):
        g = reorder(g, dim, ("back", int(shift)))
    return (g,)


@backward(aten.flip.default)
def flipped(call: BackwardCall, g: Value, x: Value, dims: Sequence[int]) -> tuple[Gradient, ...]:
    """Reversed again."""
    for dim in dims:
        g = reorder(g, dim, "flip")
    return (g,)


@backward(aten.pad.default)
def padded(
    call: BackwardCall, g: Value, x: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> tuple[Gradient, ...]:
    """Without the margin; what repeats an entry adds to it."""
    for i in range(len(pad) // 2):
        dim, before, after = len(x.dims) - 1 - i, int(pad[2 * i]), int(pad[2 * i + 1])
        if mode != "constant" and (before or after):
            g = _repeats_added(g, dim, before, after, mode)
            continue
        start, stop = max(before, 0), g.shape[dim] - max(after, 0)
        g = take(g, dim, start, stop)
        if before < 0 or after < 0:
            g = inside(g, dim, max(-before, 0), x.shape[dim])
    return (g,)


def _repeats_added(g: Value, dim: int, before: int, after: int, mode: str) -> Value:
    """Sums over the copies of each entry; in a long line as if all entries had an equal share of the margin."""
    size = g.shape[dim] - before - after
    if size <= LONG:
        return filter_dim(g, dim, padding(size, before, after, mode).T)
    middle = take(g, dim, before, before + size)
    margin = [take(g, dim, 0, before)] * (before > 0) + [take(g, dim, before + size, g.shape[dim])] * (after > 0)
    added = sum(part.second_moment * part.shape[dim] for part in margin)
    return affine(middle, (1.0 + added / (size * middle.second_moment)) ** 0.5) if middle.second_moment > 0.0 else middle


@backward(aten.broadcast_tensors.default)
def broadcast(call: BackwardCall, g: Sequence[Gradient], tensors: Sequence[Value]) -> tuple[Any, ...]:
    """Sums over the copies."""
    return (tuple(None if part is None else to_shape(part, x.shape) for part, x in zip(g, tensors, strict=True)),)


@backward(aten.tril.default, aten.triu.default)
def triangle(call: BackwardCall, g: Value, x: Value, diagonal: int = 0) -> tuple[Gradient, ...]:
    """The same triangle."""
    op: Any = call.op
    inside_it = op(torch.ones(x.shape[-2:]), diagonal).bool()
    return (kept(g, inside_it),)
