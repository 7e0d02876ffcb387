"""Ripples: near places of a map are alike in each channel in another way, for the few weights that made it.

Given its weights, a channel of ``y = sum over taps t of w_t x_t`` has the correlation ``rho_c(d) = w' A_d w / w' C w`` of two
places at lag d, ``A_d[t, u] = e(d + u - t)`` the correlations of what they read and C that of one place with itself. Over rows of
n independent weights of kurtosis k it is e(d) on average, and strays by

    r(d) = sum over t, u of (D[t, u]^2 + D[t, u] D[u, t]) / (tr(C)^2 + 2 tr(C^2) + (k - 3) n),     D = A_d - e(d) C:

for white x and Gaussian weights the overlap of two windows over n (n + 2). Squares of y share the squares of what both windows
read besides: half the excess kurtosis of x, times ``sum e(d + u - t)^2``, counts as r does. Nothing of this shows in second
moments of y. But by Mehler's formula

    E[f(y_p) f(y_q)] = sum of a_n^2 E[rho_c^n],

in which all even powers gain: behind a depthwise kernel near places share more, and averages over a map stray more from sample to
sample, than the average of ``rho_c`` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from gainstage.signal.axes import Axis
from gainstage.signal.copies import replace
from gainstage.signal.neighbours import REACH, Neighbours, made, outer, padded
from gainstage.signal.overlap import Taps
from gainstage.signal.quadrature import Array, evaluate_series, invert_series, kurtosis
from gainstage.signal.value import Value

LEAST = 1e-3  # sum over lags: below, all channels are as good as alike

WHITE = Neighbours((), np.array(1.0))


def of_kernel(x: Value, weight: Value, channels: float, taps: Mapping[Axis, Taps]) -> tuple[tuple[Axis, ...], Array] | None:
    """``r(d)`` along the axes of the outputs; ``channels``: that each output reads, taken to be independent."""
    found = {axis: (tap, tap.out) for axis, tap in taps.items() if tap.out is not None}
    near = x.neighbours() or WHITE
    if not found or channels * LEAST > 1.0:
        return None
    if any(axis not in found for axis in near.axes):
        near = WHITE
    rank, distances, pairs = len(found), [], []
    for position, (axis, (tap, out)) in enumerate(found.items()):
        lags = min(REACH, -(-(tap.count - 1 + near.lags(axis)) // tap.stride), out.size)
        offsets = np.arange(1 - tap.count, tap.count)  # u - t
        distance = np.abs(tap.stride * np.arange(lags)[:, None] + offsets)
        distances.append(np.expand_dims(distance, [p for p in range(2 * rank) if p % rank != position]))
        pairs.append(tap.count - np.abs(offsets))
    apart = near.over(tuple(found), [int(distance.max()) + 1 for distance in distances])[tuple(distances)]  # [lags, offsets]
    alone, mean = apart[(0,) * rank], apart[(..., *(tap.count - 1 for tap, _ in found.values()))]
    rest, number, of_offset = apart - mean[(..., *[None] * rank)] * alone, outer(pairs), tuple(range(rank, 2 * rank))
    shared = rest**2 + rest * np.flip(rest, of_offset) + 0.5 * (kurtosis(x.marginal.even) - 3.0) * apart**2
    count = math.prod(tap.count for tap, _ in found.values())
    square = channels * count**2 + 2.0 * float((number * alone**2).sum()) + (weight.marginal.kurtosis - 3.0) * count
    spread = np.maximum((number * shared).sum(of_offset) / square, 0.0)
    spread[(0,) * rank] = 0.0
    return (tuple(out for _, out in found.values()), spread) if float(spread.sum()) > LEAST else None


def with_ripples(x: Value, result: Value, _function: Callable[[Array], Array]) -> Value:
    """Lag by lag ``(S(rho + sqrt(r)) + S(rho - sqrt(r))) / 2 - S(rho)`` more: two values of rho in Mehler's series S of f."""
    uneven = x.unevenness()
    if uneven is None or uneven.ripple is None or x.variance <= 0.0:
        return result
    axes, spread = uneven.ripple
    before, after = (value.neighbours() or WHITE for value in (x, result))
    if any(axis not in x.axes for axis in axes) or any(axis not in axes for axis in (*before.axes, *after.axes)):
        return result
    for axis in axes:
        before, after = before.with_axis(axis), after.with_axis(axis)
    (own, far), (top, bottom) = x.apart(before), result.apart(after)
    if top <= bottom:
        return result
    shape = [max(before.lags(axis), after.lags(axis), n) for axis, n in zip(axes, spread.shape, strict=True)]
    moments = far + (own - far) * before.over(axes, shape)
    rho = invert_series(x.marginal.even_series, moments - x.marginal.even_series[0])
    strays = padded(np.sqrt(spread), shape) * (own - far) / x.variance
    series = result.marginal.even_series
    sides = [evaluate_series(series, np.clip(rho + sign * strays, -1.0, 1.0)) for sign in (1.0, -1.0, 0.0)]
    gained = (0.5 * (sides[0] + sides[1]) - sides[2]) / (top - bottom)
    table, gain = result.table.copy(), Neighbours(axes, gained)
    for same in np.ndindex(*(2,) * len(axes)):
        index = tuple(same[axes.index(axis)] if axis in axes else 1 for axis in result.axes)
        table[index] += (top - bottom) * gain.average([bool(equal) for equal in same])
    return replace(result, near=made(axes, after.over(axes, shape) + gained), table=table)
