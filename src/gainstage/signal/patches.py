"""The largest of near places of a Gaussian field, by draws of a patch of it.

Places of a window are not equally correlated: neighbours are more than corners, and fewer of them count as different than their
average correlation says; of two windows that overlap, the places that only one of them has are near those of the other. There
is no closed form for either, but the maxima of increasing functions of a field are those functions of its maxima, so that few
numbers, of the field and of the windows alone, say all that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gainstage.signal.contraction import Places
from gainstage.signal.quadrature import Array, nodes

DRAWS = 2048
LARGEST = 400  # places of a patch
WHITE = 0.01  # correlations: below it, places are as good as independent


@dataclass(frozen=True, slots=True, eq=False)
class Maxima:
    """Of the largest of a full window of standard normals: mean and deviation. Correlations of windows by their lag.

    ``louder``: mean and second moment of each output [2, outputs], over those of a full window of equal levels.
    """

    mean: float
    deviation: float
    correlations: Array
    louder: Array


def of_field(windows: Sequence[Places], loud: Sequence[Array], values: Array, rho: Array, distant: float) -> Maxima | None:
    """Maxima of windows [outputs, taps] along each of some dimensions, over a field of correlations rho [lags], distant beyond.

    None where hardly anything is correlated, or where a patch would be too large.

    Args:
        windows: places, -1 for none.
        loud: levels of the places, in the shape of the windows.
        values: increasing, of entries of equal level, at the nodes of their latents.
        rho: of latents.
        distant: of latents.
    """
    near = rho - distant
    if near.size == 1 or np.abs(near.ravel()[1:]).max() < WHITE:
        return None
    kinds = [_Kinds.of(window, level) for window, level in zip(windows, loud, strict=True)]
    beside = [_beside(window) for window in windows]
    places = tuple(max(int(one.places.max()), int(rows.max())) + 1 for one, rows in zip(kinds, beside, strict=True))
    if math.prod(places) > LARGEST:
        return None
    field = _field(places, rho.shape, rho.tobytes(), distant)
    whole = _largest(field, [one.places[one.full][None] for one in kinds])
    drawn = np.interp(field[(slice(None), *(slice(int(one.places.max()) + 1) for one in kinds))], nodes(), values)
    each = _largest(drawn, [one.places for one in kinds], [one.levels for one in kinds])
    even = _largest(drawn, [one.places[one.full][None] for one in kinds])
    with np.errstate(divide="ignore", invalid="ignore"):
        louder = np.stack([(each**order).mean(axis=0) / (even**order).mean() for order in (1, 2)])
    louder = np.where(np.isfinite(louder), louder, 1.0)[np.ix_(np.arange(2), *(one.of_output for one in kinds))]
    return Maxima(float(whole.mean()), float(whole.std()), _by_lag(_largest(field, beside), distant), louder)


@dataclass(frozen=True, slots=True, eq=False)
class _Kinds:
    """Windows by the levels of their places: one of each kind [kinds, taps], from place 0 on, and the kind of each output."""

    places: Places
    levels: Array
    of_output: NDArray[np.int64]
    full: int

    @classmethod
    def of(cls, windows: Places, loud: Array) -> _Kinds:
        inside = windows >= 0
        start = np.where(inside, windows, windows.max()).min(axis=1, keepdims=True)
        offsets = np.where(inside, windows - start, -1)
        described = np.concatenate([offsets, np.round(np.where(inside, loud, 0.0), 2)], axis=1)
        _, first, kinds = np.unique(described, axis=0, return_index=True, return_inverse=True)
        return cls(offsets[first], loud[first], kinds.reshape(-1), int(inside[first].sum(axis=1).argmax()))


def _beside(windows: Places) -> Places:
    """Windows from the middle on, until they have no place in common with the first of them; of a few, all."""
    middle = windows[len(windows) // 3 :]
    lags = 1
    while lags < len(middle) and np.intersect1d(middle[0][middle[0] >= 0], middle[lags - 1]).size:
        lags += 1
    near = windows if len(windows) <= lags + 1 else middle[:lags]
    return np.where(near >= 0, near - near[near >= 0].min(), -1)


def _by_lag(largest: Array, distant: float) -> Array:
    """Correlations, beyond what is common to all, of windows [draws, windows along each dimension] by their lag."""
    centred, shape = largest - largest.mean(axis=0), largest.shape[1:]
    covariances = np.zeros(shape)
    for lag in np.ndindex(*shape):
        first = centred[(slice(None), *(slice(None, n - i) for n, i in zip(shape, lag, strict=True)))]
        covariances[lag] = (first * centred[(slice(None), *(slice(i, None) for i in lag))]).mean()
    own = covariances.flat[0] - distant
    return (covariances - distant) / own if own > 0.0 else np.zeros(shape)


def _largest(field: Array, windows: Sequence[Places], loud: Sequence[Array] | None = None) -> Array:
    """Along one dimension after the other: levels are those along each dimension times one another."""
    for axis, window in enumerate(windows, 1):
        found = np.full((*field.shape[:axis], len(window), *field.shape[axis + 1 :]), -math.inf)
        along = (-1, *(1,) * (field.ndim - axis - 1))
        for tap, places in enumerate(window.T):
            value = np.take(field, places, axis)
            if loud is not None:
                value *= loud[axis - 1][:, tap].reshape(along)
            np.maximum(found, np.where((places >= 0).reshape(along), value, -math.inf), out=found)
        field = found
    return field


@lru_cache(maxsize=32)
def _field(places: tuple[int, ...], lags_known: tuple[int, ...], data: bytes, distant: float) -> Array:
    """Draws [DRAWS, places] of a patch, in pairs of opposite sign, whose sample covariance is that of the field."""
    rho = np.frombuffer(data).reshape(lags_known)
    lags = [np.abs(np.arange(n)[:, None] - np.arange(n)) for n in places]
    beyond = np.full(np.maximum(rho.shape, places), distant)
    beyond[tuple(slice(n) for n in rho.shape)] = rho
    index = np.ix_(*(each.ravel() for each in lags))
    between = beyond[index].reshape([n for n in places for _ in range(2)])
    rank, count = len(places), math.prod(places)
    matrix = between.transpose([*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]).reshape(count, count)
    strength, directions = np.linalg.eigh(matrix)
    half = np.random.default_rng(0).standard_normal((DRAWS // 2, count))
    white = np.linalg.solve(np.linalg.cholesky(half.T @ half / len(half)), half.T)
    drawn = ((directions * np.sqrt(np.maximum(strength, 0.0))) @ white).T
    deviation = np.sqrt((drawn**2).mean(axis=0))  # 1, but for what is no covariance
    return np.asarray(np.concatenate([drawn, -drawn]).reshape(-1, *places) / deviation.reshape(places))
