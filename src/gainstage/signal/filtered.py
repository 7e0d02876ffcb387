"""Linear maps along axes of one tensor that meet again: an average of neighbours less what lies in the middle.

For ``y = sum over t of c_t (A_t x B_t x ...) s``, with a matrix for each axis of a map, what two places p and q share is

    E[y_p y_q] = sum over t, u of c_t c_u sum over i, j of A_t[p, i] A_u[q, j] B_t[.. E[s_i s_j]

exactly, lag by lag and border by border. Where terms cancel (s is smooth, and an average of neighbours nearly what it was) little
is left, which the tables of the terms and of what they have in common, each with errors of its own, do not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from gainstage.signal import levels
from gainstage.signal.axes import Axis
from gainstage.signal.neighbours import Neighbours, by_lag, made, outer
from gainstage.signal.pairing import amplitude_of
from gainstage.signal.quadrature import Array
from gainstage.signal.traits import Lean
from gainstage.signal.value import Value

MOST = 6  # terms
FINE = 32  # lags, and frequencies at which power is looked at
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
    """A sum of linear maps of one tensor: what its places share, their levels and lean, and the maps."""

    table: Array
    near: Neighbours | None
    levels: Array | None
    lean: Lean | None
    maps: Filtered


def meeting(x: Value, y: Value, sign: float) -> Met | None:
    """``x + sign y``, if both are linear maps of one tensor, one of them more than a multiple of it."""
    found = _together(x, y, sign)
    return None if found is None else _met(*found)


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
    """Of ``sum over t, u of c_t c_u (A_t U A_u') x (B_t V B_u')``: by equal and other places, diagonal, means of rows."""

    averages: Array
    diagonal: Array
    rows: Array

    def plus(self, other: _Pairs, factor: float) -> _Pairs:
        """Sum."""
        return _Pairs(*(getattr(self, name) + factor * getattr(other, name) for name in self.__slots__))

    def times(self, factor: float) -> _Pairs:
        """All of it times a number."""
        return _Pairs(*(factor * getattr(self, name) for name in self.__slots__))


def _products(
    maps: Sequence[Sequence[Array]], numbers: Sequence[float], kinds: Sequence[Array]
) -> Iterator[tuple[float, list[Array]]]:
    """Factor and matrices of each pair of terms, for one matrix of what places share along each axis."""
    for a, first in zip(numbers, maps, strict=True):
        for b, second in zip(numbers, maps, strict=True):
            yield a * b, [left @ kind @ right.T for left, kind, right in zip(first, kinds, second, strict=True)]


def _pairs(maps: Sequence[Sequence[Array]], numbers: Sequence[float], kinds: Sequence[Array]) -> _Pairs:
    """For one matrix of what places share along each axis."""
    found: _Pairs | None = None
    for factor, products in _products(maps, numbers, kinds):
        one = _Pairs(*(outer([part(each) for each in products]) for part in (_by_place, np.diagonal, _of_row)))
        found = one.times(factor) if found is None else found.plus(one, factor)
    assert found is not None
    return found


def _by_place(pairs: Array) -> Array:
    """Average over pairs of different places, and of equal ones."""
    size, trace = pairs.shape[0], float(np.trace(pairs))
    return np.array([(float(pairs.sum()) - trace) / max(size * (size - 1.0), 1.0), trace / size])


def _of_row(pairs: Array) -> Array:
    return np.asarray(pairs.mean(1))


def _met(base: Value, terms: Terms) -> Met:
    """Table, what near places share, levels and lean of a sum of linear maps of a tensor."""
    axes = _axes_of(base, terms)
    positions = [base.axes.index(axis) for axis in axes]
    given = _places(base, axes, positions)
    maps = [[matrices.get(axis, np.eye(axis.size)) for axis in axes] for _, matrices in terms]
    numbers = [number for number, _ in terms]
    plain = [_pairs(maps, numbers, chosen) for chosen in product(*zip(given.common, given.own, strict=True))]
    table, rest = np.empty_like(given.even), [position for position in range(base.table.ndim) if position not in positions]
    for same in np.ndindex(*(2,) * len(rest)):
        index = tuple(same[rest.index(p)] if p in rest else slice(None) for p in range(table.ndim))
        block = given.even[index]
        for d, common in enumerate(given.common):
            other, equal = np.take(block, 0, axis=d), np.take(block, 1, axis=d)
            block = np.stack([other, equal - other * float(np.mean(np.diagonal(common)))], axis=d)
        table[index] = sum(float(part) * found.averages for part, found in zip(block.ravel(), plain, strict=True))
    close = plain[0].times(0.0)
    for factor, chosen in given.excess:
        close = close.plus(_pairs(maps, numbers, chosen), factor)
    whole = close.plus(plain[0], given.far)
    table[tuple(1 if p in rest else slice(None) for p in range(table.ndim))] = whole.averages
    near = _near(maps, numbers, given.excess, close.diagonal, axes)
    shape = [whole.diagonal.shape[positions.index(p)] if p in positions else 1 for p in range(table.ndim)]
    profile = levels.normalised(np.sqrt(np.maximum(whole.diagonal, 0.0)).reshape(shape))
    is_common = profile is not None and float(whole.rows.mean()) > ROUGHLY * float(whole.diagonal.mean())
    lean = Lean(profile, whole.rows.reshape(shape) / whole.rows.mean(), near) if profile is not None and is_common else None
    return Met(table, near, profile, lean, Filtered(table, base, terms))


def _near(
    maps: Sequence[Sequence[Array]],
    numbers: Sequence[float],
    excess: Sequence[tuple[float, list[Array]]],
    diagonal: Array,
    axes: tuple[Axis, ...],
) -> Neighbours | None:
    """What near places share, lag by lag, at equal levels: those along each axis are divided by."""
    if float(diagonal.max()) <= 0.0:
        return None
    ranks = range(diagonal.ndim)
    along = [np.sqrt(diagonal.mean(axis=tuple(q for q in ranks if q != p))) for p in ranks]
    even = [[matrix / np.maximum(n, 1e-9 * n.max())[:, None] for matrix, n in zip(given, along, strict=True)] for given in maps]
    lags = [
        factor * own * outer([by_lag(each) for each in products])
        for factor, kinds in excess
        for own, products in _products(even, numbers, kinds)
    ]
    total = np.asarray(sum(lags[1:], lags[0]))
    first = float(total.ravel()[0])
    return made(axes, total / first) if first > 0.0 else None


@dataclass(frozen=True, slots=True)
class _Places:
    """What pairs of places along some axes share: matrices, and factors.

    ``common``: along each axis, of what all places have in common, a lean of each on it; ``own``: of what each has by itself.
    ``even``: table at equal leans. ``far``: second moment of the common part; ``excess``: beyond that, as sums of products.
    """

    common: list[Array]
    own: list[Array]
    even: Array
    far: float
    excess: list[tuple[float, list[Array]]]


def _places(base: Value, axes: tuple[Axis, ...], positions: Sequence[int]) -> _Places:
    """Of ``E[x_p x_q] = far a_p a_q + (own - far <a^2>) n_p n_q e(p - q)``: a the lean, ``n_p^2`` what is left of levels."""
    leaning, even = base.leaning(), base.table.copy()
    leans, squares = [], []
    for position, axis in zip(positions, axes, strict=True):
        lean = leaning.mean(axis=tuple(p for p in range(leaning.ndim) if p != position)).ravel()
        leans.append(np.broadcast_to(lean, axis.size))
        squares.append(levels.over(base.levels, position, axis.size) ** 2)
        np.moveaxis(even, position, 0)[0] /= max(levels.pair_factor(leans[-1]), 1e-12)
    near = base.near_without_common() or Neighbours((), np.array(1.0))
    for axis in axes:
        near = near.with_axis(axis)
    own, apart = base.second_moment, float(even[tuple(0 if axis in axes else 1 for axis in base.axes)])
    square = math.prod(float(np.mean(a**2)) for a in leans)
    average = near.average([False] * len(axes)) / math.prod(levels.pair_factor(a) for a in leans)
    alone, far = [np.sqrt(each) for each in squares], 0.0
    for _ in range(2):  # what the common part leaves to a place is what near places share
        of_near = average * math.prod(levels.pair_factor(n) for n in alone)
        far = (apart - own * of_near) / (1.0 - square * of_near) if square * of_near < 1.0 - 1e-9 else own / square
        alone = [_rooted(own * each - far * a**2) for each, a in zip(squares, leans, strict=True)]
    excess = [
        ((own - far * square) * factor, [kind * np.multiply.outer(n, n) for kind, n in zip(kinds, alone, strict=True)])
        for factor, kinds in _separable(_of_spectrum(near.over(axes, [near.lags(axis) for axis in axes])), axes)
    ]
    return _Places([np.multiply.outer(a, a) for a in leans], [np.diag(n**2) for n in alone], even, far, excess)


def _rooted(squares: Array) -> Array:
    """Root of what is not negative, at a mean square of 1; of ones where nothing is left."""
    roots = np.sqrt(np.maximum(squares, 0.0))
    level = float(np.mean(roots**2)) ** 0.5
    return roots / level if level > 0.0 else np.ones_like(roots)


def _of_spectrum(excess: Array) -> Array:
    """``e(d)`` without the frequencies at which its power is below zero: lags are averages over places, and cut off."""
    whole = np.zeros([2 * FINE] * excess.ndim)
    for signs in product((False, True), repeat=excess.ndim):
        part = excess[tuple(slice(1, None) if sign else slice(None) for sign in signs)]
        index = [-np.arange(1, n + 1) if sign else np.arange(n) for sign, n in zip(signs, part.shape, strict=True)]
        whole[np.ix_(*index)] = part
    power = np.fft.fftn(whole).real
    if float(power.min()) >= -1e-9 * float(power.max()):
        return excess
    found = np.fft.ifftn(np.maximum(power, 0.0)).real[(slice(0, FINE),) * excess.ndim]
    return np.asarray(found / found.ravel()[0])


def _separable(excess: Array, axes: tuple[Axis, ...]) -> Iterator[tuple[float, list[Array]]]:
    """``e(d) = sum over r of s_r u_r(d_1) v_r(d_2)`` as factors and matrices of places along each axis."""
    columns = excess.reshape(excess.shape[0], -1)
    left, sizes, right = np.linalg.svd(columns, full_matrices=False)
    for r, size in enumerate(sizes):
        if size > 1e-7 * float(sizes[0]):
            parts = [left[:, r], right[r]][: len(axes)]
            scale = size if len(axes) > 1 else size * float(right[r, 0])
            yield scale, [_toeplitz(part, axis.size) for part, axis in zip(parts, axes, strict=True)]


def _toeplitz(lags: Array, size: int) -> Array:
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    return np.where(distance < len(lags), lags[np.minimum(distance, len(lags) - 1)], 0.0)
