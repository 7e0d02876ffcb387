"""Linear maps along axes of one tensor that meet again: an average of neighbours less what lies in the middle.

For ``y = sum over t of c_t (A_t x B_t x ...) s``, with a matrix for each axis of a map, what two places p and q share is

    E[y_p y_q] = sum over t, u of c_t c_u sum over i, j of A_t[p, i] A_u[q, j] B_t[.. E[s_i s_j]

exactly, lag by lag and border by border. Where terms cancel (s is smooth, and an average of neighbours nearly what it was) little
is left, which the tables of the terms and of what they have in common, each with errors of its own, do not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from gainstage.signal import levels
from gainstage.signal.axes import Axis
from gainstage.signal.neighbours import Neighbours, by_lag, far_of, made, outer
from gainstage.signal.pairing import amplitude_of
from gainstage.signal.quadrature import Array
from gainstage.signal.value import Value

MOST = 6  # terms
ROUGHLY = 0.02  # of a tensor: what is left of its mean, and how far it may be from a multiple
Maps = Mapping[Axis, Array]
Terms = tuple[tuple[float, Maps], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Filtered:
    """A sum of linear maps of another tensor: factors, and a matrix for each axis; void for a tensor with another table."""

    table: Array
    of: Value
    terms: Terms

    def scaled(self, factor: float, table: Array) -> Filtered:
        """Times a number."""
        return Filtered(table, self.of, tuple((factor * number, maps) for number, maps in self.terms))


def made_of(x: Value) -> tuple[Value, Terms]:
    """What a tensor is a sum of linear maps of, and the maps; itself where nothing is known."""
    if x.filtered is None or x.filtered.table is not x.table:
        return x, ((1.0, {}),)
    return x.filtered.of, x.filtered.terms


def times(x: Value, factor: float, table: Array) -> Filtered | None:
    """What is known of x, for a multiple of it with this table."""
    return None if x.filtered is None or x.filtered.table is not x.table else x.filtered.scaled(factor, table)


def mapped(x: Value, axis: Axis, matrix: Array, table: Array) -> Filtered:
    """A linear map of x along an axis, with this table."""
    base, terms = made_of(x)
    after = [(number, {**maps, axis: matrix @ maps[axis] if axis in maps else matrix}) for number, maps in terms]
    return Filtered(table, base, tuple(after))


@dataclass(frozen=True, slots=True, eq=False)
class Met:
    """A sum of linear maps of one tensor: what its places share, their levels, and the maps."""

    table: Array
    near: Neighbours | None
    levels: Array | None
    maps: Filtered


def meeting(x: Value, y: Value, sign: float) -> Met | None:
    """``x + sign y``, if both are linear maps of one tensor, one of them more than a multiple of it."""
    found = _together(x, y, sign)
    if found is None:
        return None
    table, near, profile = shared(*found)
    return Met(table, near, profile, Filtered(table, *found))


def _together(x: Value, y: Value, sign: float) -> tuple[Value, Terms] | None:
    if x.source is None or x.source is not y.source or x.axes != y.axes:
        return None
    (of_x, maps_x), (of_y, maps_y) = made_of(x), made_of(y)
    if of_x is not of_y:
        if of_x is x and of_y is not y and (ratio := _multiple(x, of_y)) is not None:
            of_x, maps_x = of_y, ((ratio, {}),)
        elif of_y is y and of_x is not x and (ratio := _multiple(y, of_x)) is not None:
            of_y, maps_y = of_x, ((ratio, {}),)
    terms = _merged([*maps_x, *((sign * number, maps) for number, maps in maps_y)])
    if of_x is not of_y or of_x.axes != x.axes or len(terms) > MOST or not any(maps for _, maps in terms):
        return None
    return (of_x, terms) if 0 < len(_axes_of(of_x, terms)) <= 2 else None


def _multiple(x: Value, base: Value) -> float | None:
    """The number c of ``x = c base`` in all that a norm left of x in the base; None where it is none."""
    own, other = amplitude_of(x), amplitude_of(base)
    full = (1,) * own.ndim
    if own.shape != other.shape or other[full] == 0.0:
        return None
    ratio, kept = float(own[full] / other[full]), other != 0.0
    if abs(x.mean - ratio * base.mean) > ROUGHLY * x.second_moment**0.5:
        return None
    return ratio if float(np.abs(own - ratio * other)[kept].max()) <= ROUGHLY * float(np.abs(own).max()) else None


def _merged(terms: Sequence[tuple[float, Maps]]) -> Terms:
    """Terms with the same matrices as one."""
    found: list[tuple[float, Maps]] = []
    for number, maps in terms:
        at = next((i for i, (_, other) in enumerate(found) if _same(maps, other)), None)
        if at is None:
            found.append((number, maps))
        else:
            found[at] = (found[at][0] + number, maps)
    return tuple(found)


def _same(maps: Maps, other: Maps) -> bool:
    return maps.keys() == other.keys() and all(np.array_equal(matrix, other[axis]) for axis, matrix in maps.items())


def _axes_of(base: Value, terms: Terms) -> tuple[Axis, ...]:
    """Axes along which there are maps, or near places share more."""
    near = base.neighbours()
    used = {axis for _, maps in terms for axis in maps} | set(() if near is None else near.axes)
    return tuple(axis for axis in base.axes if axis in used)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Of ``sum over t, u of c_t c_u (A_t U A_u') x (B_t V B_u')``: averages by equal and other places, diagonal, and by lag."""

    averages: Array
    diagonal: Array
    lags: Array

    def plus(self, other: _Pairs, factor: float) -> _Pairs:
        """Sum."""
        return _Pairs(*(getattr(self, name) + factor * getattr(other, name) for name in ("averages", "diagonal", "lags")))


