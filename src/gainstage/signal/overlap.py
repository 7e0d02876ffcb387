"""Overlap: what places hold has a cosine that strays from draw to draw, beyond that of independent entries.

A layer of n inputs makes the outputs at two places alike by chance: the variance of their cosine is 1/n more than that of
independent channels. All that follows reads it. What a kernel reads is a patch, whose cosine averages over pairs of taps,
so the squared covariances between channels are followed lag by lag.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gainstage.signal.axes import Axis
from gainstage.signal.copies import replace
from gainstage.signal.lots import NO_LOTS, Lots, together
from gainstage.signal.neighbours import REACH, padded, pairs_by_lag
from gainstage.signal.quadrature import Array
from gainstage.signal.unlike import Unlike

if TYPE_CHECKING:
    from gainstage.signal.traits import Logits

MOST = 16  # causes kept apart


@dataclass(frozen=True, slots=True)
class Cause:
    """What made places alike by chance: the entries of one tensor, for all that read it.

    ``additive``: by how loud each place is, which centring over places removes. ``of``: what stands for the tensor, and how it is
    read where that matters.
    """

    additive: bool = False
    of: object = field(default_factory=object)


PAIRS = Cause(of="pairs")  # no chance: what is known of each pair of places beyond the average


@dataclass(frozen=True, slots=True, eq=False)
class Overlap:
    """How the cosine between two places strays over draws, beyond that of independent entries.

    ``parts``: the standard deviation that comes of each cause; branches that read one tensor have causes in common.
    ``lags``: along axes of a map ``e(d)``, the squared covariances between channels of places at lag d, over those at lag 0; 1
    along any other axis. ``swell``: relative variance over places of the level that all channels of a place have in common;
    ``places``: the axes that these lie along, once a norm holds the average over them; ``evened``: how much of the variance is
    that between channels, which the norm took. ``loud``: as ``swell``, what layers that read few numbers brought to it; see
    :mod:`gainstage.signal.loudness`. ``lots``: levels that samples drew; see :mod:`gainstage.signal.samples`.
    """

    parts: tuple[tuple[Cause, float], ...] = ()
    lags: tuple[tuple[Axis, Array], ...] = ()
    swell: float = 0.0
    places: tuple[Axis, ...] = ()
    evened: float = 0.0
    loud: float = 0.0
    lots: Lots = NO_LOTS

    @property
    def variance(self) -> float:
        """Variance over draws of the cosine between two places."""
        return float(sum(size**2 for _, size in self.parts))

    def shared(self, other: Overlap) -> float:
        """Covariance over draws of the cosines of two tensors between the same places: what comes of causes in common."""
        sizes = dict(other.parts)
        return float(sum(size * sizes.get(cause, 0.0) for cause, size in self.parts))

    def of_entries(self, entries: object) -> float:
        """Standard deviation that comes of the independent entries of a tensor that was read as it is."""
        return math.sqrt(sum(size**2 for cause, size in self.parts if cause.of == (entries,)))

    def centred(self) -> Overlap:
        """Once the mean over all places and samples is gone."""
        return replace(self, parts=tuple((cause, size) for cause, size in self.parts if not cause.additive))

    def over(self, places: tuple[Axis, ...], removed: float) -> Overlap:
        """Less a mean, this share of the second moment, each channel divided by its deviation over all places along some axes."""
        return replace(self.centred(), places=places, lots=self.lots.centred(removed))

    def held(self) -> Overlap:
        """Where each place was divided by its own level, or where nothing is known of that."""
        return replace(self, swell=0.0, places=(), evened=0.0, loud=0.0, lots=NO_LOTS)

    def times(self, factor: float) -> Overlap:
        """The same with another variance."""
        return replace(self, parts=tuple((cause, size * factor**0.5) for cause, size in self.parts))

    def with_causes(self, fresh: Mapping[Cause, float]) -> Overlap:
        """With variances that come of further causes; of many the smallest are taken as one."""
        added = [(cause, variance**0.5) for cause, variance in fresh.items() if variance > 0.0]
        parts = sorted([*self.parts, *added], key=lambda part: -part[1])
        kept, rest = parts[:MOST], parts[MOST:]
        for additive in (False, True):
            left = sum(size**2 for cause, size in rest if cause.additive is additive)
            kept += [(Cause(additive), left**0.5)] * (left > 0.0)
        return replace(self, parts=tuple(kept))

    def loosened(self, kept: float, of: object) -> Overlap:
        """The same variance, of which a part has nothing to do any more with what was there before; ``kept``: the correlation."""
        lost = 1.0 - min(kept, 1.0) ** 2
        fresh = {
            Cause(additive, of): lost * sum(size**2 for cause, size in self.parts if cause.additive is additive)
            for additive in (False, True)
        }
        return self.times(1.0 - lost).with_causes(fresh)

    def renamed(self, before: Sequence[Axis], after: Sequence[Axis]) -> Overlap:
        """The same of a tensor whose axes have other names."""
        names = dict(zip(before, after, strict=True))
        lags = tuple((names.get(axis, axis), e) for axis, e in self.lags)
        places = tuple(names.get(axis, axis) for axis in self.places)
        return replace(self, lags=lags, places=places, lots=self.lots.renamed(names))

    def along(self, axis: Axis, count: int) -> Array:
        """``e(d)`` for d = 0 ... count - 1; 1 where nothing is known."""
        known = next((e for a, e in self.lags if a is axis), None)
        if known is None:
            return np.ones(count)
        return padded(known[:count], (count,))


NONE = Overlap()


@dataclass(frozen=True, slots=True, eq=False)
class Tilt:
    """What the weights that a softmax makes lean by: the covariances of its logits, and how the cosines of these stray.

    Both of what keys do not have in common. ``of``: the logits. ``unlike``: the weights of each row, where levels of queries and
    keys differ.
    """

    table: Array
    overlap: Overlap
    of: Logits
    unlike: Unlike | None = None


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


def after_kernel(x: Overlap, entries: object, fresh: tuple[float, float], inherited: float, taps: Mapping[Axis, Taps]) -> Overlap:
    """Of independent entries the taps that two windows have in common, of what is inherited all pairs of taps.

    Args:
        x: of what is read.
        entries: what stands for the tensor that is read.
        fresh: variances that come of its independent entries: but for how loud places are, and of that.
        inherited: variance that is inherited, all taps together.
        taps: how a kernel runs along axes of a map.
    """
    found, own, counts = [], sum(fresh), tuple(tap.count for tap in taps.values())
    for axis, tap in taps.items():
        if tap.out is None or own + inherited <= 0.0:
            continue
        distance = np.arange(REACH) * tap.stride
        fresh_lags = np.maximum(tap.count - distance, 0) / tap.count
        wide = x.along(axis, REACH * tap.stride + tap.count)
        offsets = np.subtract.outer(np.arange(tap.count), np.arange(tap.count)).ravel()
        passed = wide[np.abs(distance[:, None] + offsets[None, :])].sum(1)
        old = passed / passed[0] if passed[0] > 0.0 else fresh_lags
        found.append((tap.out, (own * fresh_lags + inherited * old) / (own + inherited)))
    lags = tuple(found) or (() if taps else x.lags)
    passed_on = NONE
    if x.variance > 0.0:
        passed_on = x.times(inherited / x.variance).loosened(_in_step(x, taps), (entries, counts, "inherited"))
    middle = 1.0 / math.prod(counts)  # of the patch, which has it in common with its middle
    causes = {}
    for additive, variance in zip((False, True), fresh, strict=True):
        causes[Cause(additive, (entries,))] = variance * middle
        causes[Cause(additive, (entries, counts))] = variance * (1.0 - middle)
    return replace(passed_on.with_causes(causes), lags=lags, places=(), evened=0.0, lots=x.lots)


def _in_step(x: Overlap, taps: Mapping[Axis, Taps]) -> float:
    """Correlation between the cosine of two patches and that of the places in their middle."""
    middle = 1.0
    for axis, tap in taps.items():
        middle *= float(x.along(axis, tap.count)[np.abs(np.arange(tap.count) - (tap.count - 1) // 2)].mean())
    share = patch_share(x, taps)
    return middle / share**0.5 if share > 0.0 else 0.0


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
    passed = float(found[0])
    return replace(x.loosened(_kept_in_step(matrix, e, passed), object()), lags=kept), passed


def _kept_in_step(matrix: Array, e: Array, passed: float) -> float:
    """Correlation between the cosine of two outputs of a linear map and that of the places in the middle of what they read."""
    if passed <= 0.0:
        return 0.0
    size, reach = matrix.shape[1], len(e)
    middle = np.rint(
        np.vecdot(np.abs(matrix), np.arange(size, dtype=np.float64)) / np.maximum(np.abs(matrix).sum(1), 1e-300)
    ).astype(int)
    wide = np.pad(matrix, ((0, 0), (reach - 1, reach - 1)))
    at = np.array([wide[row, start : start + 2 * reach - 1] for row, start in enumerate(middle)]).mean(0)
    return float(at**2 @ np.append(e[:0:-1], e) / passed**0.5)


def _products_by_lag(matrix: Array, shift: int, lags: int) -> Array:
    """``mean over p of sum over i of M[p + D, i + d] M[p, i]`` for d from ``1 - lags`` to ``lags - 1``."""
    outputs, size = matrix.shape
    if shift >= outputs:
        return np.zeros(2 * lags - 1)
    first, second = matrix[: outputs - shift], matrix[shift:]
    sides = ((first[:, max(-d, 0) : max(size - d, 0)], second[:, max(d, 0) : max(size + d, 0)]) for d in range(1 - lags, lags))
    return np.array([float(np.einsum("pi,pi->", one, other)) / len(first) for one, other in sides])


def mixed(terms: Sequence[tuple[Overlap, float]]) -> Overlap:
    """Of tensors with these factors to their variances, where one has nothing to do with another but for the causes of it.

    What comes of one cause adds up as it is. Lag by lag.
    """
    parts = [(overlap, overlap.variance * factor) for overlap, factor in terms if overlap.variance * factor > 0.0]
    swell, evened, loud = (
        sum(getattr(overlap, name) * factor for overlap, factor in terms) for name in ("swell", "evened", "loud")
    )
    places = next((overlap.places for overlap, _ in terms if overlap.places), ())
    lots = together([(overlap.lots, factor**0.5) for overlap, factor in terms])
    if not parts:
        return Overlap(swell=swell, places=places, evened=evened, loud=loud, lots=lots)
    sizes: dict[Cause, float] = {}
    for overlap, factor in terms:
        for cause, size in overlap.parts:
            sizes[cause] = sizes.get(cause, 0.0) + size * factor**0.5
    total = sum(variance for _, variance in parts)
    axes = list(dict.fromkeys(axis for overlap, _ in parts for axis, _ in overlap.lags))
    lags = tuple((axis, np.asarray(sum((v / total) * overlap.along(axis, REACH) for overlap, v in parts))) for axis in axes)
    return Overlap((), lags, swell, places, evened, loud, lots).with_causes({cause: size**2 for cause, size in sizes.items()})


def independent(variance: float) -> Overlap:
    """An overlap of a cause of its own."""
    return NONE.with_causes({Cause(): variance})
