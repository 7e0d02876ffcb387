"""Gradients that know something of their own tensor: what passed one ReLU is more likely to pass the one before.

Where a gradient has met an activation of its tensor's latent z further down, it is ``g = g0 r``, g0 independent of the tensor,
of which ``E[r | z]`` and ``E[r^2 | z]`` are carried on (:class:`gainstage.signal.value.Given`). In a residual stream what came
along the stream has met all activations since, what came back through a branch none: a sum of gradients is followed term by term.

A function that is written out, such as ``y = x sigmoid(x)``, sends ``g r_1`` and ``g r_2`` to x, with ``r_1 = sigmoid(x)`` and
``r_2 = x sigmoid'(x)``: functions of x's latent z that are known together. Of gradients with one g the amplitudes add up,

    E[(g r_1 + g r_2)^2] = E[g^2] E[(r_1 + r_2)^2].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce

import numpy as np
import torch

from gainstage.signal import shares
from gainstage.signal.axes import Axis
from gainstage.signal.copies import replace
from gainstage.signal.joining import join
from gainstage.signal.linear import affine, multiply
from gainstage.signal.movement import parts_along, together, with_axes
from gainstage.signal.neighbours import through
from gainstage.signal.pointwise import align, combine, of_one_latent
from gainstage.signal.quadrature import Array, evaluate_series, expectation, invert_series, nodes, power_series, weights
from gainstage.signal.shares import Share
from gainstage.signal.slicing import slices
from gainstage.signal.traits import Given
from gainstage.signal.value import Value, gaussian

STAGGER = 8
TERMS = 3  # of a gradient that are followed each by itself
NOTHING = 0.02  # of a gradient's part along its tensor: if no more than this is gone, it is as if nothing was


def through_slope(
    g: Value, steepness: tuple[Value, Array], against: float = 0.0, gone: tuple[float, float] = (0.0, 0.0)
) -> Value:
    """``g f'(u)`` for the slope f'(u) of an activation: what g knows of u and what the slope knows of it are not independent.

    ``against``: of the result, see :func:`turned_by`. ``gone``: see :func:`left_by_slope`.
    """
    if terms := _terms(g):
        made = reduce(accumulated, [through_slope(term, steepness, gone=gone) for term in terms])
        return replace(made, against=against)
    lost = None if g.across is None else Share(g.across.axes, g.across.share * gone[0], g.across.share * gone[1])
    return replace(_times_slope(g, steepness, against), across=lost)


def left_by_slope(x: Value, y: Value, slopes: Array) -> tuple[float, float]:
    """Of a g that has no sum and nothing along ``y = f(x)``: shares of ``sum g f' h`` that are gone, ``corr^2(f' h, f)``.

    For ``h = x`` that is all where f(c x) = c f(x), as of ReLU; for h = 1, the sum, which has ``Var(f')`` left, .47 of ReLU's.
    """
    return _correlation(slopes * x.marginal.values, y.marginal.values) ** 2, _correlation(slopes, y.marginal.values) ** 2


def _correlation(first: Array, second: Array) -> float:
    first, second = first - expectation(first), second - expectation(second)
    norms = expectation(first**2) * expectation(second**2)
    return expectation(first * second) / norms**0.5 if norms > 0.0 else 0.0


def _times_slope(g: Value, steepness: tuple[Value, Array], against: float) -> Value:
    base, (g, slopes) = g, align(g, steepness[0])
    own = Given(slopes.marginal.values, steepness[1], base)
    if g.given is None:
        return replace(multiply(g, slopes), against=against, given=own.scaled())
    given = Given(g.given.mean * own.mean, g.given.square * own.square, g.given.base)
    alone = expectation(given.square) / expectation(g.given.square)
    if expectation(g.given.mean**2) <= 1e-6 * expectation(g.given.square):  # it carries nothing that two share
        made = multiply(g, _of_second_moment(slopes, alone))
    else:
        made = meeting_again(g, slopes, given.mean, alone)
    return replace(made, against=against, given=given.scaled())


def _of_second_moment(x: Value, level: float) -> Value:
    """The same but for what an entry has by itself."""
    table = x.table.copy()
    table[(1,) * table.ndim] = level
    return gaussian(x.dims, 0.0, table, x.levels)


def meeting_again(g: Value, x: Value, mean: Array, alone: float) -> Value:
    """What is left of ``g = g0 r`` as ``g0 r'`` for functions of x's latent: two entries have ``E[g g'] E[r' r'] / E[r r]``.

    ``mean``: ``E[r' | z]``; ``alone``: what becomes of the second moment of an entry.
    """
    assert g.given is not None
    before, after = power_series(g.given.mean), power_series(mean)

    def factor(rho: Array) -> Array:
        shared, left = evaluate_series(before, rho), evaluate_series(after, rho)
        known = np.abs(shared) > 1e-3 * float(before.sum())  # of an odd r nothing is left between entries of no correlation
        return np.where((rho < 1.0) & known, left / np.where(known, shared, 1.0), alone)

    table = factor(x.correlation())
    table[(1,) * table.ndim] = alone
    near, distant = x.neighbours(), 0.0
    if near is not None:
        series = x.marginal.even_series
        own, far = x.apart(near)
        near, distant = through(near, own, far, lambda m: factor(np.where(m >= own, 1.0, invert_series(series, m - series[0]))))
    return multiply(g, gaussian(x.dims, 0.0, table).with_neighbours(near, alone, distant))


def to_summand(g: Value, total: Value, x: Value, y: Value, sign: float) -> Value:
    """Gradient of x from that of ``x + sign y``: ``E[h(x + sign y) | x]`` of what it knows of the sum."""
    if of_one_latent(x, y):  # both ways lead to one tensor
        return g if g.given is not None else replace(g, given=_even(g))
    if terms := _terms(g):
        return reduce(accumulated, [to_summand(term, total, x, y, sign) for term in terms])
    part = min(x.variance / total.variance, 1.0) if total.variance > 0.0 else 0.0
    g = replace(g, against=g.against * part, across=shares.times(g.across, part))
    if g.given is None:
        return g
    known, which = np.unique(total.marginal.values, return_inverse=True)
    each = np.bincount(which, weights())
    others, mass = _staggered(y.marginal.values), _staggered(weights())
    places, mass = x.marginal.values[:, None] + sign * others, mass / mass.sum(1, keepdims=True)
    parts = [np.bincount(which, weights() * part) / each for part in (g.given.mean, g.given.square)]
    mean, square = (np.vecdot(np.interp(places, known, part), mass) for part in parts)
    return replace(g, given=Given(mean, square, g.given.base).scaled())


def _staggered(values: Array) -> Array:
    """Every eighth of values on the grid, from another of the first eight for each point: where h jumps, errors average out."""
    kinds = values[: values.size - values.size % STAGGER].reshape(-1, STAGGER).T
    return kinds[np.arange(values.size) % STAGGER]


def accumulated(first: Value, second: Value, of: Value | None = None) -> Value:
    """Sum of two gradients of one tensor, independent or of one gradient; of a concatenation part by part.

    ``of``: the tensor.
    """
    for one, other in ((first, second), (second, first)):
        parts = parts_along(one)
        if parts is not None:
            return join([accumulated(part, piece) for part, piece in zip(parts[1], slices(other, *parts), strict=True)], parts[0])
    both = None if of is None else _of_one_gradient(first, second, of)
    if both is not None:
        return both
    total = combine(torch.add, first, second)
    if total.second_moment > 0.0:
        own, rest = first.second_moment / total.second_moment, second.second_moment / total.second_moment
        x, y = align(first, second)
        across = shares.added(x.axes, y.axes, shares.times(first.across, own), shares.times(second.across, rest))
        total = replace(total, against=own * first.against + rest * second.against, across=across)
    if total.second_moment <= 0.0 or not any(_is_known(g) for g in (first, second)):
        return replace(total, given=None)
    a, b = first.given or _even(), second.given or _even()
    share = first.second_moment / (first.second_moment + second.second_moment)
    x, y = align(first, second)
    common = _share_in_common(x, y, share)
    mean = np.sqrt(common * a.mean**2 + (1.0 - common) * b.mean**2)
    louder = a if common > 0.5 else b
    given = Given(mean, share * a.square + (1.0 - share) * b.square, louder.base).scaled()
    met = total.table - x.table - y.table  # as where a pool less its input sends one gradient back by two ways
    if given is None or float(np.abs(met).max()) > 1e-9 * total.second_moment:
        return replace(total, given=given)
    terms = _loudest([_on_axes(term, total) for g in (first, second) for term in _terms(g) or (g,)])
    return replace(total, given=replace(given, terms=terms, table=total.table))


def _even(base: Value | None = None) -> Given:
    """Of a gradient that has met no activation: it knows nothing of its tensor."""
    return Given(np.ones(nodes().shape), np.ones(nodes().shape), base)


def _is_known(g: Value) -> bool:
    """Whether a gradient is not as any other to its tensor: what it knows of it, or does not have along it."""
    return (g.given is not None and not g.given.is_even) or (g.across is not None and g.across.share > NOTHING)


def _terms(g: Value) -> tuple[Value, ...]:
    """The independent gradients that g is the sum of, where they know different things of its tensor."""
    return g.given.terms if g.given is not None and g.given.table is g.table else ()


def _on_axes(term: Value, total: Value) -> Value:
    """A term, its coordinates named as those of the sum, which may have been split where another term was not."""
    total, term = align(total, term)
    names = dict(zip(term.axes, total.axes, strict=True))
    lost = term.across
    across = None if lost is None else replace(lost, axes=frozenset(names.get(axis, axis) for axis in lost.axes))
    return replace(with_axes(term, total.dims), across=across)


def _loudest(terms: list[Value]) -> tuple[Value, ...]:
    """A few terms of a sum; the others as one."""
    terms = sorted(terms, key=lambda term: -term.second_moment)
    while len(terms) > TERMS:
        last = accumulated(terms.pop(), terms.pop())
        terms.append(last if last.given is None else replace(last, given=replace(last.given, terms=(), table=None)))
    return tuple(terms)


def _of_one_gradient(first: Value, second: Value, of: Value) -> Value | None:
    """Sum of ``g0 r_1`` and ``g0 r_2`` for one g0; None where it is not one.

    By what becomes of the one of the two whose r has the larger part in common.
    """
    a, b = first.given, second.given
    if a is None or b is None or a.base is None or a.base is not b.base or not first.shape == second.shape == of.shape:
        return None
    if min(first.second_moment, second.second_moment) <= 0.0:
        return None
    if expectation(a.mean) ** 2 < expectation(b.mean) ** 2:
        first, second, a, b = second, first, b, a
    size = (second.second_moment / first.second_moment) ** 0.5
    mean = a.mean + size * b.mean
    both = np.sign(a.mean * b.mean) * np.sqrt(np.maximum(a.square * b.square, 0.0))
    given = Given(mean, a.square + size**2 * b.square + 2.0 * size * both, a.base)
    g, x = together(*align(first, of))
    made = meeting_again(replace(g, given=a), x, mean, expectation(given.square))
    return replace(made, against=first.against, given=given.scaled())


def _share_in_common(first: Value, second: Value, alone: float) -> float:
    """Share of the first in what the sum's entries share, of those pairs that weigh most; ``alone``: its share in an entry."""
    pairs = np.ones((1,) * first.table.ndim)
    for position, axis in enumerate(first.axes):
        pairs = pairs * np.array([axis.size - 1.0, 1.0]).reshape([2 if p == position else 1 for p in range(pairs.ndim)])
    weight = pairs * np.abs(first.table + second.table)
    weight[(1,) * weight.ndim] = 0.0
    most = np.unravel_index(int(weight.argmax()), weight.shape)
    total = float((first.table + second.table)[most])
    return float(np.clip(first.table[most] / total, 0.0, 1.0)) if weight[most] > 0.0 else alone


def along_own(g: Value, x: Value, axes: Sequence[Axis]) -> Value:
    """``g x`` for a gradient g and its tensor x, or an affine function of it, to be summed over some axes of g."""
    return _each(g, lambda term: affine(_times_own(term, x), (1.0 - shares.gone(term.across, axes)[0]) ** 0.5))


def to_be_summed(g: Value, axes: Sequence[Axis]) -> Value:
    """A gradient that is summed over some axes."""
    return _each(g, lambda term: affine(term, (1.0 - shares.gone(term.across, axes)[1]) ** 0.5))


def _each(g: Value, function: Callable[[Value], Value]) -> Value:
    """Sum of a function of each term."""
    return reduce(partial(combine, torch.add), [function(term) for term in _terms(g) or (g,)])


def _times_own(g: Value, x: Value) -> Value:
    """``g x`` for a gradient g and the tensor x that it belongs to, or an affine function of it.

    Where g has met x in an activation, ``g = g0 r(x)``: two entries have ``E[g g'] E[r x r' x'] / E[r r']``, by Mehler's formula.
    """
    g, x = together(*align(g, x))
    if g.given is None:
        return multiply(g, x)
    series = power_series(g.given.mean)
    if series[0] <= 1e-6 * float(series.sum()):  # r is odd: what two entries share of g says nothing of g0
        return multiply(g, x)
    own = x.marginal.values
    return meeting_again(g, x, g.given.mean * own, expectation(g.given.square * own**2) / expectation(g.given.square))


def along_weight(g: Value, x: Value, reduced: Sequence[int], fan_in: float) -> tuple[Value, Value] | None:
    """Two tensors whose product, summed like ``g x``, is what the gradient of a weight w has along w itself; None for nothing.

    Where the gradient of ``u = w x`` has met u in an activation, ``g = g0 r(u)``, samples of one g0 add up along the weight: by
    Stein's lemma ``E[r(u) x_i] = w_i E[r u] E[x^2] / E[u^2]``, so that ``E[x x']`` gains ``E[r z]^2 E[x^2] / n`` for n terms and
    the standardised u = z. ``reduced``: the dimensions of x that the weight sums over.
    """
    if g.given is None or g.given.base is None or g.given.base.shape != g.shape or g.given.base.second_moment <= 0.0:
        return None
    pull = expectation(g.given.mean * nodes()) ** 2
    starts = np.cumsum([0, *(len(dim) for dim in x.dims)])
    shared = {position for d in reduced for position in range(starts[d], starts[d + 1])}
    table = np.zeros_like(x.table)
    table[tuple(1 if position in shared else slice(None) for position in range(table.ndim))] = pull * x.second_moment / fan_in
    table[(1,) * table.ndim] = 0.0  # a sample with itself is counted in full
    base = g.given.base
    return affine(base, (g.second_moment / base.second_moment) ** 0.5), gaussian(x.dims, 0.0, table)
