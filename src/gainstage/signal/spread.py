"""Spread: how far the level of one draw strays from the average over draws, beyond what a table of second moments shows.

The variance of the mean of y^2 over all entries is the average over pairs of ``Cov(y_i^2, y_j^2)``. A Gaussian tensor has
``2 K_ij^2`` there, and :meth:`Value.fluctuation` averages it. What is added here is the covariance of squares that comes without
a covariance of entries: of outputs that share weights, or a coin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from gainstage.signal.alike import alike
from gainstage.signal.axes import Axis, descends
from gainstage.signal.copies import replace
from gainstage.signal.few import shaped
from gainstage.signal.lots import NO_LOTS, Lots, drawn, together
from gainstage.signal.neighbours import outer, pairs_by_lag
from gainstage.signal.overlap import Overlap, Taps, after_kernel, mixed, patch_share
from gainstage.signal.quadrature import expectation, kurtosis
from gainstage.signal.ripples import of_kernel
from gainstage.signal.stray import Stray, growth, passed, read
from gainstage.signal.uneven import is_centred, of_weights
from gainstage.signal.value import Value

FEW = 32  # numbers that a layer reads: the level of more strays by less than 1/16 from place to place


def multiplied(a: Value, b: Value) -> Stray:
    """Level of a contraction: that of its operands; rows of weights that sum to zero see ``d log Var(x) / d log E[x^2]`` of x."""
    return read([(a, _seen(a, b)), (b, _seen(b, a))])


def _seen(x: Value, weight: Value) -> float:
    if not weight.is_weight or x.mean == 0.0 or x.variance <= 0.0 or not is_centred(weight):
        return 1.0
    return growth(x, (0.0, x.variance), lambda series: float(series[1:].sum()))


def weighted(
    y: Value, x: Value, weight: Value, terms: Mapping[int, float], *, alone: Sequence[int] = (), places: Sequence[int] = (),
    taps: Mapping[Axis, Taps] | None = None,
) -> Value:  # fmt: skip
    """Outputs of one channel share its weights: ``2 E[cos^2] + (kurtosis - 3)/n`` over the number of channels.

    Given the inputs, with C the mean of ``x x'`` over what the N outputs of a channel read, its level is ``w' C w``; over w that
    strays by ``2 tr(C^2) + (kurtosis of w - 3) sum_r C_rr^2``, relative to ``tr(C)^2``. ``tr(C^2) / tr(C)^2`` is the mean square
    cosine of what two outputs read: 1/n for n independent entries, and what layers have made alike, carried on as the
    overlap. The part ``(E[x_i . x_j])^2`` is in the table of y.

    Args:
        y: the outputs.
        x: what the weights are multiplied with.
        weight: its entries are independent, or those of a row sum to zero.
        terms: position of an axis of x that is summed over -> number of terms along it (of a map: taps, fewer than places).
        alone: positions of axes along which every coordinate has weights of its own (groups).
        places: those axes among the summed along which another output reads other coordinates (a map).
        taps: how a kernel runs along them.
    """
    number = math.prod(terms.values())
    free = [p for p in range(x.table.ndim) if p not in terms and p not in alone]
    apart = 1.0 if places else 1.0 - 1.0 / math.prod(x.axes[p].size for p in free)
    mean, entry = (0.0, x.variance) if is_centred(weight) else (x.mean, x.second_moment)  # rows that sum to 0 see no mean
    if entry <= 0.0:
        return y
    loud = 1.0 + _unevenness(x, terms)
    own = _dot_variance(x, mean, terms, alone, places) + _near_taps(x, mean, terms, places, taps or {})
    own = max(own, 0.0) / (number * entry) ** 2 * loud
    patch = patch_share(x.overlap, taps or {})
    share = apart * patch
    inherited = share * x.overlap.variance * (x.second_moment / entry) ** 2
    channels = math.prod(weight.shape) / number
    groups = math.prod(x.axes[p].size for p in alone)
    every = {p: float(taps[x.axes[p]].count) if taps and x.axes[p] in taps else n for p, n in terms.items()}  # the border's too
    chance, level = alike(x, every, [*free, *places], places, taps or {})
    passed = share * x.overlap.centred().variance * (x.second_moment / level) ** 2 if level > 0.0 else 0.0
    left = chance * loud + passed
    fresh = min(chance * loud * (level / entry) ** 2, own) / groups
    overlap = after_kernel(x.overlap, x.marginal.latent, (fresh, own / groups - fresh), inherited, taps or {})
    flatness, rows = kurtosis(x.marginal.even), math.prod(every.values()) * groups
    fixed = 0.0 if x.steady is None else x.steady.over([x.axes[p] for p in terms])  # what has one length has one level
    swell = (flatness - 1.0) / rows * (1.0 - fixed) + x.overlap.swell * patch
    evened = (flatness - 1.0 - (flatness - 3.0) * weight.marginal.kurtosis / 3.0) / rows + 2.0 * passed
    loud = 0.0
    if rows <= FEW:
        loud = max(flatness - 1.0 - 2.0 * _of_one_length(weight), 0.0) * _differing(x, [*free, *places]) / rows
    overlap = replace(overlap, swell=swell, evened=evened, loud=loud + x.overlap.loud * patch)
    stray = (2.0 * (own + inherited) + (weight.marginal.kurtosis - 3.0) / number) / channels
    made = replace(
        y,
        stray=y.stray.with_cause(stray - weight.stray.taken),  # of rows that were divided by their norms
        overlap=overlap,
        uneven=of_weights(y, weight, alike=own + inherited, centred=left, number=number, every=math.prod(every.values())),
    )
    if made.uneven is not None and taps:
        read = math.prod(n for p, n in terms.items() if x.axes[p] not in taps)
        made = replace(made, uneven=replace(made.uneven, ripple=of_kernel(x, weight, read, taps)))
    return shaped(made, x, terms, of_all=not alone)


def _of_one_length(weight: Value) -> float:
    """Share of what squared lengths of rows of Gaussian entries stray by that is missing: rows were divided by their norms.

    What such a row makes of Gaussian numbers is Gaussian, as loud as these are together.
    """
    free = weight.fluctuation()
    return min(max(weight.stray.taken / free, 0.0), 1.0) if free > 0.0 else 0.0


def _differing(x: Value, positions: Sequence[int]) -> float:
    """Share of the variance of a square that is not what entries at two places, coordinates along these axes, have in common."""
    squares = x.square_covariance()
    own, apart = (float(squares[tuple(same if p in positions else 1 for p in range(squares.ndim))]) for same in (1, 0))
    return 1.0 - min(max(apart / own, 0.0), 1.0) if own > 0.0 else 1.0


def _unevenness(x: Value, terms: Mapping[int, float]) -> float:
    """Relative variance of the variances of the channels that are summed over: few loud ones are less than n terms."""
    uneven = x.unevenness()
    return uneven.variance if uneven is not None and all(x.axes.index(axis) in terms for axis in uneven.axes) else 0.0


def by_chance(x: Value, terms: Mapping[int, float]) -> float:
    """Variance of the cosine of what two places of x hold, less the mean of all, for its entries being independent."""
    chance, level = alike(x, terms, [p for p in range(x.table.ndim) if p not in terms], (), {})
    return chance * (level / x.second_moment) ** 2 if x.second_moment > 0.0 else 0.0


def _dot_variance(x: Value, mean: float, terms: Mapping[int, float], alone: Sequence[int], places: Sequence[int]) -> float:
    """``Var(x_i . x_j)`` for what two outputs of a layer read, as if the entries of x were Gaussian and x had no overlap.

    For ``x = m + u``, summed over pairs of terms, with C the covariance of u within what one output reads and between two,

        Var(x_i . x_j) = sum  2 m^2 (C_ii + C_ij) + C_ii^2 + C_ij^2

    n for n independent entries of variance 1. Averaged over all pairs of outputs but those of an output with itself.
    """
    free = [p for p in range(x.table.ndim) if p not in terms and p not in alone]
    covariance = x.covariance[tuple(slice(1, 2) if p in alone else slice(None) for p in range(x.table.ndim))]
    pairs = np.ones((1,) * x.table.ndim)
    for position, number in terms.items():
        shape = [2 if p == position else 1 for p in range(x.table.ndim)]
        pairs = pairs * np.array([number * (number - 1.0), number]).reshape(shape)
    within = covariance[tuple(slice(1, 2) if p in free else slice(None) for p in range(x.table.ndim))]
    variance = 0.0
    for shared in np.ndindex((2,) * len(free)):
        if all(shared) and not places:
            continue
        sizes = [x.axes[p].size for p in free]
        weight = math.prod(1.0 / size if same else 1.0 - 1.0 / size for same, size in zip(shared, sizes, strict=True))
        picked = {p: slice(same, same + 1) for p, same in zip(free, shared, strict=True)} | {p: slice(0, 1) for p in places}
        between = covariance[tuple(picked.get(p, slice(None)) for p in range(x.table.ndim))]
        variance += weight * float((pairs * (2.0 * mean**2 * (within + between) + within**2 + between**2)).sum())
    return max(variance, 0.0)


def _near_taps(x: Value, mean: float, terms: Mapping[int, float], places: Sequence[int], taps: Mapping[Axis, Taps]) -> float:
    """What near taps of one output add to that: ``sum  2 m^2 C_ii + C_ii^2`` lag by lag, less what the table has of it."""
    near, axes = x.neighbours(), [x.axes[p] for p in places]
    if near is None or any(axis not in taps for axis in (*axes, *near.axes)):
        return 0.0
    counts = [taps[axis].count for axis in axes]
    lagged = x.lagged(axes, counts)[0] - x.mean**2
    pairs = outer([pairs_by_lag(count) / count**2 for count in counts])
    among = x.covariance[tuple(slice(None) if p in places else 1 for p in range(x.table.ndim))]
    shares = outer([np.array([1.0 - 1.0 / count, 1.0 / count]) for count in counts])
    first, second = (float((pairs * lagged**power).sum() - (shares * among**power).sum()) for power in (1, 2))
    number = math.prod(n**2 if p in places else n for p, n in terms.items())
    return number * (2.0 * mean**2 * first + second)


def held(x: Value, share: float = 1.0, before: Value | None = None) -> Value:
    """A tensor whose level is fixed by normalization: what its entries stray by, the norm takes back.

    The level strays by nothing, and that of a function of it by the angles alone: 3/n after ReLU, where free entries have 5/n.
    ``share``: of the square that the norm divides by, what is not its epsilon; ``1 - share`` is left of what the log of the level
    ``before`` strayed by.
    """
    left = Stray() if before is None else before.stray.through_epsilon(1.0 - share)
    return replace(x, stray=replace(left, taken=(1.0 - (1.0 - share) ** 2) * x.fluctuation()))


def after_shift(y: Value, x: Value) -> Value:
    """For ``y = a x + b``: what strays of the level, or of a cosine, is a smaller or larger part of the second moment."""
    if y.second_moment <= 0.0:
        return y
    part = y.variance / y.second_moment * (x.second_moment / x.variance) if x.variance > 0.0 else 1.0
    overlap = replace(x.overlap.times(part**2), loud=x.overlap.loud * part**2, lots=x.overlap.lots.times(part))
    return replace(y, stray=passed(x, y.marginal.values), overlap=overlap)


def product_stray(x: Value, y: Value, product: Value) -> float:
    """Variance of the level of a product of independent tensors that its own table does not show.

    ``average over pairs of (1 + A_x)(1 + A_y) - 1`` with A the covariances of squares: a coin thrown for a whole sample.
    """
    joint = (1.0 + x.square_covariance()) * (1.0 + y.square_covariance()) - 1.0
    lots = [(x.overlap.lots, drawn_by(y)), (y.overlap.lots, drawn_by(x))]
    met = sum(known.apart * coin.variance / coin.axis.size for known, coin in lots if coin.axis is not None)
    return max(product.average(joint) - product.fluctuation(), 0.0) + met


def product_overlap(x: Value, y: Value) -> Overlap:
    """``(o_x q_x^2 c_y^2 + o_y q_y^2 c_x^2) / (q_x q_y)^2`` for independent factors, aligned.

    Given all weights, what two places share of the product is what they share of x times what they share of y. q: second
    moments; c: the most that two entries have of them, of known numbers (sines of positions) what two have on average; o:
    overlaps. A gate that is the same for all places changes nothing.
    """
    alike = [_most_alike(x, y), _most_alike(y, x)]
    found = mixed([(x.overlap, alike[1] ** 2), (y.overlap.renamed(y.axes, x.axes), alike[0] ** 2)])
    names = dict(zip(y.axes, x.axes, strict=True))
    its = [lots.renamed(names) for lots in (y.overlap.lots, drawn_by(y))]
    lots = together([(each, 1.0) for each in (x.overlap.lots, drawn_by(x), *its)])
    return replace(found, loud=x.overlap.loud + y.overlap.loud, lots=lots)


def drawn_by(y: Value) -> Lots:
    """Levels that a random factor gives along the one axis on which it depends, such as a coin for each sample."""
    if y.lineage or y.is_weight or y.constant is not None or y.statistic is not None or y.second_moment <= 0.0:
        return NO_LOTS
    varying = [axis for p, axis in enumerate(y.axes) if np.ptp(y.table, axis=p).max() > 1e-9 * y.second_moment]
    levels = y.marginal.values**2 / y.second_moment - 1.0
    variance = expectation(levels**2) if len(varying) == 1 else 0.0
    return drawn(varying[0], variance, kurtosis(levels) - 3.0) if variance > 0.0 and varying[0].size > 1 else NO_LOTS


def _most_alike(x: Value, other: Value) -> float:
    """The most that two entries have of x, over its second moment; of known numbers the average over places of the other."""
    places = {p for p, axis in enumerate(other.axes) if any(descends(axis, read) for _, read in other.read)}
    if x.lineage or not places:
        return float(np.max(np.abs(x.table.ravel()[:-1]), initial=0.0)) / max(x.second_moment, 1e-300)
    total = pairs = 0.0
    for shared in np.ndindex((2,) * x.table.ndim):
        if not all(shared) and all(same or p in places for p, same in enumerate(shared)):
            count = math.prod(1.0 if same else axis.size - 1.0 for same, axis in zip(shared, other.axes, strict=True))
            total, pairs = total + count * float(x.table[shared]), pairs + count
    return abs(total) / (pairs * x.second_moment) if pairs * x.second_moment > 0.0 else 0.0
