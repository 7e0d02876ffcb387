"""Contractions: linear maps, convolutions, products of activations. One formula for all of them.

For independent operands a, b and contracted axes R of sizes n_r, summed over which contracted coordinates two entries share:

    K_y[S] = sum over T subset of R of  prod_{r in T} n_r  prod_{r not in T} n_r (n_r - 1)  K_a[S+T] K_b[S+T]

A weight with independent entries of mean 0 and variance v is an operand with ``K[all] = v`` and 0 elsewhere: He's rule, the
attention-logit rule, embeddings, experts and low-rank factors are special cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gainstage.signal import edges, levels
from gainstage.signal.agreement import agreement, known_by
from gainstage.signal.axes import Axis, Dim, axes_of, distinct
from gainstage.signal.between import kept, loud_together, meeting
from gainstage.signal.copies import replace
from gainstage.signal.directions import flatness_of_product
from gainstage.signal.joining import join
from gainstage.signal.marginal import Marginal
from gainstage.signal.movement import expand, merge_dim, parts_along, refine, reshape
from gainstage.signal.neighbours import REACH, Neighbours, beyond, cut, made, outer
from gainstage.signal.overlap import NONE, Overlap, Taps
from gainstage.signal.quadrature import Array, gamma_quantiles
from gainstage.signal.quotient import weighed
from gainstage.signal.rows import apart_of, pattern_of, tilted
from gainstage.signal.spread import multiplied, weighted
from gainstage.signal.traits import Lean
from gainstage.signal.value import Value, gaussian

UNLIKE = 0.1  # by how much the share of its mean in a part's second moment differs from that of another part
Places = NDArray[np.int64]


def contract(a: Value, b: Value, labels_a: str, labels_b: str, labels_out: str) -> Value:
    """Sum of products over the labels that are not in ``labels_out``; one letter for each dimension, as in einsum."""
    if b.tilt is not None and a.tilt is None:
        return contract(b, a, labels_b, labels_a, labels_out)
    if a.tilt is not None:  # what is summed over are keys, whatever map they were laid out on before
        for d, label in enumerate(labels_b):
            b = b if label in labels_out else merge_dim(b, d)
    if (by_parts := _by_parts(a, b, labels_a, labels_b, labels_out)) is not None:
        return by_parts
    a, b = match(a, b, labels_a, labels_b)
    numbers = Subscripts()
    index_a = [n for label, dim in zip(labels_a, a.dims, strict=True) for n in numbers.of(label, dim)]
    index_b = [n for label, dim in zip(labels_b, b.dims, strict=True) for n in numbers.of(label, dim)]
    dims_of = dict(zip(labels_b, b.dims, strict=True)) | dict(zip(labels_a, a.dims, strict=True))
    apart = apart_of(a, b, index_a, index_b)
    summed = [n for n in index_a if n in index_b and not any(n in numbers.of(label, dims_of[label]) for label in labels_out)]
    pattern = pattern_of(a, b, index_a, index_b, summed) if apart is None else None
    table_a = a.table if pattern is None else pattern.weighted(a.table)
    table_b = b.table if pattern is not None else meeting(a, b, [(index_a.index(n), index_b.index(n)) for n in summed])
    fresh = any(weight.is_weight and _is_fresh(weight) for weight in (a, b))
    if pattern is None and not fresh and a.levels is not None and b.levels is not None:
        table_b = table_b * loud_together(a, b, [(p, index_b.index(n)) for p, n in enumerate(index_a) if n in index_b])
    if apart is not None:
        table_a, table_b = apart.weights, apart.values
    operands: list[object] = [table_a, index_a, table_b, index_b]
    count = 1.0
    for label, dim in dims_of.items():
        if label not in labels_out:
            for axis, number in zip(dim, numbers.of(label, dim), strict=True):
                operands += [np.array([axis.size * (axis.size - 1.0), float(axis.size)]), [number]]
                count *= axis.size
    out_dims = distinct(tuple(dims_of[label] for label in labels_out))
    out_index = [n for label in labels_out for n in numbers.of(label, dims_of[label])]
    table = np.asarray(np.einsum(*operands, out_index), dtype=np.float64)  # type: ignore[call-overload]
    tilt = tilted(a, b, index_a, index_b, out_index, apart=apart)
    gained = 0.0
    if tilt is not None:
        gained = np.einsum(tilt[0], index_a, tilt[1], index_b, *operands[4:], out_index)  # type: ignore[call-overload]
        table = table + gained
    if apart is not None:
        table = apart.over_all(table, index_a, out_index)
    table[(1,) * table.ndim] += _agreement(a, b, [(a.axes[index_a.index(n)], b.axes[index_b.index(n)]) for n in summed])
    flatness = flatness_of_product(a, b, [index_a.index(n) for n in summed], [index_b.index(n) for n in summed])
    if pattern is None:
        profiles = [(a.levels, index_a), (b.levels, index_b)]
        if apart is not None:
            common = [p for p, n in enumerate(index_b) if n in index_a]
            profiles = [(apart.profile, index_a), (levels.averaged(b.levels, common, keep=True), index_b)]
        profile = levels.carried(profiles, out_index)
        if fresh:
            table = table * levels.coupling(profiles, out_index)
        result = contracted(a, b, out_dims, count * a.mean * b.mean, table, profile=profile)
        result = replace(result, gram=kept(a, b, out_dims) or kept(b, a, out_dims), flatness=flatness)
        return _strayed(result, a, b, (labels_a, labels_b, labels_out))
    between = gained + np.asarray(np.einsum(pattern.between_keys(table_a), *operands[1:], out_index))  # type: ignore[call-overload]
    profile, gram = pattern.rows(table, between, out_dims, out_index.index(index_a[pattern.query]))
    result = contracted(a, b, out_dims, count * a.mean * b.mean, table, profile=profile)
    return replace(result, gram=gram, overlap=_swollen(a, b))


def _by_parts(a: Value, b: Value, labels_a: str, labels_b: str, labels_out: str) -> Value | None:
    """Of a concatenation with something else, each part by itself, where they are cut apart again: values beside ones.

    None unless an operand has such parts along what is not summed over, of which some are their mean and others have none.
    """
    if a.is_weight or b.is_weight:
        return None
    for one, own, other in ((a, labels_a, labels_b), (b, labels_b, labels_a)):
        parts = parts_along(one)
        if parts is None or own[parts[0]] in other or own[parts[0]] not in labels_out or not _are_unlike(parts[1]):
            continue
        pairs = [(part, b) if one is a else (a, part) for part in parts[1]]
        made = [contract(first, second, labels_a, labels_b, labels_out) for first, second in pairs]
        return join(made, labels_out.index(own[parts[0]]))
    return None


def _are_unlike(parts: Sequence[Value]) -> bool:
    shares = [part.mean**2 / part.second_moment for part in parts if part.second_moment > 0.0]
    return len(shares) > 1 and max(shares) - min(shares) > UNLIKE


def _swollen(a: Value, b: Value) -> Overlap:
    """Of weighted sums of values v over keys: near Gaussian given what made v, their level strays by ``2 E[cos^2]``."""
    return NONE if a.tilt is None else replace(NONE, swell=2.0 * b.overlap.variance)


def _is_fresh(weight: Value) -> bool:
    """Whether a tensor's entries are independent, of mean 0."""
    return float(np.abs(weight.table).sum()) <= (1.0 + 1e-9) * weight.second_moment


