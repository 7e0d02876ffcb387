"""Ops that move entries without changing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from gainstage.rules.conditions import choose
from gainstage.rules.registry import Call, rule
from gainstage.signal import (
    Added,
    Value,
    affine,
    expand,
    filter_dim,
    independent,
    join,
    known,
    permute,
    reorder,
    reshape,
    select,
    take,
)
from gainstage.signal.copies import replace
from gainstage.signal.marginal import Marginal
from gainstage.signal.quadrature import Array, quantiles, weights
from gainstage.signal.rolling import roll

aten = torch.ops.aten

LONG = 512  # entries of a dimension from which on its padding is not written as a matrix


def kept_apart(x: Value, move: Callable[[Value], Value], known_of: Callable[[torch.Tensor], torch.Tensor]) -> Value:
    """A view or a part of a tensor, and of the known one that was added to it.

    Where only one number was added, the part is shifted by it: the levels of the whole would take it for something random.
    """
    added = x.added
    if added is None or added.table is not x.table or added.of.axes != x.axes:
        return move(x)
    of = move(replace(added.of, dims=x.dims))
    if added.drawn:
        moved = move(x)
        return replace(moved, added=replace(added, table=moved.table, of=of)) if moved.dims[-2:] == x.dims[-2:] else moved
    known = known_of(torch.broadcast_to(added.known, x.shape))
    if known.numel() and bool((known == known.reshape(-1)[0]).all()):
        return affine(of, 1.0, float(known.reshape(-1)[0]))
    moved = move(x)
    return replace(moved, added=Added(moved.table, of, known))


@rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int,
    aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip
def view(call: Call, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Same entries, another shape."""
    return kept_apart(x, lambda y: reshape(y, call.shape), lambda known: known.reshape(call.shape))


