"""Parts of a tensor: one coordinate of a dimension, or some."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.axes import Dim
from gainstage.signal.between import of_part, of_place
from gainstage.signal.copies import replace
from gainstage.signal.joining import join
from gainstage.signal.known import known
from gainstage.signal.marginal import Marginal
from gainstage.signal.movement import full_prior, map_tables, merge_dim, parts_along
from gainstage.signal.value import Value


def select(x: Value, dim: int, index: int) -> Value:
    """One index along a dimension: the dimension goes, entries share it."""
    dim %= len(x.dims)
    index %= max(x.shape[dim], 1)
    moved = _of_parts(x, dim, index, index + 1) or _fix(x, dim, index)
    prior = _prior_of(x, dim, slice(index, index + 1))
    return replace(moved, dims=moved.dims[:dim] + moved.dims[dim + 1 :], prior=None if prior is None else prior.squeeze(dim))


def take(x: Value, dim: int, start: int, stop: int, step: int = 1) -> Value:
    """Slice along a dimension: fewer coordinates, the same table."""
    dim %= len(x.dims)
    size = x.shape[dim]
    start, stop, _ = slice(start, stop).indices(size)
    count = len(range(start, stop, step))
    if count == size:
        return x
    part = _of_parts(x, dim, start, stop) if step == 1 else None
    if part is None:
        part = _fix(x, dim, start) if count == 1 else _range(x, dim, range(start, stop, step))
    return replace(part, prior=_prior_of(x, dim, slice(start, stop, step)))


def _of_parts(x: Value, dim: int, start: int, stop: int) -> Value | None:
    """Range of a concatenation: of one of its parts, or of several side by side."""
    found = parts_along(x)
    if found is None or found[0] != dim or stop <= start:
        return None
    pieces, before = [], 0
    for part in found[1]:
        after = before + part.shape[dim]
        if before < stop and start < after:
            pieces.append(take(part, dim, max(start, before) - before, min(stop, after) - before))
        before = after
    return join(pieces, dim)


def _prior_of(x: Value, dim: int, part: slice) -> torch.Tensor | None:
    """What is known beforehand of a range of a dimension."""
    if x.prior is None:
        return None
    prior = full_prior(x)
    return prior if prior.shape[dim] == 1 else prior[(slice(None),) * dim + (part,)]


def _fix(x: Value, dim: int, index: int) -> Value:
    """One coordinate of a dimension; two different ones are different tensors, with latents of their own."""
    position = sum(len(d) for d in x.dims[:dim])
    same = (slice(None),) * position + (1,) * len(x.dims[dim])
    dims = tuple(() if d == dim else axes for d, axes in enumerate(x.dims))
    profile, ratio = x.levels, 1.0
    index %= max(x.shape[dim], 1)
    for coordinate in np.unravel_index(index, [axis.size for axis in x.dims[dim]]) if x.dims[dim] else ():
        profile, part = levels.sliced(profile, position, int(coordinate))
        ratio *= part
    fixed = map_tables(replace(x, levels=None), dims, lambda table: table[same], profile)
    if len(x.dims[dim]) == 1:
        fixed = of_place(x, fixed, position, index, ratio)
    latent = ("select", x.marginal.latent, x.dims[dim], index) if x.dims[dim] else x.marginal.latent
    marginal = Marginal(latent, lambda: x.marginal.even if profile is None else x.marginal.values, lambda: x.marginal.even)
    return scaled(replace(fixed, source=object(), amplitude=None, marginal=marginal), ratio)


def _range(x: Value, dim: int, chosen: range) -> Value:
    """Some coordinates of a dimension, at equal distances."""
    start, stop, step = chosen.start, chosen.stop, chosen.step
    whole = x.dims[dim]
    inner = prod(axis.size for axis in whole[1:])
    if len(whole) > 1 and step == 1 and start % inner == 0 and stop % inner == 0:
        part = slice(start // inner, stop // inner)
        first = whole[0].part(part.start, part.stop, 1)
        kept: Dim = (first, *whole[1:]) if first.size != 1 else whole[1:]
    else:
        x = merge_dim(x, dim)
        whole = x.dims[dim]
        part = slice(start, stop, step)
        kept = (whole[0].part(start, stop, step),)
    position = sum(len(d) for d in x.dims[:dim])
    dims = tuple(kept if d == dim else axes for d, axes in enumerate(x.dims))
    drop = len(kept) < len(whole)
    index = (slice(None),) * position + ((1,) if drop else ())
    profile, ratio = levels.sliced(x.levels, position, part)
    if drop and profile is not None:
        profile = np.take(profile, 0, axis=position)
    moved = map_tables(replace(x, amplitude=None, levels=None), dims, lambda table: table[index], profile)
    if profile is None and x.levels is not None:
        moved = replace(moved, marginal=Marginal(x.marginal.latent, lambda: x.marginal.even))
    if not drop:
        moved = of_part(x, _evened(x, moved, position), position, part, ratio)
    else:  # one of several: different tensors, with latents of their own
        latent, whole_of = ("select", x.marginal.latent, whole[:1], part.start), moved.marginal
        moved = replace(moved, marginal=Marginal(latent, lambda: whole_of.values, lambda: whole_of.even))
    return scaled(replace(moved, source=object()), ratio)


def _evened(x: Value, part: Value, position: int) -> Value:
    """A range of an axis, in which pairs go by the levels that are left, not by those of the whole.

    Not where pairs are known one by one, and where borders lean on what all places have in common in a way of their own.
    """
    if x.valid_lean() is not None or (x.gram is not None and x.gram.axis is x.axes[position]):
        return part
    before, after = (levels.over(v.levels, position, v.axes[position].size) for v in (x, part))
    factor = levels.pair_factor(before)
    if factor <= 0.0 or np.ptp(before) <= 0.0:
        return part
    table = part.table.copy()
    np.moveaxis(table, position, 0)[0] *= levels.pair_factor(after) / factor
    return replace(part, table=table, rho=None)


def scaled(x: Value, ratio: float) -> Value:
    """A part that is louder than its whole by a factor: everything about it scales."""
    if ratio == 1.0:
        return x
    marginal = x.marginal.affine(ratio)
    amplitude = None if x.amplitude is None else x.amplitude * ratio
    return replace(x, mean=x.mean * ratio, table=x.table * ratio**2, marginal=marginal, amplitude=amplitude)


def part_by_part(x: Value, y: Value) -> tuple[int, list[tuple[Value, Value]]] | None:
    """Dimension (from the end) and pairs of parts of two equal concatenations, or of one and what is the same for all parts."""
    for first, second in ((x, y), (y, x)):
        found = parts_along(first)
        if found is None:
            continue
        dim = found[0] - len(first.dims)
        others = _parts_like(second, dim, [part.shape[dim] for part in found[1]])
        if others is not None:
            pairs = zip(found[1], others, strict=True)
            return dim, [(a, b) if first is x else (b, a) for a, b in pairs]
    return None


def _parts_like(y: Value, dim: int, sizes: Sequence[int]) -> Sequence[Value] | None:
    if len(y.dims) < -dim or y.shape[dim] == 1:
        return [y] * len(sizes)
    if y.constant is not None and y.shape[dim] == len(sizes):
        return [known(y.constant.narrow(dim, k, 1)) for k in range(len(sizes))]
    if y.levels is None and y.variance <= 1e-14 * y.second_moment:  # one number
        bounds = np.cumsum([0, *sizes])
        return [take(y, dim, int(start), int(stop)) for start, stop in pairwise(bounds)] if bounds[-1] == y.shape[dim] else None
    found = parts_along(y)
    if found is None or found[0] != dim + len(y.dims) or [part.shape[dim] for part in found[1]] != list(sizes):
        return None
    return found[1]


def slices(g: Value, dim: int, parts: Sequence[Value]) -> list[Value]:
    """Slices of g as long as the parts of a concatenation."""
    bounds = np.cumsum([0, *(part.shape[dim] for part in parts)])
    return [take(g, dim, int(start), int(stop)) for start, stop in pairwise(bounds)]
