"""Dropout: entries are thrown away by coins, and what is left is louder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gainstage.signal import shares
from gainstage.signal.axes import Axis
from gainstage.signal.copies import replace
from gainstage.signal.marginal import Marginal
from gainstage.signal.neighbours import Neighbours, made
from gainstage.signal.pairing import amplitude_of
from gainstage.signal.quadrature import Array, quantiles, standardised, weights
from gainstage.signal.value import Value


def dropout(x: Value, keep: float, shared: Sequence[int] = ()) -> Value:
    """Inverted dropout: entries that share the mask gain ``1/keep``, all others are unchanged.

    ``shared``: dimensions along which one coin is thrown for all entries (whole channels, whole samples).
    """
    table = x.table.copy()
    position, index = 0, []
    for d, dim in enumerate(x.dims):
        index += [slice(None) if d in shared else 1 for _ in dim]
        position += len(dim)
    table[tuple(index)] /= keep
    full = (1,) * table.ndim
    std = max(float(table[full]) - x.mean**2, 0.0) ** 0.5

    def values() -> Array:
        kept = x.marginal.values / keep
        grid = quantiles(np.append(kept, 0.0), np.append(weights() * keep, 1.0 - keep))
        return standardised(grid, x.mean, std)

    coins = math.prod(n for d, n in enumerate(x.shape) if d not in shared)
    thrown = (1.0 / keep - 1.0) / coins if shared else 0.0  # where entries have a coin each, the marginal says it
    return replace(
        x, table=table, marginal=Marginal(object(), values), rho=None, amplitude=amplitude_of(x), statistic=None, constant=None,
        stray=x.stray.with_cause(thrown), near=_dropped_neighbours(x, keep, [axis for d in shared for axis in x.dims[d]]),
        steady=None if shared else shares.steady_after_dropout(x.steady, keep),
    )  # fmt: skip


def _dropped_neighbours(x: Value, keep: float, shared: Sequence[Axis]) -> Neighbours | None:
    """Each place on its own gains ``1/keep``; places that share a coin gain it together."""
    near = x.neighbours()
    if near is None or all(axis in shared for axis in near.axes):
        return near
    own, far = x.apart(near)
    excess = near.excess * (own - far) / (own / keep - far)
    excess[(0,) * excess.ndim] = 1.0
    return made(near.axes, excess)