@rule(aten.permute.default)
def permuted(call: Call, x: Value, dims: Sequence[int]) -> Value:
    """Dimensions in another order."""
    return permute(x, dims)


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def transposed(call: Call, x: Value, dim0: int, dim1: int) -> Value:
    """Two dimensions exchanged."""
    order = list(range(len(x.dims)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(x, order)


@rule(aten.t.default, aten.numpy_T.default)
def matrix_transposed(call: Call, x: Value) -> Value:
    """All dimensions reversed."""
    return permute(x, list(range(len(x.dims)))[::-1])


@rule(aten.mT.default, aten.mH.default, aten.adjoint.default)
def matrices_transposed(call: Call, x: Value) -> Value:
    """The last two dimensions exchanged."""
    return transposed(call, x, -2, -1)  # type: ignore[no-any-return]


@rule(aten.movedim.int)
def moved(call: Call, x: Value, source: int, destination: int) -> Value:
    """One dimension moved."""
    order = list(range(len(x.dims)))
    order.insert(destination % len(order), order.pop(source))
    return permute(x, order)


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expanded(call: Call, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Broadcast: copies are equal."""
    return expand(x, call.shape)


@rule(aten.repeat.default, aten.tile.default)
def repeated(call: Call, x: Value, repeats: Sequence[int]) -> Value:
    """Tiled copies: a new outer axis of equal entries in each repeated dimension."""
    repeats = [1] * (len(x.dims) - len(repeats)) + list(repeats)
    x = reshape(x, (1,) * (len(repeats) - len(x.dims)) + x.shape)
    pairs = [n for count, size in zip(repeats, x.shape, strict=True) for n in (1, size)]
    tiled = [n for count, size in zip(repeats, x.shape, strict=True) for n in (count, size)]
    return reshape(expand(reshape(x, pairs), tiled), call.shape)


@rule(aten.repeat_interleave.self_int)
def interleaved(call: Call, x: Value, repeats: int, dim: int | None = None, **kwargs: Any) -> Value:
    """Each entry repeated: a new inner axis of equal entries."""
    if dim is None:
        x, dim = reshape(x, (-1,)), 0
    dim %= len(x.dims)
    inner = [*x.shape[: dim + 1], 1, *x.shape[dim + 1 :]]
    wide = [*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :]]
    return reshape(expand(reshape(x, inner), wide), call.shape)


@rule(aten.slice.Tensor)
def sliced(call: Call, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Value:
    """A range of one dimension."""
    size = x.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    rows = slice(first, last, step)
    return kept_apart(x, lambda y: take(y, dim, first, last, step), lambda known: known.movedim(dim, 0)[rows].movedim(0, dim))


@rule(aten.narrow.default)
def narrowed(call: Call, x: Value, dim: int, start: int, length: int) -> Value:
    """A range of one dimension."""
    return take(x, dim, int(start) % x.shape[dim], int(start) % x.shape[dim] + length)


@rule(aten.select.int)
def selected(call: Call, x: Value, dim: int, index: int) -> Value:
    """One index of a dimension."""
    return kept_apart(x, lambda y: reshape(select(y, dim, index), call.shape), lambda known: known.select(dim, index))


def _pieces(x: Value, sizes: Sequence[int], dim: int) -> tuple[Value, ...]:
    """Consecutive ranges; each is other entries of the tensor, so each has a latent of its own."""

    def piece(start: int, stop: int) -> Value:
        return kept_apart(x, lambda y: take(y, dim, start, stop), lambda known: known.narrow(dim, start, stop - start))

    return tuple(piece(int(start), int(stop)) for start, stop in pairwise(np.cumsum([0, *sizes])))


@rule(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.tensor_split.sections)
def pieces(call: Call, x: Value, *args: Any, dim: int = 0) -> tuple[Value, ...]:
    """Consecutive ranges of one dimension."""
    dim = args[1] if len(args) > 1 else dim
    sizes = [shape[dim] for shape in call.shapes if shape is not None]
    return _pieces(x, sizes, dim)


@rule(aten.unbind.int)
def unbound(call: Call, x: Value, dim: int = 0) -> tuple[Value, ...]:
    """All indices of one dimension, one by one."""
    return tuple(reshape(select(x, dim, i), call.shape) for i in range(x.shape[dim]))


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default)
def concatenated(call: Call, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Parts one after the other; of parts that are alike, of the same samples, each stays one: within it samples share more."""
    parts = [x for x in tensors if x.shape != (0,)]
    if dim % len(call.shape) == 0 and len(parts) > 1 and all(_is_sibling(x, parts[0]) for x in parts):
        return reshape(join([reshape(x, (1, *x.shape)) for x in parts], 0), call.shape)
    return join(parts, dim)


def _is_sibling(x: Value, other: Value) -> bool:
    """Whether two tensors have the same samples, and the same table."""
    if not x.dims[0] or x.dims[0] != other.dims[0] or x.table.shape != other.table.shape:
        return False
    return math.isclose(x.mean, other.mean, abs_tol=1e-12) and np.allclose(x.table, other.table, rtol=1e-9)


@rule(aten.slice_scatter.default)
def slice_replaced(
    call: Call, x: Value, src: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    """A range of one dimension is another tensor: what is before it, the tensor and what is after it, side by side.

    Where what is before and after has something in common: the two tensors one after the other, and then in order.
    """
    size = x.shape[dim]
    places = range(*slice(start, end, step).indices(size))
    if not places or len(places) == size:
        return src if places else x
    before, after = ([take(x, dim, a, b)] if a < b else [] for a, b in ((0, places.start), (places.stop, size)))
    if step == 1 and not (before and after and _is_common(x, dim % len(x.dims))):
        return join([*before, src, *after], dim)
    return with_places(x, src, dim % len(x.dims), list(places))


def _is_common(x: Value, dim: int) -> bool:
    """Whether entries that differ along a dimension have anything in common."""
    apart = [np.take(x.covariance, 0, axis=x.axes.index(axis)) for axis in x.dims[dim]]
    return any(float(np.abs(part).max()) > 1e-12 * x.second_moment for part in apart)


def with_places(x: Value, src: Value, dim: int, places: list[int]) -> Value:
    """The rest and what replaces these places, one after the other, and then in order."""
    size = x.shape[dim]
    rest = np.delete(np.arange(size), places).tolist()
    if not rest:
        return filter_dim(src, dim, np.eye(size)[np.argsort(places)])
    side_by_side = join([filter_dim(x, dim, np.eye(size)[rest]), src], dim)
    return filter_dim(side_by_side, dim, np.eye(size)[np.argsort([*rest, *places])])


@rule(aten.select_scatter.default)
def index_replaced(call: Call, x: Value, src: Value, dim: int, index: int) -> Value:
    """One index of a dimension is another tensor."""
    dim, index = dim % len(x.dims), int(index) % x.shape[dim]
    replaced: Value = slice_replaced(call, x, reshape(src, (*x.shape[:dim], 1, *x.shape[dim + 1 :])), dim, index, index + 1)
    return replaced


@rule(aten.broadcast_tensors.default)
def broadcast(call: Call, tensors: Sequence[Value]) -> tuple[Value, ...]:
    """Each expanded to the shape of all."""
    return tuple(expand(x, call.shape) for x in tensors)


@rule(aten.tril.default, aten.triu.default)
def triangle(call: Call, x: Value, diagonal: int = 0) -> Value:
    """Zeros on one side of a diagonal."""
    op: Any = call.op
    return choose(known(op(torch.ones(x.shape[-2:], dtype=torch.float64), diagonal)), x, 0.0)


@rule(aten.stack.default)
def stacked(call: Call, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Parts along a new dimension."""
    dim %= len(call.shape)
    one = [n if d != dim else 1 for d, n in enumerate(call.shape)]
    return join([reshape(x, one) for x in tensors], dim)


@rule(aten.roll.default)
def rolled(call: Call, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    """Cyclic shift: the same entries at other places; shifting back restores them."""
    for shift, dim in zip(shifts, dims, strict=True):
        x = roll(x, int(dim) % len(x.dims), int(shift))
    return x


@rule(aten.flip.default)
def flipped(call: Call, x: Value, dims: Sequence[int]) -> Value:
    """Reversed order along some dimensions."""
    for dim in dims:
        x = reorder(x, dim, "flip")
    return x


@rule(aten.pad.default)
def padded(call: Call, x: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Copies of entries, or a number, around the tensor. A number other than 0 is a tensor of its own beside it."""
    inside, number = x, float(value or 0.0)
    share = 1.0
    for i in range(len(pad) // 2):
        dim = len(x.dims) - 1 - i
        before, after, size = int(pad[2 * i]), int(pad[2 * i + 1]), x.shape[dim]
        x = take(x, dim, max(-before, 0), size - max(-after, 0))
        before, after, size = max(before, 0), max(after, 0), x.shape[dim]
        if before or after:
            if mode == "constant" and number:
                x = _beside(x, dim, before, after, number)
                continue
            share *= size / (size + before + after) if mode == "constant" else 1.0
            whole = _side_by_side if size > LONG else _in_one
            x = whole(x, dim, before, after, mode)
    return x if share == 1.0 else replace(x, marginal=_with_zeros(inside, share), rho=None)


def _in_one(x: Value, dim: int, before: int, after: int, mode: str) -> Value:
    return filter_dim(x, dim, padding(x.shape[dim], before, after, mode))


def _beside(x: Value, dim: int, before: int, after: int, number: float) -> Value:
    """A number, tensor, the number: each a part by itself."""
    borders = [
        independent(tuple(count if d == dim else n for d, n in enumerate(x.shape)), number, 0.0) if count else None
        for count in (before, after)
    ]
    return join([part for part in (borders[0], x, borders[1]) if part is not None], dim)


def _side_by_side(x: Value, dim: int, before: int, after: int, mode: str) -> Value:
    """Padding, tensor, padding: what a border shares with the places it repeats is lost, which is little in a long line."""
    size = x.shape[dim]
    starts = {"reflect": (1, size - 1 - after), "replicate": (0, size - 1), "circular": (size - before, 0)}

    if mode == "constant":
        return _beside(x, dim, before, after, 0.0)

    def border(side: int, count: int) -> Value:
        shape = tuple(count if d == dim else n for d, n in enumerate(x.shape))
        start = starts[mode][side]
        return expand(take(x, dim, start, start + (1 if mode == "replicate" else count)), shape)

    return join([*([border(0, before)] if before else []), x, *([border(1, after)] if after else [])], dim)


def padding(size: int, before: int, after: int, mode: str) -> np.ndarray[Any, Any]:
    """Coefficients [outputs, size] that pad one dimension."""
    if mode == "constant":
        return np.eye(size + before + after, size, -before)
    places = torch.arange(size, dtype=torch.float64).reshape(1, 1, size)
    source = torch.nn.functional.pad(places, (before, after), mode=mode).reshape(-1)
    return np.asarray(np.eye(size)[source.long().numpy()])


def _with_zeros(inside: Value, share: float) -> Marginal:
    """Distribution of an entry that is one of a tensor's with some probability, and else 0."""

    def mixed(values: Array) -> Array:
        return quantiles(np.append(values, 0.0), np.append(weights() * share, 1.0 - share))

    return Marginal(object(), lambda: mixed(inside.marginal.values), lambda: mixed(inside.marginal.even))