def _agreement(a: Value, b: Value, summed: Sequence[tuple[Axis, Axis]]) -> float:
    """``n (n - 1) K_a K_b Cov(cos, cos')``: see :mod:`gainstage.signal.agreement`; ``summed``: axes as a and as b has them."""
    places, covariance = agreement(a, b, summed)
    size = math.prod(axis.size for axis in places)
    each = math.prod(own.size for own, _ in summed) / size
    return each * size * (size - 1.0) * a.second_moment * b.second_moment * covariance


def _strayed(y: Value, x: Value, weight: Value, labels: tuple[str, str, str]) -> Value:
    """A product y, with what its entries stray by for sharing weights, if one of the operands is weights."""
    read, own, out = labels
    if x.is_weight is weight.is_weight:
        names = frozenset() if x.is_weight else known_by(x) | known_by(weight)
        read_by = x.read | weight.read | names | weighed(names)
        return replace(y, read=read_by, overlap=_swollen(x, weight))
    if x.is_weight:
        return _strayed(y, weight, x, (own, read, out))
    starts = [int(start) for start in np.cumsum([0, *(len(dim) for dim in x.dims)])]
    along = {label: range(starts[d], starts[d + 1]) for d, label in enumerate(read)}
    terms = {p: float(x.axes[p].size) for label in read if label not in out for p in along[label]}
    alone = [p for label in read if label in out and label in own for p in along[label]]
    read_by = known_by(x) if weight.lineage.bit_count() == 1 else x.read  # or a learned query's keys
    return replace(weighted(y, x, weight, terms, alone=alone), read=read_by)


