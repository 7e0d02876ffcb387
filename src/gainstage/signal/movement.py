"""Movement: view, permute, expand, slice. Entries are relabelled; tables keep all they can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from math import prod

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.axes import Axis, Dim, axes_of, shape_of
from gainstage.signal.copies import once, replace
from gainstage.signal.quadrature import Array
from gainstage.signal.value import Value


def map_tables(x: Value, dims: tuple[Dim, ...], change: Callable[[Array], Array], profile: Array | None) -> Value:
    """Apply one change to every table that a value carries, and give it new dimensions and the profile of its levels."""
    return replace(
        x,
        dims=dims,
        table=change(x.table),
        rho=None if x.rho is None else change(x.rho),
        amplitude=None if x.amplitude is None else change(x.amplitude),
        tilt=None if x.tilt is None else replace(x.tilt, table=change(x.tilt.table)),
        levels=profile,
        prior=None,
        constant=None,
    )


def permute(x: Value, order: Sequence[int]) -> Value:
    """Reorder the dimensions."""
    order = [position % len(x.dims) for position in order]
    starts = np.cumsum([0, *(len(dim) for dim in x.dims)])
    axes = [axis for d in order for axis in range(starts[d], starts[d + 1])]
    profile = None if x.levels is None else np.transpose(x.levels, axes)
    moved = map_tables(x, tuple(x.dims[d] for d in order), lambda table: np.transpose(table, axes), profile)
    return replace(moved, prior=None if x.prior is None else full_prior(x).permute(order))


def full_prior(x: Value) -> torch.Tensor:
    """What is known beforehand, with all dimensions; of size 1 where it does not vary."""
    assert x.prior is not None
    prior = x.prior
    return prior.reshape((1,) * (len(x.dims) - prior.dim()) + tuple(prior.shape))


def split_axis(x: Value, axis: Axis, sizes: tuple[int, ...]) -> Value:
    """Write one axis as a product of axes; entries that differ in any of them differ in the axis."""
    position = x.axes.index(axis)
    parts = axis.split(sizes)
    dims = tuple(tuple(p for a in dim for p in (parts if a is axis else (a,))) for dim in x.dims)

    def change(table: Array) -> Array:
        moved = np.moveaxis(table, position, 0)
        result = np.empty((2,) * len(sizes) + moved.shape[1:])
        result[...] = moved[0]
        result[(1,) * len(sizes)] = moved[1]
        return np.moveaxis(result, range(len(sizes)), range(position, position + len(sizes)))

    def change_amplitude(spectrum: Array) -> Array:
        moved = np.moveaxis(spectrum, position, 0)
        result = np.empty((2,) * len(sizes) + moved.shape[1:])
        result[...] = moved[1]
        result[(0,) * len(sizes)] = moved[0]
        return np.moveaxis(result, range(len(sizes)), range(position, position + len(sizes)))

    profile = levels.split(x.levels, position, sizes)
    split = map_tables(replace(x, amplitude=None, levels=None), dims, change, profile)
    amplitude = None if x.amplitude is None else change_amplitude(x.amplitude)
    return replace(split, amplitude=amplitude, prior=x.prior, constant=x.constant)


def merge_axes(x: Value, axes: tuple[Axis, ...]) -> Value:
    """Forget the inner structure of neighbouring axes of one dimension: they become one axis."""
    if len(axes) <= 1:
        return x
    position = x.axes.index(axes[0])
    assert x.axes[position : position + len(axes)] == axes
    sizes = [axis.size for axis in axes]
    key = ("merge", *axes[1:])
    merged = axes[0].steps.setdefault(key, (Axis(prod(sizes), parent=axes[0]),))[0]
    dims = tuple(tuple(merged if a is axes[0] else a for a in dim if a not in axes[1:]) for dim in x.dims)

    def change(table: Array) -> Array:
        moved = np.moveaxis(table, range(position, position + len(axes)), range(len(axes)))
        same = moved[(1,) * len(axes)]
        total = np.zeros_like(same)
        for subset in np.ndindex(*(2,) * len(axes)):
            if not all(subset):
                total = total + moved[subset] * prod(1 if s else n - 1 for s, n in zip(subset, sizes, strict=True))
        return np.moveaxis(np.stack([total / (prod(sizes) - 1), same]), 0, position)

    merged_x = map_tables(x, dims, change, levels.merge(x.levels, position, sizes))
    return replace(merged_x, source=object(), amplitude=None, constant=x.constant, prior=x.prior)


def merge_dim(x: Value, dim: int) -> Value:
    """One axis at most in a dimension."""
    return merge_axes(x, x.dims[dim])


def reshape(x: Value, shape: Sequence[int]) -> Value:
    """View as another shape. An axis is split where the new shape asks for it; axes that do not fit are merged first.

    Axes of size 1 before all others stay there.
    """
    target = list(shape)
    ahead = _ahead(x) if target else ()
    if -1 in target:
        known_size = prod(size for size in target if size != -1)
        target[target.index(-1)] = prod(x.shape) // max(known_size, 1)
    sizes = [size for size in target if size != 1]
    groups: list[list[Axis]] = []
    pending = list(x.axes[len(ahead) :])
    for k, size in enumerate(sizes):
        group: list[Axis] = []
        while prod(axis.size for axis in group) < size:
            axis = pending.pop(0)
            have = prod(a.size for a in group)
            need = size // have if size % have == 0 else 0
            if need and axis.size <= need and need % axis.size == 0:
                group.append(axis)
            elif need and axis.size % need == 0:
                x = split_axis(x, axis, (need, axis.size // need))
                first, second = axis.split((need, axis.size // need))
                group.append(first)
                pending.insert(0, second)
            else:
                return reshape(_merge_misfit(x, [*group, axis, *pending], sizes[k:]), target)
        groups.append(group)
    parts = iter(groups)
    dims = tuple((*(ahead if d == 0 else ()), *(() if size == 1 else next(parts))) for d, size in enumerate(target))
    moved = map_tables(x, dims, lambda table: table, x.levels)
    constant = None if x.constant is None else x.constant.reshape(target)
    prior = None if x.prior is None else torch.broadcast_to(full_prior(x), x.shape).reshape(target)
    return replace(moved, constant=constant, prior=prior)


def _ahead(x: Value) -> tuple[Axis, ...]:
    """Axes of size 1 at the beginning of the first dimension."""
    return tuple(takewhile(lambda axis: axis.size == 1, x.dims[0])) if x.dims else ()


def _merge_misfit(x: Value, axes: Sequence[Axis], sizes: Sequence[int]) -> Value:
    """Merge the first of these axes, no more than it takes until they and some of the sizes have the same product."""
    rest, wanted = iter(axes[1:]), iter(sizes[1:])
    have, want, count = axes[0].size, sizes[0], 1
    while have != want:
        if have < want:
            have, count = have * next(rest).size, count + 1
        else:
            want *= next(wanted)
    flat = map_tables(x, (x.axes,), lambda table: table, x.levels)
    return merge_axes(flat, tuple(axes[:count]))


def expand(x: Value, shape: Sequence[int]) -> Value:
    """Broadcast to a shape: along a new axis all entries are equal."""
    if tuple(shape) == x.shape:
        return x
    missing = len(shape) - len(x.dims)
    dims: tuple[Dim, ...] = ((),) * missing + x.dims
    full = shape_of(dims)
    wanted = [have if want == -1 else want for have, want in zip(full, shape, strict=True)]
    new = tuple((*dim, Axis(w)) if h == 1 and w != 1 else dim for h, w, dim in zip(full, wanted, dims, strict=True))
    position = 0
    added = []
    for old_dim, new_dim in zip(dims, new, strict=True):
        position += len(new_dim)
        if len(new_dim) > len(old_dim):
            added.append(position - 1)
    target = (2,) * position

    def change(table: Array) -> Array:
        return np.broadcast_to(np.expand_dims(table, added), target).copy()

    def change_amplitude(spectrum: Array) -> Array:
        grown = change(spectrum)
        for axis in added:
            np.moveaxis(grown, axis, 0)[1] = 0.0
        return grown

    profile = None if x.levels is None else np.expand_dims(x.levels, added)
    moved = map_tables(replace(x, amplitude=None, levels=None), new, change, profile)
    amplitude = None if x.amplitude is None else change_amplitude(x.amplitude)
    return replace(moved, amplitude=amplitude, prior=x.prior)


def parts_along(x: Value) -> tuple[int, tuple[Value, ...]] | None:
    """Dimension of a concatenation and its parts, with the dimensions that it has by now, as long as nothing was done to them."""
    joined = x.joined
    if joined is None or joined.table is not x.table or (joined.axis,) not in x.dims:
        return None
    dim = x.dims.index((joined.axis,))
    kept = [tuple(part.dims[joined.dim] if d == dim else axes for d, axes in enumerate(x.dims)) for part in joined.parts]
    return dim, tuple(with_axes(part, dims) for part, dims in zip(joined.parts, kept, strict=True))


def reorder(x: Value, dim: int, key: object) -> Value:
    """Roll or flip along a dimension."""
    dim %= len(x.dims)
    if not x.dims[dim]:
        return x
    x = merge_dim(x, dim)
    dims = tuple((axes[0].reordered(key),) if d == dim else axes for d, axes in enumerate(x.dims))
    return map_tables(x, dims, lambda table: table, None if x.levels is None or x.levels.shape[_start(x, dim)] > 1 else x.levels)


def _start(x: Value, dim: int) -> int:
    """Position of the first axis of a dimension."""
    return sum(len(axes) for axes in x.dims[:dim])


def with_axes(x: Value, dims: tuple[Dim, ...]) -> Value:
    """The same tensor, its coordinates identified with those of another."""
    return x if dims == x.dims else once(x, dims, lambda: _renamed(x, dims))


def _renamed(x: Value, dims: tuple[Dim, ...]) -> Value:
    near, lean = x.neighbours(), x.lean
    if lean is not None and lean.near is not None:
        lean = replace(lean, near=lean.near.renamed(x.axes, axes_of(dims)))
    near = None if near is None else near.renamed(x.axes, axes_of(dims))
    return replace(x, dims=dims, near=near, lean=lean, overlap=x.overlap.renamed(x.axes, axes_of(dims)))


def refine(x: Value, y: Value, dim_x: int, dim_y: int) -> tuple[Value, Value]:
    """Split the axes of two dimensions of equal size until both read as the same sizes; merge where they cannot.

    Along an axis of size 1 that only one of them has, all coordinates of the other are equal.
    """
    i = 0
    while i < max(len(x.dims[dim_x]), len(y.dims[dim_y])):
        sizes = [_size_at(dim, i) for dim in (x.dims[dim_x], y.dims[dim_y])]
        if sizes.count(1) == 1:
            one = (x.dims[dim_x] if sizes[0] == 1 else y.dims[dim_y])[i]
            x, y = (x, _with_one(y, dim_y, i, one)) if sizes[0] == 1 else (_with_one(x, dim_x, i, one), y)
        a, b = x.dims[dim_x][i], y.dims[dim_y][i]
        if a.size == b.size:
            i += 1
        elif a.size % b.size == 0:
            x = split_axis(x, a, (b.size, a.size // b.size))
        elif b.size % a.size == 0:
            y = split_axis(y, b, (a.size, b.size // a.size))
        else:
            return merge_dim(x, dim_x), merge_dim(y, dim_y)
    return x, y


def _size_at(dim: Dim, place: int) -> int:
    return dim[place].size if place < len(dim) else 0


def _with_one(x: Value, dim: int, place: int, one: Axis) -> Value:
    """An axis of size 1 more in a dimension: all its coordinates are equal."""
    position = sum(len(d) for d in x.dims[:dim]) + place
    dims = tuple((*axes[:place], one, *axes[place:]) if d == dim else axes for d, axes in enumerate(x.dims))
    profile = None if x.levels is None else np.expand_dims(x.levels, position)
    return map_tables(replace(x, amplitude=None), dims, lambda table: np.stack([table, table], axis=position), profile)


def together(x: Value, y: Value) -> tuple[Value, Value]:
    """Two values of one shape, with the axes of both split alike."""
    for d in range(len(x.dims)):
        x, y = refine(x, y, d, d)
    return x, y
