"""Uneven channels: rows of weights draw different variances, and a function of them makes different means.

Given all weights, channel c of ``y = w x`` has a variance ``w' C w``, C the covariance of what it reads; over rows it strays
by ``2 tr(C^2) / tr(C)^2``, of leading order in 1/fan-in, and by ``(kurtosis of w - 3) / n`` more. The ratio of traces is the
mean square of the cosine between what two places read: 1/n for n independent entries, and what earlier layers have made
alike beyond (:attr:`Value.overlap`). Nothing of it shows in second moments of y; but means of f(y) differ from channel to
channel, which is all that an average over a large map leaves where the rows
of weights sum to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np

from gainstage.signal.axes import Axis
from gainstage.signal.copies import replace
from gainstage.signal.quadrature import Array, expectation
from gainstage.signal.traits import Uneven
from gainstage.signal.value import Value

STEP = 0.01  # of deviations and means, for their derivatives

# Variance of the log of a channel's variance up to which its first order says something.
MOST = 1.0


def of_weights(y: Value, weight: Value, *, alike: float, centred: float, number: float, every: float) -> Uneven | None:
    """Variance over rows of ``w' C w``; rows that were standardised have one length, and lose the part of independent entries.

    Args:
        y: the outputs.
        weight: its rows are the channels.
        alike: mean square cosine of what two outputs read.
        centred: the same once the mean over all outputs is gone, see :mod:`gainstage.signal.alike`.
        number: of terms in each output, on average.
        every: of weights in each row, those that read padding somewhere among them.
    """
    rows = tuple(axis for axis in y.axes if axis in weight.axes)
    if not rows:
        return None
    excess = -2.0 if is_centred(weight) else weight.marginal.kurtosis - 3.0
    variances = [max(2.0 * cosine + excess / terms, 0.0) for cosine, terms in ((alike, number), (centred, every))]
    return Uneven(rows, variances[0], centred=variances[1])


def is_centred(weight: Value) -> bool:
    """Rows that sum to zero: their entries correlate negatively."""
    return float(weight.table.min()) < -1e-9 * weight.second_moment


def of_product(x: Value, y: Value) -> Uneven | None:
    """A factor that differs from channel to channel and is the same in all samples, or in all places, makes channels uneven."""
    uneven = x.unevenness()
    if uneven is None:
        return None
    shared = y.square_covariance()
    index = [1 if axis in uneven.axes else 0 for axis in x.axes]
    common = max(float(shared[tuple(index)]), 0.0)
    within = []
    for position, axis in enumerate(x.axes):
        if axis not in uneven.axes:
            extra = float(shared[(*index[:position], 1, *index[position + 1 :])]) - common
            within.append((axis, max(extra, 0.0)))
    variance, centred = uneven.variance + common, uneven.centred + common
    return replace(uneven, variance=variance, centred=centred, within=_joined(uneven.within, within))


def _joined(*terms: Iterable[tuple[Axis, float]]) -> tuple[tuple[Axis, float], ...]:
    """Sum along each axis."""
    found: dict[Axis, float] = {}
    for axis, variance in chain(*terms):
        found[axis] = found.get(axis, 0.0) + variance
    return tuple((axis, variance) for axis, variance in found.items() if variance > 0.0)


def of_sum(x: Value, y: Value, share: float) -> Uneven | None:
    """Of independent terms, x with a share of the variance: the squares of their shares weigh."""
    found: dict[tuple[Axis, ...], Uneven] = {}
    for value, part in ((x, share), (y, 1.0 - share)):
        uneven = value.unevenness()
        if uneven is None:
            continue
        names = dict(zip(map(id, value.axes), x.axes, strict=True))
        rows = tuple(names[id(axis)] for axis in uneven.axes)
        before = found.get(rows, Uneven(rows, 0.0))
        variance, stray, centred = (part**2 * number for number in (uneven.variance, uneven.stray, uneven.centred))
        within = [(names[id(axis)], part**2 * extra) for axis, extra in uneven.within if id(axis) in names]
        within_both = _joined(before.within, within)
        found[rows] = Uneven(rows, before.variance + variance, None, before.stray + stray, within_both, before.centred + centred)
    return max(found.values(), key=lambda item: item.variance, default=None)


def after_norm(x: Value, reduced: Sequence[Axis], differ: float) -> Uneven | None:
    """What a norm leaves of how channels differ: their shapes, and the relative variance that comes of its epsilon."""
    if x.uneven is None:
        return None
    left = differ if x.unevenness() is not None and not any(axis in reduced for axis in x.uneven.axes) else 0.0
    known = x.uneven
    if left <= 0.0 and known.shape is None and known.ripple is None:
        return None
    return Uneven(known.axes, left, known.shape, centred=left, of_all=known.of_all, ripple=known.ripple)


def with_means(x: Value, result: Value, function: Callable[[Array], Array]) -> Value:
    """``(d E[f] / d log s^2)^2 Var(log s^2) (1 - rho^2)`` for entries of one channel, in whatever samples and places.

    The channel's variance adds nothing to what two entries share that are one (rho = 1). Variances of f(x) differ as well, by
    those of x and by the means of channels m: by ``(d log Var f / d log s^2)^2 Var(log s^2) + (d log Var f / d m)^2 Var(m)``.
    """
    uneven = x.unevenness()
    if uneven is None:
        return result
    rows = tuple(1 if axis in uneven.axes else slice(None) for axis in x.axes)
    wider = function(x.mean + (x.marginal.values - x.mean) * (1.0 + STEP))
    table = result.table.copy()
    steepness = (expectation(wider) - result.mean) / (2.0 * np.log(1.0 + STEP))
    table[rows] += steepness**2 * (uneven.over(x.axes) * (1.0 - x.correlation() ** 2))[rows]
    table[(1,) * table.ndim] = result.second_moment
    shifted = function(x.marginal.values + STEP * x.variance**0.5)
    by_level, by_mean = (_log_growth(result.marginal.values, values) / STEP for values in (wider, shifted))
    means = max(float(x.covariance[tuple(1 if axis in uneven.axes else 0 for axis in x.axes)]), 0.0)
    means = means / x.variance if x.variance > 0.0 else 0.0
    power = by_level / 2.0
    within = tuple((axis, min(power**2 * extra, MOST)) for axis, extra in uneven.within)
    after = Uneven(uneven.axes, min(power**2 * uneven.variance + by_mean**2 * means, MOST), within=within)
    return replace(result, table=table, uneven=after)


def _log_growth(before: Array, after: Array) -> float:
    """``log Var(after) / Var(before)``; 0 where nothing varies."""
    variances = [expectation(values**2) - expectation(values) ** 2 for values in (before, after)]
    return float(np.log(variances[1] / variances[0])) if min(variances) > 0.0 else 0.0
