"""Concatenation: the parts of a tensor side by side, and what entries of different parts have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch

from gainstage.signal import levels, neighbours
from gainstage.signal.axes import Axis, axes_of
from gainstage.signal.between import of_terms
from gainstage.signal.marginal import Marginal
from gainstage.signal.movement import full_prior, map_tables, merge_dim, refine, with_axes
from gainstage.signal.overlap import Overlap, mixed
from gainstage.signal.quadrature import Array, covariance_series, quantiles, weights
from gainstage.signal.stray import Stray, summed
from gainstage.signal.traits import Joined
from gainstage.signal.value import Value


def join(values: Sequence[Value], dim: int) -> Value:
    """Concatenate along a dimension: averages over entries and pairs of entries of the parts."""
    dim %= len(values[0].dims)
    if len(values) == 1:
        return values[0]
    like, *others = sorted(values, key=lambda value: value.shape[dim] * value.second_moment)
    for value in others:  # in the end with the coordinates of what most of it is, the same for layers that add a little to it
        like = align_other_dims(like, value, dim)
    parts = [align_other_dims(value, like, dim) for value in values]
    sizes = [part.shape[dim] for part in parts]
    total = sum(sizes)
    shape = parts[0].dims
    position = sum(len(d) for d in shape[:dim])
    ordered = [_one_axis(part, dim) for part in parts]
    ready = [np.moveaxis(part.table, position, 0) for part in ordered]
    means = [part.mean for part in parts]
    same = sum(n * table[1] for n, table in zip(sizes, ready, strict=True)) / total
    inside = sum(n * (n - 1) * table[0] for n, table in zip(sizes, ready, strict=True))
    between = _between(values, dim, ready[0][0])
    other = (inside + between) / (total * (total - 1))
    table = np.moveaxis(np.stack([other, np.asarray(same)]), 0, position)
    key = ("join", *sizes, *[axis for part in parts for axis in part.dims[dim]])
    anchor = next((axis for part in parts for axis in part.dims[dim]), Axis(1))
    new_axis = anchor.steps.setdefault(key, (Axis(total),))[0]
    dims = tuple((new_axis,) if d == dim else axes for d, axes in enumerate(shape))

    def mixture() -> Array:
        sparse = 1 + len(parts) // 4  # of many parts a few points each
        values_ = np.concatenate([part.marginal.values[::sparse] for part in parts])
        mass = np.concatenate([weights()[::sparse] * n for n in sizes])
        return quantiles(values_, mass)

    mean = sum(n * m for n, m in zip(sizes, means, strict=True)) / total
    latents = {part.marginal.latent for part in parts}
    one = len(latents) == 1 and len({id(part.marginal) for part in parts}) == 1
    return Value(
        dims=dims,
        mean=mean,
        table=table,
        marginal=parts[0].marginal if one else Marginal(object(), mixture),
        source=object(),
        lineage=_union(parts),
        read=frozenset().union(*(part.read for part in parts)),
        stray=_stray(parts, sizes),
        is_weight=all(part.is_weight for part in parts),
        levels=levels.of_parts([(part.levels, part.second_moment) for part in ordered], sizes, position, table.ndim),
        gram=of_terms(list(zip(ordered, map(float, sizes), strict=True)), [p for p in range(table.ndim) if p != position]),
        joined=Joined(table, new_axis, tuple(parts), dim),
        overlap=_shared_overlap(parts, sizes, axes_of(dims)),
        near=neighbours.mixed(
            [(part.neighbours(), n * part.variance) for part, n in zip(parts, sizes, strict=True)], axes_of(dims)
        ),
        prior=_prior(values, dim),
    )


def _stray(parts: Sequence[Value], sizes: Sequence[int]) -> Stray:
    """Levels of the parts, by what each has of the second moment."""
    amounts = [n * part.second_moment for part, n in zip(parts, sizes, strict=True)]
    return summed([(part, amount / max(sum(amounts), 1e-300)) for part, amount in zip(parts, amounts, strict=True)])


def _shared_overlap(parts: Sequence[Value], sizes: Sequence[int], axes: Sequence[Axis]) -> Overlap:
    """Cosines of what all parts hold: the average of those of the parts, by what each has of the second moment."""
    amounts = [n * part.second_moment for part, n in zip(parts, sizes, strict=True)]
    shares = [amount / max(sum(amounts), 1e-300) for amount in amounts]
    named = [part.overlap if part.table.ndim != len(axes) else part.overlap.renamed(part.axes, axes) for part in parts]
    return mixed([(overlap, share**2) for overlap, share in zip(named, shares, strict=True)])


def _prior(values: Sequence[Value], dim: int) -> torch.Tensor | None:
    """What is known beforehand of parts, one after the other; 0 where nothing is."""
    if all(value.prior is None for value in values):
        return None
    nothing = torch.zeros((1,) * len(values[0].dims), dtype=torch.float64)
    priors = [nothing if value.prior is None else full_prior(value) for value in values]
    shape = list(np.broadcast_shapes(*([n if d != dim else 1 for d, n in enumerate(prior.shape)] for prior in priors)))
    sizes = [value.shape[dim] for value in values]
    return torch.cat([prior.expand(*shape[:dim], n, *shape[dim + 1 :]) for prior, n in zip(priors, sizes, strict=True)], dim)


def _between(values: Sequence[Value], dim: int, like: Array) -> Array:
    """``sum of E[x_i y_j]`` over pairs of entries in different parts of a concatenation, by the other axes that they share."""
    sums = [value.shape[dim] * value.mean for value in values]
    result = np.full_like(like, sum(sums) ** 2 - sum(part**2 for part in sums))
    families: dict[object, list[Value]] = {}
    for value in values:
        steps = value.steps_of_cell()
        families.setdefault(value.marginal.latent if steps is None else steps.units, []).append(value)
    for family in families.values():
        for a, b in combinations(family, 2):
            common = _common(a, b, dim) if a.steps_of_cell() is None else _of_steps(a, b, dim)
            if common is not None:
                result = result + 2.0 * a.shape[dim] * b.shape[dim] * common
    return result


def _of_steps(a: Value, b: Value, dim: int) -> Array | None:
    """Covariance of the hidden states of a cell after two steps, [batch, channel], laid side by side along a third dimension."""
    first, second = a.steps_of_cell(), b.steps_of_cell()
    if first is None or second is None or not (first.is_hidden and second.is_hidden):
        return None
    if a.dims[dim] or b.dims[dim] or len(a.axes) != 2 or len(b.axes) != 2:
        return None
    within, between = first.units.shared(first.steps, second.steps)
    covariance = np.zeros((2, 2))
    covariance[:, 1] = between - a.mean * b.mean, within - a.mean * b.mean
    return covariance


def _common(a: Value, b: Value, dim: int) -> Array | None:
    """``Cov(f(z_i), g(z_j))`` of two functions of one latent, averaged over a dimension; None where no axes tell how they lie."""
    for d in range(len(a.dims)):
        a, b = (merge_dim(a, d), merge_dim(b, d)) if d == dim else refine(a, b, d, d)
    found = covariance_series(a.marginal.values, b.marginal.values, a.correlation())
    position = 0
    for d, (dim_a, dim_b) in enumerate(zip(a.dims, b.dims, strict=True)):
        if len(dim_a) != len(dim_b):
            return None
        for own, other in zip(dim_a, dim_b, strict=True):
            apart, same = np.take(found, 0, axis=position), np.take(found, 1, axis=position)
            if own is not other and (own.parent is None or own.parent is not other.parent):
                return None
            if d == dim:
                found = apart + (same - apart) / own.size if own is other else apart
                continue
            found = found if own is other else np.stack([apart, apart], axis=position)
            position += 1
    return found


def _union(values: Sequence[Value]) -> int:
    lineage = 0
    for value in values:
        lineage |= value.lineage
    return lineage


def _one_axis(x: Value, dim: int) -> Value:
    """Exactly one axis in a dimension; a dimension of size 1 gets an axis of its own."""
    if x.dims[dim]:
        return merge_dim(x, dim)
    position = sum(len(d) for d in x.dims[:dim])
    dims = tuple((Axis(1),) if d == dim else axes for d, axes in enumerate(x.dims))
    profile = None if x.levels is None else np.expand_dims(x.levels, position)
    return map_tables(x, dims, lambda table: np.stack([table, table], axis=position), profile)


def align_other_dims(x: Value, like: Value, dim: int) -> Value:
    """Give all dimensions but one the axes of another value, split where either of them is."""
    for d in range(len(x.dims)):
        if d != dim:
            x, like = refine(x, like, d, d)
    return with_axes(x, tuple(x.dims[d] if d == dim else like.dims[d] for d in range(len(x.dims))))
