"""What two tensors have in common: a source that both are linear in, or weights that both went through.

An average over an axis of size n mixes "same" and "another": ``K[0] + (K[1] - K[0]) / n``. Such maps commute, and their
common eigenspaces along an axis are "the mean over it" (index 0 of a *spectrum*) and "the rest" (index 1).

Two uses of one weight W of fan-in n on x and x' give jointly Gaussian ``y = W x``, ``y' = W x'`` with
``E[y y'] = n Var(w) E[x x']``, also where x' was made from y (Yang 2019, arXiv:1910.12478, and 2020, arXiv:2006.14548: to leading
order in the width). So the covariance of two tensors is traced back, operand by operand, until two of one tensor or nothing in
common is left:

- of a sum, the sum of the covariances of its terms;
- of what is linear in an operand, component by component;
- of functions of a latent, by Mehler's formula from the correlation of the latents;
- of like operations on different tensors, by the operation's own rule: see :mod:`gainstage.signal.uses`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gainstage.signal.copies import replace
from gainstage.signal.known import measured
from gainstage.signal.movement import expand, parts_along, refine
from gainstage.signal.quadrature import Array, covariance_series, invert_series, joint_series
from gainstage.signal.traits import Origin, Summed
from gainstage.signal.uses import are_alike, covariance_of_uses, is_same
from gainstage.signal.value import Value

MOST_SUMS = 64  # that are looked into for what two tensors have in common


def spectrum(table: Array, sizes: Sequence[int]) -> Array:
    """Variance of each component of a tensor from its table of covariances, along every axis."""
    for position, size in enumerate(sizes):
        other, same = np.take(table, 0, axis=position), np.take(table, 1, axis=position)
        table = np.stack([other + (same - other) / size, same - other], axis=position)
    return table


def table_of(components: Array, sizes: Sequence[int]) -> Array:
    """Inverse of :func:`spectrum`."""
    for position, size in enumerate(sizes):
        mean, rest = np.take(components, 0, axis=position), np.take(components, 1, axis=position)
        components = np.stack([mean - rest / size, mean + rest - rest / size], axis=position)
    return components


def amplitude_of(x: Value) -> Array:
    """Signed size of each component of x in its source."""
    if x.amplitude is not None:
        return x.amplitude
    sizes = [axis.size for axis in x.axes]
    return np.asarray(np.sqrt(np.maximum(spectrum(x.covariance, sizes), 0.0)))


def cross_table(x: Value, y: Value) -> Array:
    """``E[x_i y_j]`` of two aligned values: product of means, and what they have in common."""
    product = np.full_like(x.table, x.mean * y.mean)
    if x.source is not None and x.source is y.source:
        return product + _of_one_source(x, y)
    common = covariance_between(x, y) if any(one.origin is not None and one.origin.reuses for one in (x, y)) else None
    if common is None:
        common = _of_summed(x, y, [MOST_SUMS])
    return product if common is None else product + common


def summed(total: Value, *terms: tuple[Value, float]) -> Value:
    """A sum of terms with signs, and of what is independent of them: known to have a part in all that these have a part in."""
    of = frozenset().union(*(x.names | (x.source.of if isinstance(x.source, Summed) else frozenset()) for x, _ in terms))
    return replace(total, source=Summed(total.axes, amplitude_of(total), terms, of))


def _of_summed(x: Value, y: Value, left: list[int]) -> Array | None:
    """Covariance of two aligned values of which one is linear in a sum: of each term of that, component by component.

    ``left``: how many sums may still be looked into, which are more than there are where sums of sums meet.
    """
    if x.source is not None and x.source is y.source:
        return _of_one_source(x, y)
    if x.marginal.latent == y.marginal.latent:
        return _of_one_latent(x, y)
    one = _later(x, y)
    if one is None:
        return None
    left[0] -= 1
    if left[0] < 0:
        return None
    total = one.source
    assert isinstance(total, Summed)
    found = [(sign, _of_summed(*((term, y) if one is x else (x, term)), left)) for term, sign in total.terms]
    known = [sign * common for sign, common in found if common is not None]
    return _by_component(sum(known[1:], known[0]), total.amplitude, one) if known and left[0] >= 0 else None


def _later(x: Value, y: Value) -> Value | None:
    """The one of two values that is linear in a sum which has a part in what the other is linear in, if there is one.

    Of two such sums one that has a part in the other, if there is one.
    """
    sums = [one.source.of if isinstance(one.source, Summed) and one.source.axes == one.axes else frozenset() for one in (x, y)]
    if not (y.names.isdisjoint(sums[0]) and x.names.isdisjoint(sums[1])):
        return y if y.names.isdisjoint(sums[0]) else x
    if sums[0].isdisjoint(sums[1]):
        return None
    return x if len(sums[0]) >= len(sums[1]) else y


def _of_one_source(x: Value, y: Value) -> Array:
    """Covariance of two tensors that are linear in one source, component by component."""
    return _by_coordinates(table_of(amplitude_of(x) * amplitude_of(y), [axis.size for axis in x.axes]), x, y)


def _of_one_latent(x: Value, y: Value) -> Array:
    """Covariance of two functions of one latent."""
    return _by_coordinates(covariance_series(x.marginal.values, y.marginal.values, x.correlation()), x, y)


def _by_coordinates(table: Array, x: Value, y: Value) -> Array:
    """What x and y share, by what equal coordinates do: where they are others, as others; in rows and columns, as on average."""
    for position, (a, b) in enumerate(zip(x.axes, y.axes, strict=True)):
        if a is not b and a.size > 1:
            other, same = np.take(table, 0, axis=position), np.take(table, 1, axis=position)
            shared = other + (same - other) / a.size if a.crossed() is b else other
            table = np.stack([shared, shared], axis=position)
    return table


def covariance_between(x: Value, y: Value) -> Array | None:
    """``E[x_i y_j] - E[x] E[y]`` by what i and j share, as the axes of x have it; None where nothing in common is known."""
    if x.shape != y.shape:
        return None
    if is_same(x, y):
        return x.covariance
    if x.dims == y.dims:
        if x.source is not None and x.source is y.source:
            return _of_one_source(x, y)
        if x.marginal.latent == y.marginal.latent:
            return covariance_series(x.marginal.values, y.marginal.values, x.correlation())
    for one in (x, y):
        if one.origin is not None and _history(one) is None and _is_linear_in(one, one.origin.value):
            return _through(x, y, one, _before(one))
    if _is_broadcast(x) and _is_broadcast(y):
        return _of_broadcasts(x, y)
    return _remembered(x, y)


def _history(x: Value) -> Origin | None:
    """How a tensor came about, unless something was done to it since."""
    origin = x.origin
    if origin is None or origin.value.marginal is not x.marginal:
        return None
    return origin if origin.value.dims is x.dims or origin.value.shape == x.shape else None


def _before(x: Value) -> Value:
    """What a tensor was when it came about, whatever was done to it since; itself where that is not known."""
    origin = x.origin
    is_as_made = origin is None or (origin.value.table is x.table and origin.value.dims == x.dims)
    return x if origin is None or is_as_made else replace(origin.value, origin=origin)


def _as_made(x: Value) -> Value:
    """A tensor by the axes that it had when it came about."""
    return x if _history(x) is None else _before(x)


def _remembered(x: Value, y: Value) -> Array | None:
    """What was traced once is known, by the axes that the later of the two had when it came about."""
    first, second = _as_made(x), _as_made(y)
    if _order(second) > _order(first):
        return _laid_out(_remembered(second, first), second, x)
    owner = _history(first)
    if owner is None:
        return _laid_out(_traced(first, second), first, x)
    key = _history(second) or (second.marginal, second.axes)
    if key not in owner.met:
        owner.met[key] = _traced(first, second)
    return _laid_out(owner.met[key], first, x)


def _is_broadcast(x: Value) -> bool:
    if x.origin is None or x.origin.value.marginal is not x.marginal or x.origin.value.shape == x.shape:
        return False
    before = x.origin.value.shape
    return len(before) <= len(x.shape) and all(n in (1, m) for n, m in zip(reversed(before), reversed(x.shape), strict=False))


def _of_broadcasts(x: Value, y: Value) -> Array | None:
    """Of two tensors that were both broadcast since they came about: their covariance, broadcast."""
    before = _before(x)
    common = covariance_between(before, _before(y))
    if common is None:
        return None
    carrier = expand(Value(dims=before.dims, mean=0.0, table=common, marginal=before.marginal), x.shape)
    return _laid_out(carrier.table, carrier, x)


def _of_known(x: torch.Tensor, y: torch.Tensor) -> Array:
    """Covariance of two known tensors: ``((x + y)^2 - x^2 - y^2) / 2``, on average."""
    both, *each = (measured(tensor).covariance for tensor in (x.double() + y.double(), x, y))
    return np.asarray((both - each[0] - each[1]) / 2.0)


def _traced(x: Value, y: Value) -> Array | None:
    """One step back from the later of two tensors, the first, or if there is none, from the other."""
    if x.constant is not None and y.constant is not None:
        return _of_known(x.constant, y.constant)
    if _has_own_weights(x, y) or _has_own_weights(y, x):
        return None
    for one in (x, y):
        operand = _read_linearly(one)
        if operand is not None:
            return _through(x, y, one, operand)
    bases = _base(x), _base(y)
    if bases[0] is not x or bases[1] is not y:
        return _of_functions(x, y, bases)
    for one in (x, y):
        if terms := _terms(one):
            return _of_terms(x, y, one, terms)
    first, second = _history(x), _history(y)
    if first is not None and second is not None and are_alike(first, second):
        return covariance_of_uses(first, second, covariance_between)
    return _of_parts(x, y)


def _of_parts(x: Value, y: Value) -> Array | None:
    """Covariance of two concatenations of like parts, from that of part and part; different parts have nothing in common."""
    first, second = parts_along(x), parts_along(y)
    if first is None or second is None or first[0] != second[0] or len(x.dims[first[0]]) != 1:
        return None
    dim, pairs = first[0], list(zip(first[1], second[1], strict=False))
    if len(first[1]) != len(second[1]) or any(a.shape != b.shape for a, b in pairs):
        return None
    position, total = sum(len(axes) for axes in x.dims[:dim]), x.shape[dim]
    other, same = np.zeros((2, *np.take(x.table, 0, axis=position).shape))
    for a, b in pairs:
        n, product, common = a.shape[dim], a.mean * b.mean, covariance_between(a, b)
        if common is not None and common.ndim == x.table.ndim:
            other, same = other + n * (n - 1.0) * np.take(common, 0, axis=position), same + n * np.take(common, 1, axis=position)
        elif common is not None and n == 1 and common.ndim == same.ndim:
            same = same + common
        other, same = other - n * product, same + n * product
    product = x.mean * y.mean
    other = (other + total**2 * product) / max(total * (total - 1.0), 1.0)
    return np.stack([other, same / total], axis=position) - product


def _has_own_weights(x: Value, y: Value) -> bool:
    """Whether x comes straight from weights that y has never met: there is no like operation behind y."""
    unmet = any(one.is_weight and one.lineage & ~y.lineage for one in _inputs(x))
    return unmet and not _terms(x) and _base(x) is x and _read_linearly(x) is None


def _read_linearly(x: Value) -> Value | None:
    """The operand that a tensor is linear in, such as what a norm divides."""
    return next((operand for operand in _inputs(x) if _is_linear_in(x, operand)), None)


def _terms(x: Value) -> tuple[tuple[Value, float], ...]:
    return x.sum.terms if x.sum is not None and x.sum.table is x.table else ()


def _order(x: Value) -> int:
    origin = _history(x)
    return 0 if origin is None else origin.order


def _inputs(x: Value) -> tuple[Value, ...]:
    origin = _history(x)
    return () if origin is None else origin.inputs


def _instead(x: Value, y: Value, one: Value, operand: Value) -> Array | None:
    """Covariance of x and y with another tensor in the place of one of them, as the axes of x have it."""
    found = covariance_between(operand, y) if one is x else covariance_between(x, operand)
    return _laid_out(found, operand, x) if one is x else found


def _is_linear_in(y: Value, x: Value) -> bool:
    return x.source is not None and y.source is x.source and y.dims == x.dims


def _through(x: Value, y: Value, one: Value, operand: Value) -> Array | None:
    """Where one of x and y is linear in an operand: component by component."""
    common = _instead(x, y, one, operand)
    if common is None or common.ndim != one.table.ndim:
        return None
    return _by_component(common, amplitude_of(operand), one)


def _by_component(common: Array, before: Array, one: Value) -> Array:
    """What is shared with a tensor of components of these sizes, by one that is linear in it: component by component."""
    after, sizes = amplitude_of(one), [axis.size for axis in one.axes]
    counts = np.abs(before) > 1e-9 * float(np.abs(before).max())
    gain = np.divide(after, before, out=np.zeros_like(after), where=counts)
    return table_of(gain * spectrum(common, sizes), sizes)


def _base(x: Value) -> Value:
    """The earliest tensor of which this one is a function, entry by entry."""
    for operand in _inputs(x):
        if operand.marginal.latent == x.marginal.latent and operand.dims == x.dims:
            return _base(operand)
    return x


def _of_functions(x: Value, y: Value, bases: tuple[Value, Value]) -> Array | None:
    """``sum over n > 0 of a_n b_n rho^n``, rho the correlation of the latents, from that of what x and y are functions of."""
    common = covariance_between(*bases)
    if common is None:
        return None
    rho = invert_series(joint_series(bases[0].marginal.values, bases[1].marginal.values), common)
    return covariance_series(x.marginal.values, y.marginal.values, rho)


def _of_terms(x: Value, y: Value, one: Value, terms: Sequence[tuple[Value, float]]) -> Array | None:
    """Sum of the covariances of the terms of one of two tensors with the other."""
    total = None
    for term, sign in terms:
        part = _instead(x, y, one, term)
        if part is not None:
            total = sign * part if total is None else total + sign * part
    return total


def _laid_out(table: Array | None, like: Value, x: Value) -> Array | None:
    """A table of covariances by the axes of one value, by those of another of equal shape."""
    if table is None or [axis.size for axis in like.axes] == [axis.size for axis in x.axes]:
        return table
    carrier = Value(dims=like.dims, mean=0.0, table=table, marginal=like.marginal)
    for d in range(len(x.dims)):
        carrier, x = refine(carrier, x, d, d)
    return carrier.table if len(carrier.axes) == len(x.axes) else None
