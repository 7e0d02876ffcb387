"""Levels: root mean square along some axes over that of the whole tensor, where coordinates differ by design.

A profile is an array with one dimension for each axis of a value, of size 1 along an axis where the level does not vary, and of
mean square 1. A slice with mean square r^2 has r^2 times the table of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.signal.axes import Axis
from gainstage.signal.quadrature import Array, cumulative, expectation, nodes, quantiles, weights

MASKED = 2**22  # entries of a mask that are looked at one by one


def split(levels: Array | None, position: int, sizes: Sequence[int]) -> Array | None:
    """The axis at ``position`` written as a product of axes."""
    if levels is None:
        return None
    varies = levels.shape[position] > 1
    return levels.reshape(*levels.shape[:position], *(sizes if varies else [1] * len(sizes)), *levels.shape[position + 1 :])


def merge(levels: Array | None, position: int, sizes: Sequence[int]) -> Array | None:
    """Neighbouring axes from ``position`` on as one."""
    if levels is None:
        return None
    inner = levels.shape[position : position + len(sizes)]
    rest = levels.shape[position + len(sizes) :]
    if all(n == 1 for n in inner):
        return levels.reshape(*levels.shape[:position], 1, *rest)
    wide = np.broadcast_to(levels, (*levels.shape[:position], *sizes, *rest))
    return wide.reshape(*levels.shape[:position], -1, *rest)


def sliced(levels: Array | None, position: int, index: slice | int) -> tuple[Array | None, float]:
    """Part of the axis at ``position``: profile of the part, and its root mean square over that of the whole.

    With an integer index the axis goes.
    """
    if levels is None:
        return None, 1.0
    if levels.shape[position] > 1:
        part = levels[(slice(None),) * position + (index,)]
    else:
        part = levels if isinstance(index, slice) else np.take(levels, 0, axis=position)
    ratio = float(np.mean(part**2)) ** 0.5
    return (normalised(part), ratio) if ratio > 0.0 else (None, 0.0)


def normalised(levels: Array) -> Array | None:
    """With mean square 1; None where nothing varies."""
    square = float(np.mean(levels**2))
    if levels.size == 1 or square <= 0.0 or np.ptp(levels) <= 1e-9 * float(np.max(levels)):
        return None
    result = levels / square**0.5
    for position, size in enumerate(result.shape):
        first = np.take(result, [0], axis=position)
        if size > 1 and np.ptp(result - first) <= 1e-9:
            result = first
    return np.asarray(result)


def of_mask(mask: torch.Tensor | None, axes: Sequence[Axis]) -> Array | None:
    """Profile of a known mask on a weight with these axes; None where all rows and all columns keep as much as any other.

    A row's second moment is the share of the row that is kept; of a large weight, whose rows see many, it is not looked at.
    """
    if mask is None or mask.numel() > MASKED or mask.numel() != math.prod(axis.size for axis in axes):
        return None
    squares = mask.to("cpu", torch.float64).square().reshape([axis.size for axis in axes]).numpy()
    along = [squares.mean(axis=tuple(p for p in range(squares.ndim) if p != position)) for position in range(squares.ndim)]
    return None if all(np.ptp(each) <= 1e-9 for each in along) else normalised(np.sqrt(squares))


def coupling(operands: Sequence[tuple[Array | None, Sequence[int]]], kept: Sequence[int]) -> float:
    """``mean of s_i^2 t_i^2`` for two profiles along axes that are summed: loud inputs may meet loud weights. 1 where none do.

    Axes are named by numbers, as in ``np.einsum``.
    """
    summed = [
        {n for n, size in zip(names, profile.shape, strict=True) if size > 1 and n not in kept}
        for profile, names in operands
        if profile is not None
    ]
    if len(summed) < 2 or not set.intersection(*summed):
        return 1.0
    sizes: dict[int, int] = {}
    parts: list[object] = []
    for profile, names in operands:
        assert profile is not None
        varying = {n: size for n, size in zip(names, profile.shape, strict=True) if size > 1}
        sizes |= varying
        parts += [profile.reshape(list(varying.values())) ** 2, list(varying)]
    return float(np.asarray(np.einsum(*parts, []))) / math.prod(sizes.values())  # type: ignore[call-overload]


def carried(operands: Sequence[tuple[Array | None, Sequence[int]]], kept: Sequence[int]) -> Array | None:
    """Profile of a sum of products: mean over the axes that are summed of the product of the operands' squares.

    Axes are named by numbers, as in ``np.einsum``.
    """
    given = [(profile, names) for profile, names in operands if profile is not None]
    if not given:
        return None
    order = [*kept, *sorted({name for _, names in given for name in names} - set(kept))]
    squares = np.ones((1,) * len(order))
    for profile, names in given:
        positions = sorted(range(len(names)), key=lambda i: order.index(names[i]))
        shape = [1] * len(order)
        for i in positions:
            shape[order.index(names[i])] = profile.shape[i]
        squares = squares * (profile**2).transpose(positions).reshape(shape)
    return normalised(np.sqrt(squares.mean(axis=tuple(range(len(kept), len(order))))))


def of_sum(terms: Sequence[tuple[Array | None, float]], axes: int) -> Array | None:
    """Profile of a sum of independent tensors with these profiles and second moments."""
    if all(levels is None for levels, _ in terms):
        return None
    ones = np.ones((1,) * axes)
    squares = sum(second * (ones if levels is None else levels**2) for levels, second in terms)
    return normalised(np.sqrt(squares))


def of_parts(parts: Sequence[tuple[Array | None, float]], sizes: Sequence[int], position: int, axes: int) -> Array | None:
    """Profile of parts with these profiles and second moments, laid one after the other along the axis at ``position``.

    Across the other axes the parts are taken to vary alike, by their average, unless axes of a part vary together.
    """
    if any(levels is not None and not _is_product(levels**2, position) for levels, _ in parts):
        return _beside(parts, sizes, position, axes)
    squares = []
    common = np.zeros((1,) * axes)
    for (levels, second), size in zip(parts, sizes, strict=True):
        own = np.ones((1,) * axes) if levels is None else levels**2
        others = tuple(p for p in range(axes) if p != position)
        squares.append(max(second, 0.0) * np.broadcast_to(own.mean(axis=others), size))
        common = common + float(squares[-1].sum()) * own.mean(axis=position, keepdims=True)
    shape = [1] * axes
    shape[position] = -1
    return normalised(np.sqrt(np.concatenate(squares).reshape(shape) * common))


def _is_product(squares: Array, position: int) -> bool:
    """Whether mean squares are those along one axis times those along all others."""
    others = tuple(p for p in range(squares.ndim) if p != position)
    alone = squares.mean(axis=others, keepdims=True) * squares.mean(axis=position, keepdims=True)
    return bool(np.allclose(alone, squares * squares.mean(), atol=1e-9))


def _beside(parts: Sequence[tuple[Array | None, float]], sizes: Sequence[int], position: int, axes: int) -> Array | None:
    """Profiles of parts one after the other, entry by entry."""
    own = [second * (np.ones((1,) * axes) if levels is None else levels**2) for levels, second in parts]
    shape = np.broadcast_shapes(*([n if p != position else 1 for p, n in enumerate(each.shape)] for each in own))
    wide = [np.broadcast_to(each, [*shape[:position], n, *shape[position + 1 :]]) for each, n in zip(own, sizes, strict=True)]
    return normalised(np.sqrt(np.concatenate(wide, axis=position)))


def product(first: Array | None, second: Array | None) -> Array | None:
    """Profile of a product of two tensors with these profiles."""
    if first is None or second is None:
        return second if first is None else first
    return normalised(first * second)


@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """An array by its identity: profiles are handed on from tensor to tensor, and asked for the same."""

    array: Array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.array is other.array

    def __hash__(self) -> int:
        return id(self.array)


def over(levels: Array | None, position: int, size: int) -> Array:
    """Level along one axis alone, the others averaged out; its mean square is 1."""
    return np.ones(size) if levels is None or levels.shape[position] == 1 else _over(_Same(levels), position)


@lru_cache(maxsize=32)
def _over(levels: _Same, position: int) -> Array:
    others = tuple(p for p in range(levels.array.ndim) if p != position)
    found = np.sqrt((levels.array**2).mean(axis=others))
    found.flags.writeable = False
    return np.asarray(found)


def pair_factor(along: Array) -> float:
    """``average of s_i s_j`` over pairs of different coordinates of a profile s along one axis."""
    n = along.size
    return float(along.sum() ** 2 - (along**2).sum()) / (n * (n - 1.0)) if n > 1 else 1.0


def pair_factors(profile: Array) -> Array:
    """The same of a profile along several axes: a table by the axes along which two coordinates are the same."""
    found = np.empty((2,) * profile.ndim)
    for same in np.ndindex(*found.shape):
        others = tuple(position for position, equal in enumerate(same) if not equal)
        found[same] = (profile.mean(axis=others) ** 2).mean()  # over all pairs
    for position, size in enumerate(profile.shape):
        along = np.moveaxis(found, position, 0)
        along[0] = (size * along[0] - along[1]) / (size - 1.0) if size > 1 else along[1]
    return found


def groups(*profiles: Array, most: int = 12) -> tuple[Array, Array]:
    """A few representative levels (root mean squares of classes of near levels), and the share of entries that has each.

    Of one profile, or of several over the same coordinates: [profiles, classes] and [classes].
    """
    flat = np.array([np.abs(levels).ravel() for levels in np.broadcast_arrays(*profiles)])
    tops = np.maximum(flat.max(axis=1, keepdims=True), 1e-300)
    index = np.minimum((flat / tops * most + 1e-6).astype(int), most - 1)  # 2/3, of a map's corners, is on the edge of a class
    classes = (most,) * len(profiles)
    which = np.ravel_multi_index(tuple(index), classes)
    counts = np.bincount(which, minlength=math.prod(classes))
    squares = np.array([np.bincount(which, weights=each**2, minlength=math.prod(classes)) for each in flat])
    present = counts > 0
    return np.sqrt(squares[:, present] / counts[present]), counts[present] / which.size


def normal_mixture(levels: Array) -> Array:
    """Grid values of the increasing function of a normal that is distributed as ``s z``, for an s drawn from the levels.

    The distribution function ``mean of Phi(x / s)`` is inverted; variance 1.
    """
    (sizes,), shares = groups(levels)
    places = nodes() * sizes.max()
    scaled = torch.from_numpy(places[:, None] / np.maximum(sizes, 1e-9 * sizes.max()))
    below = np.vecdot(torch.special.ndtr(scaled).numpy(), shares)
    values = np.interp(cumulative(), below, places)
    return np.asarray(values / expectation(values**2) ** 0.5)


def mixture(levels: Array, even: Array, mean: float, std: float) -> Array:
    """Grid values of ``mean + s (x - mean)`` for an s drawn from the levels, at a standard deviation of ``std``."""
    (sizes,), shares = groups(levels)
    values = quantiles((even - mean) * sizes[:, None], shares[:, None] * weights())
    return np.asarray(mean + values * (std / max(expectation(values**2) ** 0.5, 1e-300)))


def mapped(levels: Array | None, even: Array, function: Callable[[Array], Array]) -> Array | None:
    """Profile of f(x): ``E f(s x)^2`` over entries of average level, at a few s; between them a power of s."""
    if levels is None:
        return None
    top = float(levels.max())
    sizes = np.geomspace(max(float(levels.min()), 1e-3 * top), top, 9)
    found = np.maximum(np.vecdot(function(sizes[:, None] * even) ** 2, weights()), 1e-300)
    powers = np.interp(np.log(np.maximum(levels, sizes[0])), np.log(sizes), np.log(found))
    return normalised(np.exp(0.5 * (powers - powers.max())))


def averaged(levels: Array | None, positions: Sequence[int], *, keep: bool = False) -> Array | None:
    """Profile over the other axes; those at ``positions`` go, or are of size 1 from then on."""
    return None if levels is None else normalised(np.sqrt((levels**2).mean(axis=tuple(positions), keepdims=keep)))


def read(levels: Array | None, position: int, places: NDArray[np.int64], *, mean: bool = False) -> Array:
    """Level along one axis at the places read [outputs, taps], 0 where a place is -1; ``mean``: of what is not squared."""
    inside = places >= 0
    if levels is None or position >= levels.ndim or levels.shape[position] == 1:
        return inside.astype(float)
    others = tuple(p for p in range(levels.ndim) if p != position)
    along = levels.mean(axis=others) if mean else over(levels, position, levels.shape[position])
    return np.asarray(np.where(inside, along[places], 0.0))


def outer(along: Sequence[Array], axes: int) -> Array:
    """Product of one factor for each of the last axes (a dimension of one entry has no axis), as a profile's shape asks."""
    result = np.ones(1)
    wide = [factor for factor in along if factor.size > 1]
    for factor in wide:
        result = result[..., None] * factor
    return result.reshape([1] * (axes - len(wide)) + [factor.size for factor in wide])


def evened(table: Array, levels: Array | None, positions: Sequence[int]) -> Array:
    """Table of a tensor before the levels along some axes act on it: ``E[x_i x_j] / (s_i s_j)``."""
    if levels is None:
        return table
    result = table.copy()
    for position in positions:
        result[(slice(None),) * position + (0,)] /= max(_pair_factor_along(levels, position), 1e-12)
    return result


def uneven(table: Array, levels: Array | None) -> Array:
    """Table of a tensor once levels act on it, see :func:`evened`: ``s_i s_j E[x_i x_j]``."""
    result = table.copy()
    for position in range(0 if levels is None else table.ndim):
        result[(slice(None),) * position + (0,)] *= _pair_factor_along(levels, position)
    return result


def _pair_factor_along(levels: Array | None, position: int) -> float:
    if levels is None or levels.shape[position] == 1:
        return 1.0
    return pair_factor(over(levels, position, levels.shape[position]))