def _pairs(maps: Sequence[Sequence[Array]], numbers: Sequence[float], kinds: Sequence[Array]) -> _Pairs:
    """For one matrix of what places share along each axis."""
    found: _Pairs | None = None
    for a, first in zip(numbers, maps, strict=True):
        for b, second in zip(numbers, maps, strict=True):
            products = [left @ kind @ right.T for left, kind, right in zip(first, kinds, second, strict=True)]
            parts = [outer([part(each) for each in products]) for part in (_by_place, np.diagonal, by_lag)]
            one = _Pairs(*parts)
            found = (found or _Pairs(*(np.zeros_like(part) for part in parts))).plus(one, a * b)
    assert found is not None
    return found


def _by_place(pairs: Array) -> Array:
    """Average over pairs of different places, and of equal ones."""
    size, trace = pairs.shape[0], float(np.trace(pairs))
    return np.array([(float(pairs.sum()) - trace) / max(size * (size - 1.0), 1.0), trace / size])


def shared(base: Value, terms: Terms) -> tuple[Array, Neighbours | None, Array | None]:
    """Table, what near places share, and levels of a sum of linear maps of a tensor."""
    axes = _axes_of(base, terms)
    positions = [base.axes.index(axis) for axis in axes]
    even = levels.evened(base.table, base.levels, positions)
    along = [levels.over(base.levels, position, axis.size) for position, axis in zip(positions, axes, strict=True)]
    maps = [[given.get(axis, np.eye(axis.size)) * level for axis, level in zip(axes, along, strict=True)] for _, given in terms]
    numbers = [number for number, _ in terms]
    kinds = [[np.ones((axis.size, axis.size)), np.eye(axis.size)] for axis in axes]
    plain = [_pairs(maps, numbers, chosen) for chosen in product(*kinds)]
    table, rest = np.empty_like(even), [position for position in range(even.ndim) if position not in positions]
    for same in np.ndindex(*(2,) * len(rest)):
        index = tuple(same[rest.index(p)] if p in rest else slice(None) for p in range(even.ndim))
        block = even[index]
        for d in range(block.ndim):
            other, equal = np.take(block, 0, axis=d), np.take(block, 1, axis=d)
            block = np.stack([other, equal - other], axis=d)
        table[index] = sum(float(part) * found.averages for part, found in zip(block.ravel(), plain, strict=True))
    own, far, excess = _excess(base, axes, even)
    whole = _Pairs(*(far * getattr(plain[0], name) for name in ("averages", "diagonal", "lags")))
    for factor, chosen in _separable(excess, axes):
        whole = whole.plus(_pairs(maps, numbers, chosen), (own - far) * factor)
    table[tuple(1 if p in rest else slice(None) for p in range(even.ndim))] = whole.averages
    first, distant = float(whole.lags.ravel()[0]), far * float(plain[0].averages.ravel()[0])
    near = made(axes, (whole.lags - distant) / (first - distant)) if first > distant else None
    shape = [whole.diagonal.shape[positions.index(p)] if p in positions else 1 for p in range(even.ndim)]
    return table, near, levels.normalised(np.sqrt(np.maximum(whole.diagonal, 0.0)).reshape(shape))


def _excess(base: Value, axes: tuple[Axis, ...], even: Array) -> tuple[float, float, Array]:
    """Second moments of one place and of two far apart, and what near ones share of the difference, lag by lag."""
    near = base.neighbours() or Neighbours((), np.array(1.0))
    for axis in axes:
        near = near.with_axis(axis)
    own, far = far_of(near, even, base.axes)
    return own, far, near.over(axes, [near.lags(axis) for axis in axes])


def _separable(excess: Array, axes: tuple[Axis, ...]) -> Iterator[tuple[float, list[Array]]]:
    """``e(d) = sum over r of s_r u_r(d_1) v_r(d_2)`` as factors and matrices of places along each axis."""
    columns = excess.reshape(excess.shape[0], -1)
    left, sizes, right = np.linalg.svd(columns, full_matrices=False)
    for r, size in enumerate(sizes):
        if size > 1e-9 * float(sizes[0]):
            parts = [left[:, r], right[r]][: len(axes)]
            scale = size if len(axes) > 1 else size * float(right[r, 0])
            yield scale, [_toeplitz(part, axis.size) for part, axis in zip(parts, axes, strict=True)]


def _toeplitz(lags: Array, size: int) -> Array:
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    return np.where(distance < len(lags), lags[np.minimum(distance, len(lags) - 1)], 0.0)
