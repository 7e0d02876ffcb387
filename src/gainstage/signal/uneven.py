"""Uneven channels: rows of weights draw different variances, and a function of them makes different means.

Given all weights, channel c of ``y = w x`` has a variance ``w' C w``, C the covariance of what it reads; over rows it strays by
``2 tr(C^2) / tr(C)^2``, of leading order in 1/fan-in. That ratio is the mean square of the cosine between what two places read:
1/n for n independent entries, and what earlier layers have made alike beyond (:attr:`Value.overlap`). Nothing of it shows in
second moments of y; but the channels' means of f(y) differ, which is all that an average over a large map leaves where the rows
of weights sum to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from gainstage.signal.axes import Axis
from gainstage.signal.quadrature import Array, expectation
from gainstage.signal.value import Uneven, Value

REACH = 12  # lags kept


@dataclass(frozen=True, slots=True)
class Taps:
    """How a kernel runs along an axis: number of taps, stride, and the axis of the outputs (None where there is one only)."""

    count: int
    stride: int
    out: Axis | None


def of_weights(
    y: Value, x: Value, weight: Value, *, shares: tuple[float, float], number: float, taps: Mapping[int, Taps]
) -> Uneven | None:
    """Variance over rows of ``w' C w``; rows that were standardised have one length, and lose the part of independent entries.

    Args:
        y: the outputs.
        x: what is read.
        weight: its rows are the channels.
        shares: mean square cosine of what two places read: by independent entries, and inherited.
        number: of terms in each output.
        taps: position of an axis of x -> how a kernel runs along it.
    """
    rows = tuple(axis for axis in y.axes if axis in weight.axes)
    if not rows:
        return None
    own, inherited = shares
    stray = 2.0 * (own + inherited * patch_share(x, taps))
    if float(weight.table.min()) < -1e-9 * weight.second_moment:
        stray = max(stray - 2.0 / number, 0.0)
    return Uneven(rows, stray, _lags(x, shares, taps))


def patch_share(x: Value, taps: Mapping[int, Taps]) -> float:
    """Mean square cosine of two patches over that of two places: ``mean over pairs of taps of e(k - l)``, axis by axis."""
    share = 1.0
    for position, tap in taps.items():
        e = _profile(x, x.axes[position], tap.count)
        lags = np.arange(tap.count)
        pairs = np.where(lags == 0, tap.count, 2.0 * (tap.count - lags))
        share *= float((pairs * e).sum()) / tap.count**2
    return share


def _profile(x: Value, axis: Axis, count: int) -> Array:
    """``e(d)``: squared covariances between places at lag d, over those of a place with itself; 1 where nothing is known."""
    known = next((e for a, e in x.uneven.lags if a is axis), None) if x.uneven is not None else None
    if known is None:
        return np.ones(count)
    return np.asarray(np.pad(known[:count], (0, max(count - len(known), 0))))


def _lags(x: Value, shares: tuple[float, float], taps: Mapping[int, Taps]) -> tuple[tuple[Axis, Array], ...]:
    """e(d) of the outputs: of independent entries the taps that two windows share, of what is inherited all pairs of taps."""
    own, inherited = shares
    found = []
    for position, tap in taps.items():
        if tap.out is None or own + inherited <= 0.0:
            continue
        distance = np.arange(REACH) * tap.stride
        fresh = np.maximum(tap.count - distance, 0) / tap.count
        wide = _profile(x, x.axes[position], REACH * tap.stride + tap.count)
        offsets = np.subtract.outer(np.arange(tap.count), np.arange(tap.count)).ravel()
        passed = wide[np.abs(distance[:, None] + offsets[None, :])].sum(1)
        old = passed / passed[0] if passed[0] > 0.0 else fresh
        found.append((tap.out, (own * fresh + inherited * old) / (own + inherited)))
    return tuple(found)


def of_product(x: Value, y: Value) -> Uneven | None:
    """A factor that differs from channel to channel and is the same in all samples makes channels uneven."""
    if x.uneven is None or any(axis not in x.axes for axis in x.uneven.axes):
        return None
    rows = tuple(1 if axis in x.uneven.axes else 0 for axis in x.axes)
    return replace(x.uneven, variance=x.uneven.variance + max(float(y.square_covariance()[rows]), 0.0))


def of_sum(x: Value, y: Value, share: float) -> Uneven | None:
    """Of independent terms, x with a share of the variance: the squares of their shares weigh."""
    found: dict[tuple[Axis, ...], Uneven] = {}
    for value, part in ((x, share), (y, 1.0 - share)):
        if value.uneven is None or any(axis not in value.axes for axis in value.uneven.axes):
            continue
        names = dict(zip(map(id, value.axes), x.axes, strict=True))
        rows = tuple(names[id(axis)] for axis in value.uneven.axes)
        lags = tuple((names[id(axis)], e) for axis, e in value.uneven.lags if id(axis) in names)
        before = found.get(rows)
        variance = part**2 * value.uneven.variance + (before.variance if before else 0.0)
        found[rows] = Uneven(rows, variance, before.lags if before and share >= 0.5 else lags)
    return max(found.values(), key=lambda item: item.variance, default=None)


def with_means(x: Value, result: Value, function: Callable[[Array], Array]) -> Value:
    """``(d E[f] / d log s^2)^2 Var(log s^2) (1 - rho^2)`` for entries of one channel, in whatever samples and places.

    The channel's variance adds nothing to what two entries share that are one (rho = 1).
    """
    if x.uneven is None or any(axis not in x.axes for axis in x.uneven.axes):
        return result
    wider = x.mean + (x.marginal.values - x.mean) * 1.01
    steepness = (expectation(function(wider)) - result.mean) / (2.0 * np.log(1.01))
    table = result.table.copy()
    rows = tuple(1 if axis in x.uneven.axes else slice(None) for axis in x.axes)
    table[rows] += steepness**2 * x.uneven.variance * (1.0 - x.correlation()[rows] ** 2)
    table[(1,) * table.ndim] = result.second_moment
    return replace(result, table=table, uneven=replace(x.uneven, variance=0.0))
