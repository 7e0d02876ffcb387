"""Overlap: what places hold has a cosine that strays from draw to draw, beyond that of independent entries.

A layer of n inputs makes the outputs at two places alike by chance: the variance of their cosine is 1/n more than that of
independent channels. All that follows reads it. What a kernel reads is a patch, whose cosine averages over pairs of taps,
so the squared covariances between channels are followed lag by lag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gainstage.signal.axes import Axis
from gainstage.signal.neighbours import REACH, pairs_by_lag
from gainstage.signal.quadrature import Array


@dataclass(frozen=True, slots=True, eq=False)
class Overlap:
    """``variance`` over draws of the cosine between two places, beyond that of independent entries.

    ``lags``: along axes of a map ``e(d)``, the squared covariances between channels of places at lag d, over those at lag 0; 1
    along any other axis.
    """

    variance: float = 0.0
    lags: tuple[tuple[Axis, Array], ...] = ()

    def times(self, factor: float) -> Overlap:
        """The same with another variance."""
        return replace(self, variance=self.variance * factor)

    def renamed(self, before: Sequence[Axis], after: Sequence[Axis]) -> Overlap:
        """The same of a tensor whose axes have other names."""
        names = dict(zip(before, after, strict=True))
        return replace(self, lags=tuple((names.get(axis, axis), e) for axis, e in self.lags))

    def along(self, axis: Axis, count: int) -> Array:
        """``e(d)`` for d = 0 ... count - 1; 1 where nothing is known."""
        known = next((e for a, e in self.lags if a is axis), None)
        if known is None:
            return np.ones(count)
        return np.asarray(np.pad(known[:count], (0, max(count - len(known), 0))))


NONE = Overlap()


@dataclass(frozen=True, slots=True)
class Taps:
    """How a kernel runs along an axis: number of taps, stride, and the axis of the outputs (None where there is one only)."""

    count: int
    stride: int
    out: Axis | None


def patch_share(x: Overlap, taps: Mapping[Axis, Taps]) -> float:
    """Mean square cosine of two patches over that of two places: ``mean over pairs of taps of e(k - l)``, axis by axis."""
    share = 1.0
    for axis, tap in taps.items():
        share *= float((pairs_by_lag(tap.count) * x.along(axis, tap.count)).sum()) / tap.count**2
    return share


def after_kernel(x: Overlap, own: float, inherited: float, taps: Mapping[Axis, Taps]) -> Overlap:
    """Of independent entries the taps that two windows have in common, of what is inherited all pairs of taps."""
    found = []
    for axis, tap in taps.items():
        if tap.out is None or own + inherited <= 0.0:
            continue
        distance = np.arange(REACH) * tap.stride
        fresh = np.maximum(tap.count - distance, 0) / tap.count
        wide = x.along(axis, REACH * tap.stride + tap.count)
        offsets = np.subtract.outer(np.arange(tap.count), np.arange(tap.count)).ravel()
        passed = wide[np.abs(distance[:, None] + offsets[None, :])].sum(1)
        old = passed / passed[0] if passed[0] > 0.0 else fresh
        found.append((tap.out, (own * fresh + inherited * old) / (own + inherited)))
    kept = [] if taps else x.lags
    return Overlap(own + inherited, tuple(found) or tuple(kept))


def filtered(x: Overlap, axis: Axis, matrix: Array, out: Sequence[Axis]) -> tuple[Overlap, float]:
    """After a linear map M along an axis, and what becomes of the squared covariances: ``sum over d of N_D(d)^2 e(d)`` at lag D.

    ``N_D(d)``: products of coefficients of two outputs D apart that read places d apart, averaged over outputs. Covariances
    between channels of places at different lags are taken to be independent. Where lags are not known, those of white noise.
    """
    known = next((e for a, e in x.lags if a is axis), None)
    e = np.ones(1) if known is None else known
    kept = tuple((a, lags) for a, lags in x.lags if a is not axis)
    shifts = range(1 if known is None else REACH)
    found = np.array([float(_products_by_lag(matrix, shift, len(e)) ** 2 @ np.append(e[:0:-1], e)) for shift in shifts])
    if known is not None and out and found[0] > 0.0:
        kept += ((out[0], found / found[0]),)
    return Overlap(x.variance, kept), float(found[0])


def _products_by_lag(matrix: Array, shift: int, lags: int) -> Array:
    """``mean over p of sum over i of M[p + D, i + d] M[p, i]`` for d from ``1 - lags`` to ``lags - 1``."""
    outputs, size = matrix.shape
    if shift >= outputs:
        return np.zeros(2 * lags - 1)
    first, second = matrix[: outputs - shift], np.pad(matrix[shift:], ((0, 0), (lags - 1, lags - 1)))
    return np.array([float((first * second[:, d : d + size]).sum()) / len(first) for d in range(2 * lags - 1)])


def mixed(terms: Sequence[tuple[Overlap, float]]) -> Overlap:
    """Of independent tensors with these factors to their variances; lag by lag."""
    parts = [(overlap, overlap.variance * factor) for overlap, factor in terms if overlap.variance * factor > 0.0]
    if not parts:
        return NONE
    total = sum(variance for _, variance in parts)
    axes = list(dict.fromkeys(axis for overlap, _ in parts for axis, _ in overlap.lags))
    lags = tuple((axis, sum((v / total) * overlap.along(axis, REACH) for overlap, v in parts)) for axis in axes)
    return Overlap(total, tuple((axis, np.asarray(e)) for axis, e in lags))