class Subscripts:
    """Integer subscripts for np.einsum: one for each axis of each label."""

    def __init__(self) -> None:
        self._of: dict[str, list[int]] = {}
        self._next = 0

    def of(self, label: str, dim: Dim) -> list[int]:
        """Subscripts of the axes of a label, the same at every call."""
        if label not in self._of:
            self._of[label] = [self.fresh() for _ in dim]
        return self._of[label]

    def fresh(self) -> int:
        """A subscript that nothing else has."""
        self._next += 1
        return self._next - 1


def contracted(a: Value, b: Value, dims: tuple[Dim, ...], mean: float, table: Array, *, profile: Array | None) -> Value:
    """Gaussian result of a sum over many products, with the history of its operands.

    Of two that are nowhere negative a gamma variable, which is nowhere negative either: what divides by it stays finite.
    """
    made = gaussian(
        dims,
        mean,
        table,
        profile=profile,
        lineage=a.lineage | b.lineage,
        stray=multiplied(a, b),
        is_weight=a.is_weight and b.is_weight,
    )
    if mean <= 0.0 or made.variance <= 0.0 or min(float(x.marginal.values.min()) for x in (a, b)) < 0.0:
        return made
    std = made.variance**0.5
    return replace(made, marginal=Marginal(object(), lambda: gamma_quantiles(mean, std)), rho=None)


def match(a: Value, b: Value, labels_a: str, labels_b: str) -> tuple[Value, Value]:
    """Give dimensions with the same label the same axes; a dimension of size 1 is broadcast."""
    for label in labels_a:
        if label in labels_b:
            i, j = labels_a.index(label), labels_b.index(label)
            size = max(a.shape[i], b.shape[j])
            a = expand(a, [size if d == i else n for d, n in enumerate(a.shape)])
            b = expand(b, [size if d == j else n for d, n in enumerate(b.shape)])
            a, b = refine(a, b, i, j)
    return a, b


def tap_counts(windows: Array) -> Array:
    """``N[s, k]``: expected pairs of taps of two outputs, by same or another output (s) and same or another tap (k).

    ``windows`` [outputs, taps] is the level of the place that a tap reads, 0 where it reads padding.
    """
    outputs = windows.shape[0]
    per_output, per_tap, squares = windows.sum(1), windows.sum(0), windows**2
    counts = np.zeros((2, 2))
    counts[1, 1] = squares.sum(1).mean()
    counts[1, 0] = (per_output**2).mean() - counts[1, 1]
    if outputs > 1:
        pairs = outputs * (outputs - 1.0)
        same_tap = float((per_tap**2).sum() - squares.sum())
        counts[0, 1] = same_tap / pairs
        counts[0, 0] = (per_output.sum() ** 2 - (per_output**2).sum() - same_tap) / pairs
    return counts


