"""Gradients through functions of many entries: norms, softmax, look-ups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gainstage.signal import levels, shares
from gainstage.signal.adjoint_given import along_own
from gainstage.signal.alike import averaged, border, centred
from gainstage.signal.axes import Axis
from gainstage.signal.between import rescaled
from gainstage.signal.copies import replace
from gainstage.signal.filters import divisor_strays, normalise
from gainstage.signal.gather import same_index_table
from gainstage.signal.gram import Gram
from gainstage.signal.joining import join
from gainstage.signal.linear import affine, mean_over
from gainstage.signal.movement import parts_along, refine, together, with_axes
from gainstage.signal.neighbours import Neighbours, made
from gainstage.signal.pairing import amplitude_of
from gainstage.signal.quadrature import (
    Array,
    expectation,
    few_points,
)
from gainstage.signal.shares import Share
from gainstage.signal.slicing import slices
from gainstage.signal.uneven import is_centred
from gainstage.signal.value import Value, gaussian

ONE_LENGTH = 0.5  # share of the variance of squared norms that is missing: rows were normalised, not by chance alike
LARGEST = 0.05  # of a variance: one component that is no more than this is as good as many


def averaged_over(table: Array, value: Value, reduced: Sequence[Axis]) -> Array:
    """Average of a table over all pairs of coordinates along some axes of a value, which keep length 1."""
    return averaged(table, [value.axes.index(axis) for axis in reduced], reduced)


def normalise_gradient(g: Value, x: Value, dims: Sequence[int], eps: float, *, centre: bool = True) -> tuple[Value, Value]:
    """``scale (g - mean(g) - xhat mean(g xhat))``, the means over some dimensions; and ``xhat``, the normalised x.

    Of g's second moments go those of its mean and of its part along xhat, which has mean square 1 there. The variance that
    divides strays from draw to draw, by ``v = mean over pairs of 2 rho^2`` of its square: ``E[1 / s^2] = (1 + v) / E[s^2]``.
    Of a concatenation, each part by itself, unless the average runs over the parts.
    """
    parts = parts_along(x)
    if parts is not None and parts[0] not in dims:
        pairs = zip(slices(g, *parts), parts[1], strict=True)
        done = [normalise_gradient(piece, part, dims, eps, centre=centre) for piece, part in pairs]
        return join([to_x for to_x, _ in done], parts[0]), join([xhat for _, xhat in done], parts[0])
    x, g = together(x, g)
    x_axes = [axis for d in dims for axis in x.dims[d]]
    axes = [axis for d in dims for axis in g.dims[d]]
    at = [x.axes.index(axis) for axis in x_axes]
    rest = centred(x, at) if centre else x.table
    level = max(float(rest[(1,) * x.table.ndim]), 0.0) + eps
    edges = border(x, at)
    stray = divisor_strays(x, x_axes, rest, edges, eps, centre=centre)
    if list(dims) == [len(x.dims) - 1] and not any(axis in x_axes for axis, _ in x.overlap.lags):  # over channels
        stray += x.overlap.swell
    xhat = normalise(x, x_axes, eps, centre=centre)
    along = averaged_over(along_own(g, xhat, axes).table, g, axes)
    common = averaged_over(g.table, g, axes) if centre else np.zeros_like(along)
    largest = float(edges[(-1,) * x.table.ndim]) / level if centre and level > 0.0 else 0.0
    inverse_factor, kept_along = _stray_inverse(stray, eps / level if level > 0.0 else 0.0, largest)  # level has eps in it
    table = g.table - xhat.table * along * (1.0 - kept_along) - common
    inverse, profile = _divided_levels(g, x, [x.axes.index(axis) for axis in x_axes], level - eps, eps)
    full = (1,) * table.ndim
    table[full] = max(float(table[full]), 0.0)
    near = _projected_neighbours(g, xhat, float(along[(-1,) * table.ndim]), float(common[(-1,) * table.ndim]))
    extra = {"lineage": g.lineage | x.lineage, "stray": g.stray.hidden(), "near": near, "uneven": x.uneven}
    table, gram = _between_levels(table, g, profile)
    table = table * (inverse_factor * inverse)
    to_x = gaussian(g.dims, 0.0, table, profile, gram=gram, **extra)
    amplitude = amplitude_of(g) * (inverse_factor * inverse) ** 0.5
    if centre:
        amplitude[tuple(0 if axis in axes else slice(None) for axis in g.axes)] = 0.0
    across = Share(frozenset(axes), 1.0 - kept_along)
    return replace(to_x, against=g.against, across=across, source=g.source, amplitude=amplitude), xhat


def _stray_inverse(stray: float, eps: float, largest: float = 0.0) -> tuple[float, float]:
    """``E[1 / v]`` for a variance v of mean 1 that strays by a relative variance, and ``E[(eps / v)^2 / v] / E[1 / v]``.

    ``eps``: the part of v that does not stray. What strays is chi-square with ``2 / stray`` degrees of freedom, which for a norm
    over two entries is 1: then eps decides. ``eps / v`` is what a norm leaves of its input's part along the output.
    ``largest``: a part of v that is the square of one Gaussian component.
    """
    if largest > LARGEST:
        largest = min(largest, (stray / 2.0) ** 0.5, 1.0 - eps)
        points, mass = few_points()
        rest = max(stray - 2.0 * largest**2, 0.0) / max(1.0 - largest - eps, 1e-9) ** 2
        sizes = 1.0 - largest + largest * points**2
        fixed = (eps + largest * points**2) / sizes
        each = [_stray_inverse(rest, part)[0] / size for part, size in zip(fixed, sizes, strict=True)]
        return float(mass @ each), eps**2
    if stray < 0.02:
        return 1.0 + stray, eps**2
    shape = 1.0 / stray
    logs = np.linspace(-60.0 / shape - 4.0, np.log(40.0 * max(1.0, stray) + 4.0), 4001)
    mass = np.exp(shape * (logs - np.exp(logs) + 1.0))
    variance = eps + (1.0 - eps) * np.exp(logs)
    inverse = float((mass / variance).sum() / mass.sum())
    return inverse, float((mass * eps**2 / variance**3).sum() / mass.sum()) / inverse


def to_reader(g: Value, of: Value, weight: Value, found: Value, *, terms: float, groups: float = 1.0) -> Value:
    """What goes on to the input of ``of = W x``, n terms each: W^T g, where g was divided by the deviations of its own channels.

    A long row of weights makes its channel loud, and its gradient quiet: ``E[|w|^2 / s^2] = (1 - V) E[|w|^2] E[1 / s^2]``, with
    ``V = (kurtosis of w - 1) / n`` the variance of ``|w|^2`` relative to its mean. And ``E[w w^T / w' C w]`` lacks
    ``2 C / tr C`` of its unit matrix, C the covariance of x over places: what goes on is turned away from what x varies by, see
    :attr:`Value.against`. Where g was, in m channels, ``E[w_c w_d^T (w_c' C w_d)] = C`` takes ``(m - 1) against / n`` off.
    """
    turned = g.against * (weight.shape[0] / groups - 1.0) / terms
    lost = turned
    if is_normalised(g, of, weight):
        lost += (weight.marginal.kurtosis - 1.0) / terms
        turned += 2.0 / terms
    return replace(affine(found, max(1.0 - lost, 0.0) ** 0.5), against=turned / groups)


def is_normalised(g: Value, of: Value, weight: Value) -> bool:
    """Whether each channel of g was divided by the deviation of that channel of ``of = W x``, rows of W independent."""
    return g.uneven is not None and g.uneven is of.uneven and not is_centred(weight)


def across_rows(g: Value, of: Value, weight: Value, found: Value) -> Value:
    """Gradient of the rows w of ``of = W x`` where each channel was divided by its own deviation: nothing of it lies along w.

    The norm took from g its part along the output, ``w' x``. Of ``sum g x`` this is the share ``tr(C^2) / tr(C)^2``, C the
    covariance of x over places; what a table shows of it is gone from g by now, but not what cosines stray by.
    """
    if not is_normalised(g, of, weight):
        return found
    return affine(found, max(1.0 - _cosines(of, weight), 0.0) ** 0.5)


def _cosines(of: Value, weight: Value) -> float:
    """``tr(C^2) / tr(C)^2`` for the covariance C of what ``of = W x`` reads, by how the variances of its channels differ."""
    excess = -2.0 if is_centred(weight) else weight.marginal.kurtosis - 3.0
    centred = 0.0 if of.uneven is None else of.uneven.centred
    return (centred - excess * weight.shape[0] / float(np.prod(weight.shape))) / 2.0


def has_one_length(weight: Value) -> bool:
    """Whether each row of a weight was divided by its own norm."""
    return weight.steady is not None and weight.steady.share > ONE_LENGTH


def along_rows(g: Value, of: Value, weight: Value, found: Value, channel: int) -> Value:
    """Gradient of rows w of ``of = W x`` that have one length, with what it has along them: ``w' dL/dw = sum g (w' x)``.

    The sum runs over samples and places, as for the scale of a norm. Where g has met the output in an activation and one g comes
    back to many places it is far from what unrelated ``dL/dw`` and w would have: all that a gain of the row gets, and what the
    norm that gave w its length takes. By Stein's lemma ``E[r(u) x] = C w E[r(u) u] / w' C w`` for ``g = g0 r(u)``, C the
    covariance of x: beyond what is unrelated each of n entries has ``n tr(C^2) / tr(C)^2`` times ``1 / (n |w|^2)`` of that sum.
    """
    others = [d for d in range(len(g.dims)) if d != channel % len(g.dims)]
    rows = frozenset(axis for dim in found.dims[1:] for axis in dim)
    unrelated = _of_sum(along_own(found, weight, list(rows)), range(1, len(found.dims)))
    if unrelated <= 0.0:
        return found
    known = max(_of_sum(along_own(g, of, [axis for d in others for axis in g.dims[d]]), others), 0.0)
    table, terms = found.table.copy(), float(np.prod(weight.shape[1:]))
    added = (known - unrelated) / terms * max(terms * _cosines(of, weight), 1.0)
    table[(1,) * table.ndim] += added / (terms * weight.second_moment)
    shown = unrelated + added
    return replace(found, table=table, across=Share(rows, 1.0 - known / shown))


def _of_sum(x: Value, dims: Sequence[int]) -> float:
    """Second moment of the sum over some dimensions."""
    count = float(np.prod([x.shape[d] for d in dims]))
    return mean_over(x, [axis for d in dims for axis in x.dims[d]]).second_moment * count**2


def to_channels(g: Value, found: Value, channels: int) -> Value:
    """The gradient W^T g of the input x of ``y = W x``, each output of which reads some channels, where g has nothing along y.

    ``sum g' x = sum g y`` over all places and the channels that are read: nothing of it is along them. Of one channel alone, that
    of a depthwise kernel, all of its part along x is gone.
    """
    places = [axis for d, dim in enumerate(g.dims) if d != 1 for axis in dim]
    gone, _ = shares.gone(g.across, places)
    after = frozenset(axis for d, dim in enumerate(found.dims) if d != 1 for axis in dim)
    return replace(found, across=Share(after, gone / channels)) if gone > 0.0 else found


def turned_by(g: Value, x: Value, y: Value, slopes: Array) -> float:
    """How far ``g f'(x)`` is turned away from x, where g is from ``y = f(x)``: two channels of small correlation rho have

    ``E[f']^2 Var(x) rho`` in common of y, and ``E[f']^2`` of the slopes.
    """
    if g.against == 0.0 or y.variance <= 0.0:
        return 0.0
    square = expectation(slopes**2)
    return g.against * expectation(slopes) ** 4 * x.variance / (y.variance * square) if square > 0.0 else 0.0


def _projected_neighbours(g: Value, xhat: Value, along: float, common: float) -> Neighbours | None:
    """Lag by lag ``g - along xhat - common``."""
    xhat = with_axes(xhat, g.dims)
    pair = [near for near in (g.neighbours(), xhat.neighbours()) if near is not None]
    axes = tuple(axis for axis in g.axes if any(axis in near.axes for near in pair))
    if not axes:
        return None
    shape = [max(near.lags(axis) for near in pair) for axis in axes]
    (of_g, far_g), (of_x, far_x) = g.lagged(axes, shape), xhat.lagged(axes, shape)
    left, far = of_g - along * of_x - common, far_g - along * far_x - common
    own = float(left[(0,) * len(axes)])
    return made(axes, (left - far) / (own - far)) if own > far else None


def _divided_levels(g: Value, x: Value, reduced: Sequence[int], level: float, eps: float) -> tuple[float, Array | None]:
    """``E[g^2 / (s^2 + eps)] / E[g^2]`` over coordinates, each with the deviation s of its own level; and its profile."""
    own = np.ones((1,) * x.table.ndim) if x.levels is None else x.levels**2
    gradient = np.ones((1,) * g.table.ndim) if g.levels is None else g.levels**2
    variance = level * own.mean(axis=tuple(reduced), keepdims=True) + eps
    inverse = np.where(variance > 0.0, 1.0 / np.where(variance > 0.0, variance, 1.0), 0.0) * gradient
    return float(inverse.mean()), levels.normalised(np.sqrt(inverse))


def _between_levels(table: Array, g: Value, profile: Array | None) -> tuple[Array, Gram | None]:
    """What places of two levels share, relative to the second moment, once those of g are those of a profile."""
    table, gram = table.copy(), g.gram
    for position, axis in enumerate(g.axes):
        before, after = (levels.over(own, position, axis.size) for own in (g.levels, profile))
        if axis.size > 1 and not np.array_equal(before, after):
            found, table = rescaled(g, position, after / np.maximum(before, 1e-150), table)
            gram = gram if found is None else found
    return table, gram


def lookup_gradient(g: Value, index: torch.Tensor, rows: int) -> Value:
    """Gradient [rows, ...] of a table from that of the entries looked up: sums over equal indices.

    ``K[same row] = (1/rows) sum over pairs of entries of P(equal) K_g``; the sum over all pairs is that of g.
    """
    rank = index.dim()
    probability, dims = same_index_table(index)
    equal = gaussian(dims, 0.0, probability)
    for d in range(rank):
        g, equal = refine(g, equal, d, d)
    axes = [axis for dim in g.dims[:rank] for axis in dim]
    counts = np.ones((1,) * len(axes))
    for position, axis in enumerate(axes):
        shape = [1] * len(axes)
        shape[position] = 2
        counts = counts * np.array([axis.size * (axis.size - 1.0), float(axis.size)]).reshape(shape)
    pad = (...,) + (None,) * (g.table.ndim - len(axes))
    over = tuple(range(len(axes)))
    everything = (g.table * counts[pad]).sum(over)
    same = (g.table * (counts * equal.table)[pad]).sum(over)
    other = (everything - same) / max(rows * (rows - 1.0), 1.0)
    table = np.stack([other, same / rows]) if rows > 1 else everything
    rows_dim = (Axis(rows),) if rows > 1 else ()
    return gaussian((rows_dim, *g.dims[rank:]), 0.0, np.asarray(table), lineage=g.lineage, stray=g.stray.hidden())
