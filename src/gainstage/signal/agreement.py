"""Agreement: two tensors made of one have the same pairs of places alike by chance.

Over the weights the entries of a layer at two places share the cosine of what was read there. It strays (see
:mod:`gainstage.signal.overlap`), and is the same for all that read it. So of two tensors a, b made of one, a product's entries at
two places share

    E[(a b)_n (a b)_n'] = K_a K_b (E[cos] E[cos'] + Cov(cos, cos'))

and a sum of n such products has ``n (n - 1) K_a K_b Cov(cos, cos')`` more than its terms suggest. It is most of the sum where
places outnumber channels: ``sum over n of (w . x_n) x_n``, linear attention, keys times values.
"""

from __future__ import annotations

from collections.abc import Sequence

from gainstage.signal.axes import Axis, descends
from gainstage.signal.between import deviation
from gainstage.signal.overlap import PAIRS
from gainstage.signal.spread import by_chance
from gainstage.signal.value import Value

Pairs = Sequence[tuple[Axis, Axis]]


def agreement(a: Value, b: Value, pairs: Pairs) -> tuple[set[Axis], float]:
    """Axes of a whose places two tensors were both made of, or one of the other, and ``Cov(cos, cos')`` between these.

    Args:
        a: one tensor.
        b: another, or a gradient.
        pairs: axes that are one and the same, as a has them and as b has them.
    """
    places = _in_common(a.read, b.read, pairs)
    covariance = a.overlap.shared(b.overlap) + _known_pairs(a, b) + _known_pairs(b, a) if places else 0.0
    for one, other, seen in ((a, b, pairs), (b, a, [(second, first) for first, second in pairs])):
        by_entries = one.overlap.of_entries(other.marginal.latent)
        along = frozenset((name, read) for name, read in one.read if len(read) < len(other.axes) or by_entries > 0.0)
        if own := _in_common(along, known_by(other), seen):
            terms = {p: float(axis.size) for p, axis in enumerate(other.axes) if axis not in [second for _, second in seen]}
            chance = by_chance(other, terms) ** 0.5
            covariance = one.overlap.shared(other.overlap) + by_entries * chance
            covariance += _known_pairs(one, other)
            places = own if one is a else {second for first, second in seen if first in own}
    return places, covariance


def known_by(x: Value) -> frozenset[tuple[object, frozenset[Axis]]]:
    """What a tensor is known by to all that read it, with its axes."""
    return frozenset((name, frozenset(x.axes)) for name in x.names)


def _known_pairs(one: Value, other: Value) -> float:
    """What the cosines of two tensors share for some pairs being more alike than others on average, in both."""
    size = dict(one.overlap.parts).get(PAIRS, 0.0)
    return size * deviation(other) if size > 0.0 else 0.0


def _in_common(
    first: frozenset[tuple[object, frozenset[Axis]]], second: frozenset[tuple[object, frozenset[Axis]]], pairs: Pairs
) -> set[Axis]:
    """Axes, as the first has them, along which two tensors read the same."""
    both = [(one, other) for name, one in first for known, other in second if name == known]
    return {a for a, b in pairs if any(descends(a, one) and descends(b, other) for one, other in both)}
