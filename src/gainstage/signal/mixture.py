"""Mixtures of two tensors: interpolation, masks, conditions."""

from __future__ import annotations

import numpy as np

from gainstage.signal.copies import replace
from gainstage.signal.linear import add, affine, multiply
from gainstage.signal.marginal import Marginal
from gainstage.signal.pairing import cross_table
from gainstage.signal.pointwise import align
from gainstage.signal.quadrature import Array, quantiles, standardised, weights
from gainstage.signal.value import Value


def mixture(share: Value, x: Value, y: Value, *, is_choice: bool) -> Value:
    """``w x + (1 - w) y`` for a share w that is independent of both.

    ``K = K_w K_x + K_{1-w} K_y + 2 (E[w] - K_w) C_xy``: the weights of the two terms are not independent of each other.
    ``is_choice``: w is 0 or 1, and an entry is one of x or one of y, never between them.
    """
    share, x = align(share, x)
    share, y = align(share, y)
    x, y = align(x, y)
    share, x = align(share, x)
    rest = affine(share, -1.0, 1.0)
    summed = add(multiply(x, share), multiply(y, rest))
    table = share.table * x.table + rest.table * y.table + 2.0 * (share.mean - share.table) * cross_table(x, y)
    mean = share.mean * x.mean + rest.mean * y.mean
    std = max(float(table[(1,) * table.ndim]) - mean**2, 0.0) ** 0.5

    def values() -> Array:
        if not is_choice:
            return standardised(summed.marginal.values, mean, std)
        mass = np.concatenate([weights() * share.mean, weights() * rest.mean])
        return standardised(quantiles(np.concatenate([x.marginal.values, y.marginal.values]), mass), mean, std)

    return replace(
        summed, mean=mean, table=table, marginal=Marginal(object(), values), rho=None, source=object(), amplitude=None,
        statistic=None, constant=None,
    )  # fmt: skip
