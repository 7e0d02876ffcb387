"""Sums of gradients of one tensor: what comes of several tensors that were made of it, or by several ways from one function.

A function that is written out, such as ``y = x sigmoid(x)``, sends ``g r_1`` and ``g r_2`` to x, with ``r_1 = sigmoid(x)`` and
``r_2 = x sigmoid'(x)``: functions of x's latent z that are known together. Of gradients with one g the amplitudes add up,

    E[(g r_1 + g r_2)^2] = E[g^2] E[(r_1 + r_2)^2].
"""

from __future__ import annotations

import numpy as np
import torch

from gainstage.signal import shares
from gainstage.signal.adjoint import meeting_again, slices, together
from gainstage.signal.copies import replace
from gainstage.signal.joining import join
from gainstage.signal.movement import parts_along
from gainstage.signal.pointwise import align, combine
from gainstage.signal.quadrature import expectation, nodes
from gainstage.signal.value import Given, Value


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
    if all(g.given is None or g.given.is_even for g in (first, second)) or total.second_moment <= 0.0:
        return replace(total, given=None)
    even = Given(np.ones(nodes().shape), np.ones(nodes().shape))
    a, b = first.given or even, second.given or even
    share = first.second_moment / (first.second_moment + second.second_moment)
    common = _share_in_common(*align(first, second), share)
    mean = np.sqrt(common * a.mean**2 + (1.0 - common) * b.mean**2)
    louder = a if common > 0.5 else b
    return replace(total, given=Given(mean, share * a.square + (1.0 - share) * b.square, louder.base).scaled())


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
