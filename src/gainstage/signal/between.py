"""Between positions: what pairs of them share in one tensor, where pairs are not alike, and what becomes of it.

A class token gets its gradient from a head, all other positions from attention alone, which sends the same to each. So what two
positions share does not go with their levels: it is nearly one number, while the class token is louder by factors. What a sum
over the other positions makes of that, as for the bias of the embedding of patches, asks for the pairs. And a class token is the
same in all samples at first, where patches have nothing in common: what a head that reads it sees of one sample in another asks
for each position by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gainstage.signal import levels
from gainstage.signal.axes import Axis, Dim, axes_of
from gainstage.signal.copies import replace
from gainstage.signal.gram import (
    Gram,
    along,
    between_groups,
    between_places,
    factors_of,
    grouped,
    mixture,
    relative,
    ungrouped,
    widths,
)
from gainstage.signal.movement import merge_dim, parts_along
from gainstage.signal.quadrature import Array, evaluate_series
from gainstage.signal.value import Value

LONG = 1024  # positions up to which pairs of them are looked at one by one


def kept(x: Value, other: Value, dims: Sequence[Dim]) -> Gram | None:
    """Gram matrix of x where a contraction leaves its positions alone."""
    if x.gram is None or x.gram.axis not in x.axes or x.gram.axis in other.axes:
        return None
    return x.gram if x.gram.axis in axes_of(tuple(dims)) else None


def shared(x: Value, position: int) -> Array | None:
    """Share of each pair along an axis: as is known, by parts of a concatenation, or by levels; None where all are alike."""
    axis = x.axes[position]
    if not _has(x, axis):
        parts = _parts(x, position)
        if parts:
            return _of_parts(x, parts, position)
    return factors_of(x.gram, axis, x.levels, position)


def across(x: Value, position: int, over: Axis) -> Array | None:
    """Share of each position in what entries have in common that differ along another axis alone, over the average."""
    axis = x.axes[position]
    if _has(x, axis) and x.gram is not None and x.gram.over is over:
        return x.gram.across
    parts = _parts(x, position)
    if parts and not _has(x, axis):
        index = _apart(x, x.axes.index(over))
        each = [np.full(part.shape[dim], _entry(part, dim, index, position)) for dim, part in parts]
        return _over_mean(grouped(np.concatenate(each)), axis.size)
    return None if x.levels is None or x.levels.shape[position] == 1 else along(x.levels, position, axis.size)


def rescaled(x: Value, position: int, ratio: Array, table: Array) -> tuple[Gram | None, Array]:
    """Gram matrix and table after place t along an axis is multiplied by ratio[t]; ``table``: as if all were by one number.

    No matrix where pairs go by levels, and will.
    """
    axis, table = x.axes[position], table.copy()
    root = grouped(ratio)
    factors = shared(x, position)
    factors, mean = relative(np.outer(root, root) * (1.0 if factors is None else factors), axis.size)
    np.moveaxis(table, position, 0)[0] *= mean
    if not _has(x, axis) and not _parts(x, position):
        return None, table
    over = _other_axis(x, position)
    if over is None:
        return Gram(axis, factors), table
    square = float(np.mean(ratio**2 * levels.over(x.levels, position, axis.size) ** 2))
    each = across(x, position, over)
    found = grouped(ratio**2) * (1.0 if each is None else each)
    _between_samples(table, x, position, over)[...] *= _average(found, axis.size) / square
    return Gram(axis, factors, over, _over_mean(found, axis.size)), table


def with_pairs_of(y: Value, dim: int, x: Value, other: int) -> Value:
    """A product y whose places along a dimension are those of x along another, with what pairs of them share of x."""
    if x.gram is None or x.dims[other] != (x.gram.axis,) or len(y.dims[dim]) != 1:
        return y
    return replace(y, gram=Gram(y.dims[dim][0], x.gram.factors))


def differing(x: Value, position: int) -> Array | None:
    """``(E[x_s x_t] - K) / (E[x^2] - K)`` for pairs of places, K what two have in common on average; None where all are alike."""
    axis, index = x.axes[position], _apart(x, position)
    common, own = float(x.table[index]), x.second_moment
    if not _has(x, axis) or axis.size > LONG or own <= common:
        return None
    assert x.gram is not None
    matrix = common * between_places(x.gram.factors, axis.size)
    np.fill_diagonal(matrix, own * levels.over(x.levels, position, axis.size) ** 2)
    return np.asarray((matrix - common) / (own - common))


def deviation(x: Value) -> float:
    """Deviation over pairs of places of what two share, relative to the second moment; 0 where all are alike."""
    if x.gram is None or x.gram.axis not in x.axes:
        return 0.0
    position = x.axes.index(x.gram.axis)
    matrix = differing(x, position)
    return 0.0 if matrix is None else over_pairs(matrix) * (1.0 - float(x.table[_apart(x, position)]) / x.second_moment)


def over_pairs(matrix: Array) -> float:
    """Root mean square of what is not on the diagonal."""
    size = len(matrix)
    return float(((np.square(matrix).sum() - np.square(matrix.diagonal()).sum()) / (size * (size - 1.0))) ** 0.5)


def of_part(x: Value, moved: Value, position: int, part: slice, ratio: float) -> Value:
    """A range of positions, louder than the whole by a factor that is still to come, with what its pairs and samples share."""
    whole, axis = x.axes[position], moved.axes[position]
    if not _has(x, whole) or whole.size > LONG or ratio <= 0.0:
        return moved
    assert x.gram is not None
    factors, mean = between_groups(between_places(x.gram.factors, whole.size)[part, part])
    table, square = moved.table.copy(), moved.mean**2
    before = float(table[_apart(moved, position)])
    _about_mean(np.moveaxis(table, position, 0)[:1], before, before * mean / ratio**2, square)
    gram = Gram(axis, factors)
    if x.gram.over in moved.axes and x.gram.across is not None and x.gram.over is not None:
        each = ungrouped(x.gram.across, whole.size)[part]
        before = float(table[_apart(moved, moved.axes.index(x.gram.over))])
        between = _between_samples(table, moved, position, x.gram.over)
        _about_mean(between, before, before * float(each.mean()) / ratio**2, square)
        gram = Gram(axis, factors, x.gram.over, _over_mean(grouped(each), axis.size))
    return replace(moved, table=table, gram=gram, rho=None)


def of_place(x: Value, fixed: Value, position: int, index: int, ratio: float) -> Value:
    """One position, louder than the whole by a factor that is still to come, with what its samples share."""
    gram = x.gram
    if gram is None or not _has(x, x.axes[position]) or gram.over not in fixed.axes or gram.across is None or ratio <= 0.0:
        return fixed
    table = fixed.table.copy()
    at = fixed.axes.index(gram.over)
    before, share = float(table[_apart(fixed, at)]), float(ungrouped(gram.across, gram.axis.size)[index])
    _about_mean(np.moveaxis(table, at, 0)[:1], before, before * share / ratio**2, fixed.mean**2)
    return replace(fixed, table=table, rho=None)


def of_terms(terms: Sequence[tuple[Value, float]], among: Sequence[int] | None = None) -> Gram | None:
    """Gram matrix of a sum of tensors, or of parts of a whole, each with its weight.

    If it is known of one of them, or if they are loud at different positions. ``among``: the axes that are looked at.
    """
    x = terms[0][0]
    for position, axis in enumerate(x.axes):
        if (among is None or position in among) and _differ([v for v, _ in terms], position):
            index, over = _apart(x, position), _other_axis(x, position)
            pairs = [(shared(v, position), weight * float(v.table[index])) for v, weight in terms]
            factors = mixture(pairs, np.ones((len(widths(axis.size)),) * 2))
            if over is None:
                return Gram(axis, factors)
            at = x.axes.index(over)
            samples = [(across(v, position, v.axes[at]), weight * float(v.table[_apart(v, at)])) for v, weight in terms]
            return Gram(axis, factors, over, mixture(samples, np.ones(len(factors))))
    return None


def of_factors(x: Value, y: Value, product: Value) -> Value:
    """A product of two tensors of which one has a Gram matrix; as far as it goes it has the product of their averages."""
    for position, (axis, other) in enumerate(zip(x.axes, y.axes, strict=True)):
        if not (_has(x, axis) or _has(y, other)):
            continue
        first, second = (1.0 if f is None else f for f in (shared(x, position), shared(y, position)))
        factors, mean = relative(np.asarray(first * second), axis.size)
        table, over = product.table.copy(), _other_axis(x, position)
        np.moveaxis(table, position, 0)[0] *= mean
        if over is None:
            return replace(product, table=table, gram=Gram(axis, factors))
        each, others = across(x, position, over), across(y, position, y.axes[x.axes.index(over)])
        both = np.asarray((1.0 if each is None else each) * (1.0 if others is None else others) * np.ones(len(factors)))
        _between_samples(table, product, position, over)[...] *= _average(both, axis.size)
        return replace(product, table=table, gram=Gram(axis, factors, over, _over_mean(both, axis.size)))
    return product


def loud_together(x: Value, y: Value, axes: Sequence[tuple[int, int]]) -> Array:
    """``mean of s_i^2 t_i^2`` for levels of two tensors, for the same place along axes of both; for a table of y.

    A gradient and its tensor are loud at places of their own, and a product of the two where both are.
    """
    found = np.ones((1,) * y.table.ndim)
    for own, other in axes:
        size = x.axes[own].size
        both = levels.over(x.levels, own, size) * levels.over(y.levels, other, size)
        ratios = np.array([1.0, float((both**2).mean())])
        found = found * ratios.reshape([2 if p == other else 1 for p in range(found.ndim)])
    return found


def meeting(a: Value, b: Value, summed: Sequence[tuple[int, int]]) -> Array:
    """Table of b for a sum of products over positions, of which some share much in both; ``summed``: axes of a, of b."""
    table = b.table
    for own, other in summed:
        axis, beside = a.axes[own], b.axes[other]
        if not (_has(a, axis) or _has(b, beside)):
            continue
        first, second = shared(a, own), shared(b, other)
        table = table.copy()
        if first is not None and second is not None:
            np.moveaxis(table, other, 0)[0] *= relative(first * second, axis.size)[1]
        places = [(i, j) for i, j in summed if i == 0 < own and a.axes[i].size > 1]  # the first axis is that of samples
        if places:
            each, others = across(a, own, a.axes[places[0][0]]), across(b, other, b.axes[places[0][1]])
            if each is not None and others is not None:
                _between_samples(table, b, other, b.axes[places[0][1]])[...] *= _average(each * others, axis.size)
    return table


def through(x: Value, series: Array, table: Array) -> tuple[Gram | None, Array]:
    """Gram matrix and table of ``f(x)``, f given by its series: ``sum of a_n^2 rho^n`` for each pair.

    Where levels differ, as before. ``table``: with all pairs alike.
    """
    gram = x.gram
    if gram is None or gram.axis not in x.axes or x.variance <= 0.0:
        return gram, table
    position, size, table = x.axes.index(gram.axis), gram.axis.size, table.copy()
    if x.levels is not None and x.levels.shape[position] > 1:
        return gram, table

    def mapped(share: Array, index: tuple[int, ...]) -> Array:
        rho = (float(x.table[index]) * share - x.mean**2) / x.variance
        return evaluate_series(series, np.clip(rho, -1.0, 1.0))

    index = _apart(x, position)
    factors, mean = relative(mapped(gram.factors, index), size)
    _about_mean(np.moveaxis(table, position, 0)[:1], float(table[index]), mean, float(series[0]))
    if gram.over is None or gram.over not in x.axes or gram.across is None:
        return Gram(gram.axis, factors), table
    index = _apart(x, x.axes.index(gram.over))
    found = mapped(gram.across, index)
    _about_mean(_between_samples(table, x, position, gram.over), float(table[index]), _average(found, size), float(series[0]))
    return Gram(gram.axis, factors, gram.over, _over_mean(found, size)), table


def _about_mean(part: Array, before: float, after: float, square: float) -> None:
    """Covariances in part of a table, by how much one of them changes."""
    if before != square:
        part[...] = square + (part - square) * (after - square) / (before - square)


def _has(x: Value, axis: Axis) -> bool:
    return x.gram is not None and x.gram.axis is axis


def _apart(x: Value, position: int) -> tuple[int, ...]:
    """Where a table has what two entries share that differ along one axis only."""
    return tuple(0 if p == position else 1 for p in range(x.table.ndim))


def _other_axis(x: Value, position: int) -> Axis | None:
    """The axis of samples: the one that the Gram matrix names, or the first that is longer than 1."""
    if x.gram is not None and x.gram.over is not None and x.gram.over in x.axes:
        return x.gram.over
    return next((axis for p, axis in enumerate(x.axes) if p != position and axis.size > 1), None)


def _between_samples(table: Array, x: Value, position: int, over: Axis) -> Array:
    """View of the part of a table that is about the same position of different samples."""
    at = x.axes.index(over)
    return table[tuple(slice(0, 1) if p == at else slice(1, 2) if p == position else slice(None) for p in range(table.ndim))]


def _average(groups: Array, size: int) -> float:
    return float((groups * widths(size)).sum() / size)


def _over_mean(groups: Array, size: int) -> Array:
    mean = _average(groups, size)
    return groups / mean if mean != 0.0 else np.ones_like(groups)


def _differ(values: Sequence[Value], position: int) -> bool:
    """Whether what positions share is known of one of the tensors, or is not alike; of maps, lags say what they share."""
    size = values[0].axes[position].size
    if size < 3 or all(v.is_weight for v in values) or any(v.near is not None for v in values):
        return any(_has(v, v.axes[position]) for v in values)
    if any(_has(v, v.axes[position]) or _parts(v, position) for v in values):
        return True
    along_it = [levels.over(v.levels, position, size) for v in values]
    return not all(np.allclose(along_it[0], other, rtol=1e-6) for other in along_it[1:])


def _parts(x: Value, position: int) -> list[tuple[int, Value]]:
    """Parts of a concatenation along an axis, each with the dimension that it has it in."""
    axis = x.axes[position]
    found = parts_along(x) if axis.size <= LONG else None
    if found is None or x.dims[found[0]] != (axis,):
        return []
    return [(found[0], merge_dim(part, found[0])) for part in found[1]]


def _entry(part: Value, dim: int, index: tuple[int, ...], position: int) -> float:
    """An entry of the table of a part, by that of the whole, whose axis of parts a part of size 1 has not."""
    return float(part.table[index if part.shape[dim] > 1 else index[:position] + index[position + 1 :]])


def _of_parts(x: Value, parts: Sequence[tuple[int, Value]], position: int) -> Array:
    """Pairs within each part as that has them; all pairs between two parts alike, by what is left of the average."""
    size, index = x.axes[position].size, _apart(x, position)
    matrix, start = np.full((size, size), np.nan), 0
    for dim, part in parts:
        n = part.shape[dim]
        factors = shared(part, position) if n > 1 else None
        inside = float(part.table[index]) if n > 1 else 0.0
        matrix[start : start + n, start : start + n] = inside * (1.0 if factors is None else between_places(factors, n))
        start += n
    others = np.isnan(matrix)
    known = float(matrix[~others].sum() - np.diag(matrix).sum())
    left = float(x.table[index]) * size * (size - 1.0) - known
    matrix[others] = left / max(int(others.sum()), 1)
    return between_groups(matrix)[0]