def convolve(x: Value, weight: Value, places: Sequence[Places], groups: int, *, transposed: bool = False) -> Value:
    """Convolution of x [batch, channel, *space] with a kernel [out, channel/groups, *taps].

    Taps are contracted like channels; those in the padding do not count (see :func:`tap_counts`). Two taps read the same
    place only for the same output and the same tap. A transposed kernel is [channel, out/groups, *taps].
    ``places`` [outputs, taps], for each dimension of space: the position that a tap reads, -1 for none.
    """
    rank = len(places)
    x, weight = _grouped(x, weight, groups, rank, transposed=transposed)
    labels_x, labels_w = "bgc" + "uvw"[:rank], ("gco" if transposed else "goc") + "klm"[:rank]
    x, weight = match(x, weight, labels_x, labels_w)
    starts = [int(start) for start in np.cumsum([0, *(len(dim) for dim in x.dims)])]
    space: list[Dim] = [(Axis(len(place)),) if len(place) > 1 else () for place in places]
    seen, left = edges.read(x, places, space)
    x = replace(x, table=seen)
    windows = [levels.read(x.levels if x.dims[3 + d] else None, starts[3 + d], place) for d, place in enumerate(places)]
    table, index_x, index_w, out_index = _map_table(x, weight, (labels_x, labels_w), windows, space)
    count = math.prod([*(axis.size for axis in x.dims[2]), *(float(window.sum(1).mean()) for window in windows)])
    dims = (x.dims[0], weight.dims[0] + weight.dims[2 if transposed else 1], *space)
    profile = levels.product(
        levels.carried([(x.levels, index_x), (weight.levels, index_w)], out_index),
        levels.normalised(levels.outer([np.sqrt((window**2).sum(1)) for window in windows], len(axes_of(dims)))),
    )
    result = replace(contracted(x, weight, dims, count * x.mean * weight.mean, table, profile=profile), edges=left)
    if weight.is_weight:
        channels = {starts[2] + i: float(axis.size) for i, axis in enumerate(x.dims[2])}
        taps = {starts[3 + d]: float((window > 0.0).sum(1).mean()) for d, window in enumerate(windows) if x.dims[3 + d]}
        kernel = {
            x.axes[starts[3 + d]]: Taps(place.shape[1], stride_of(place), space[d][0] if space[d] else None)
            for d, place in enumerate(places)
            if x.dims[3 + d]
        }
        groups_at = range(starts[1], starts[2])
        result = weighted(result, x, weight, channels | taps, alone=groups_at, places=list(taps), taps=kernel)
    leaning, lean = windows, x.valid_lean()
    if lean is not None:
        profiles = [lean.profile if dim else None for dim in x.dims[3:]]
        leaning = [levels.read(profiles[d], starts[3 + d], place, mean=True) for d, place in enumerate(places)]
    if not _is_fresh(weight):
        return replace(result, lean=_border_lean(profile, leaning, None))
    inner = None if transposed else _strided_neighbours(x, places, space)
    near, far = _moved_neighbours(x, places, windows, space)
    result = replace(result, near=near, lean=_border_lean(profile, leaning, inner))
    padded = any(np.ptp(window.sum(1)) > 0.0 for window in windows)
    if near is None or transposed or padded or all(stride_of(place) == 1 for place in places):
        return result
    return result.with_neighbours(near, result.second_moment, far * result.second_moment)  # of places that are read, not of all


def _map_table(
    x: Value, weight: Value, labels: tuple[str, str], windows: Sequence[Array], space: Sequence[Dim]
) -> tuple[Array, list[int], list[int], list[int]]:
    """Table of a convolution, and the subscripts of the axes of x, of the kernel and of the result."""
    numbers = Subscripts()
    index_x, index_w = (
        [n for label, dim in zip(own, v.dims, strict=True) for n in numbers.of(label, dim)]
        for own, v in zip(labels, (x, weight), strict=True)
    )
    even = levels.evened(x.table, x.levels, range(x.table.ndim - sum(map(bool, x.dims[3:])), x.table.ndim))
    operands: list[object] = [even, index_x, weight.table, index_w]
    for axis, number in zip(x.dims[2], numbers.of("c", x.dims[2]), strict=True):
        operands += [np.array([axis.size * (axis.size - 1.0), float(axis.size)]), [number]]
    out_index = [n for label in "bgo" for n in numbers.of(label, ())]
    for d, (window, out) in enumerate(zip(windows, space, strict=True)):
        own = [numbers.fresh()] if out else []
        tap, place = numbers.of("klm"[d], weight.dims[d - len(windows)]), numbers.of("uvw"[d], x.dims[3 + d])
        pairs = _window_pairs(window, even=not place)
        operands += [pairs[(slice(None) if out else 1, slice(None) if tap else 1)], own + tap + place]
        out_index += own
    table = np.einsum(*operands, out_index)  # type: ignore[call-overload]
    return np.asarray(table, dtype=np.float64), index_x, index_w, out_index


def _border_lean(profile: Array | None, windows: Sequence[Array], near: Neighbours | None) -> Lean | None:
    """What all positions have in common comes through the taps that a border position shares with the average one."""
    if profile is None:
        return None
    lean = levels.outer([np.vecdot(window, window.mean(0)) for window in windows], profile.ndim)
    return Lean(profile, lean / lean.mean(), near)


def _strided_neighbours(x: Value, places: Sequence[Places], space: Sequence[Dim]) -> Neighbours | None:
    """The same tap of two outputs reads places that lie as many strides apart."""
    before = x.near_without_common()
    if before is None or not axes_of(tuple(space)):
        return None
    for dim, place, out in zip(x.dims[3:], places, space, strict=True):
        for axis in dim:
            before = before.strided(axis, stride_of(place) if out else 1, out)
    return cut(before)


def stride_of(place: Places) -> int:
    """How far apart the same tap of two neighbouring outputs reads."""
    return max(int(place[1].max() - place[0].max()), 1) if len(place) > 1 else 1


def _moved_neighbours(
    x: Value, places: Sequence[Places], windows: Sequence[Array], space: Sequence[Dim]
) -> tuple[Neighbours | None, float]:
    """Lag by lag the same taps of two outputs, times what the places that they read share.

    ``sum_k w_pk w_qk [far + (own - far) e(place_pk - place_qk)]``, at equal levels of p and q,
    averaged over pairs at each lag; and what
    two places far apart share, over what one has.
    """
    inner, outer_axes = axes_of(x.dims[3:]), axes_of(tuple(space))
    if not inner or not outer_axes:
        return None, 1.0
    before = x.neighbours() or Neighbours((), np.array(1.0))
    for axis in inner:
        before = before.with_axis(axis)
    own, far = x.apart(before)
    excess, taps, distant = before.over(inner, [before.lags(axis) for axis in inner]), [], 1.0
    for window, place, dim, out in zip(windows, places, x.dims[3:], space, strict=True):
        counts, pairs, apart = _shared_taps(window, place, before.lags(dim[0]) if dim else 1)
        if dim:
            excess = np.tensordot(excess, counts, axes=([0], [1]))
        if out:
            taps.append(pairs)
            distant *= apart
        if not out and dim:
            excess = excess[..., 0]
        elif out and not dim:
            excess = excess[..., None] * pairs
    shared = far * outer(taps) + (own - far) * excess
    alone = float(shared[(0,) * shared.ndim])
    top = alone - far * distant
    if top <= 0.0:
        return None, 1.0
    return made(outer_axes, (shared - far * distant) / top), far * distant / alone


def _shared_taps(window: Array, place: Places, lags: int) -> tuple[Array, Array, float]:
    """Same taps of two outputs by the distance D of the outputs: those that read at a distance d [D, d], and all [D].

    All taps of two outputs read equally far apart, if both are inside. At equal levels of the outputs; beside them all for
    outputs that are far apart.
    """
    even = window / np.sqrt(np.maximum((window**2).sum(1, keepdims=True), 1e-300))
    outputs = len(place)
    along = np.array([np.vdot(even[: outputs - shift], even[shift:]) / (outputs - shift) for shift in range(min(outputs, REACH))])
    counts = np.zeros((len(along), lags))
    for shift, total in enumerate(along):
        read = (place[: outputs - shift] >= 0) & (place[shift:] >= 0)
        if total > 0.0 and (distance := abs(int((place[shift:] - place[: outputs - shift])[read][0]))) < lags:
            counts[shift, distance] = total
    return counts, along, beyond(along, float((even.sum(0) ** 2).sum()), outputs)


def _grouped(x: Value, weight: Value, groups: int, rank: int, *, transposed: bool) -> tuple[Value, Value]:
    """Operands as [batch, group, channel, *space] and [group, out, channel, *taps]; a transposed kernel has the channel first."""
    for d in range(2, 2 + rank):
        x, weight = merge_dim(x, d), merge_dim(weight, d)
    channels, kernel = x.shape[1] // groups, weight.shape[2:]
    x = reshape(x, (x.shape[0], groups, channels, *x.shape[2:]))
    inner = (channels, weight.shape[1]) if transposed else (weight.shape[0] // groups, channels)
    return x, reshape(weight, (groups, *inner, *kernel))


def _window_pairs(window: Array, *, even: bool) -> Array:
    """``E[s, k, i]``: tap counts, at the entry i of x's table that the pair of taps reads; ``even``: there is only one place."""
    counts = tap_counts(window)
    if even:
        return counts
    pairs = np.zeros((2, 2, 2))
    pairs[..., 0] = counts
    pairs[1, 1] = (0.0, counts[1, 1])
    return pairs
