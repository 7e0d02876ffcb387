"""Own levels: a tensor times a function of the mean square of its own entries.

Entries x over which an average S of their squares runs are exchangeable, so ``E[x^2 | S] = S``, and what two entries of mean
squares S and S' share goes with ``sqrt(S S')``. Times g(S)

    E[x_i g(S) x_j g(S')] = E[x_i x_j] E[sqrt(S) g(S) sqrt(S') g(S')] / E[sqrt(S S')],

by Mehler's formula from the correlation of the averages. Divided by its norm, ``g(S) = S^(-1/2)``, each is as loud as any other;
where channels are multiplied by their norms over a map, as by a response norm, the loud ones become louder: ``E[S^2] / E[S]^2``.
"""

from __future__ import annotations

import numpy as np

from gainstage.signal.copies import replace
from gainstage.signal.linear import affine
from gainstage.signal.quadrature import Array, evaluate_series, expectation, power_series
from gainstage.signal.value import Value

ROUGHLY = 0.05  # of squares: how far what is averaged may be from them
LEAST = 1e-3  # of the second moment: what makes no difference


def by_own_level(scaled: Value, x: Value, statistic: Value, *, inverse: bool) -> Value:
    """A tensor times (or over) a statistic of itself, given what it makes with the number that this hardly strays from."""
    pair = _square_and_factor(x, statistic)
    if pair is None or scaled.second_moment <= 0.0:
        return scaled
    root, factor = pair
    if inverse:
        factor = np.where(factor == 0.0, 0.0, 1.0 / np.where(factor == 0.0, 1.0, factor))
    rho = statistic.correlation()
    before, after = evaluate_series(power_series(root), rho), evaluate_series(power_series(root * factor), rho)
    full = (1,) * rho.ndim
    ratio = np.where(before > 0.0, after / np.maximum(before, 1e-300), after[full] / before[full])
    table = x.table * ratio
    change = float(table[full]) / scaled.second_moment
    if abs(change - 1.0) < LEAST:
        return scaled
    louder = affine(scaled, change**0.5)
    return replace(louder, table=table, mean=x.mean * expectation(root * factor) / expectation(root), near=None, filtered=None)


def _square_and_factor(x: Value, statistic: Value) -> tuple[Array, Array] | None:
    """``sqrt(S)`` and the statistic, on the grid of one latent, if it is a function of a mean of squares of x."""
    known = None if statistic.statistic is None else statistic.statistic.averaged
    if known is None or statistic.levels is not None:
        return None
    term, average = known
    if term.latent != x.marginal.latent or average.latent != statistic.marginal.latent:
        return None
    squares, root = x.marginal.values**2, np.sqrt(np.maximum(average.values, 0.0))
    if expectation(squares) <= 0.0 or expectation(root) <= 0.0:
        return None
    apart = term.values * (expectation(squares) / expectation(term.values)) - squares
    is_square = expectation(apart**2) <= ROUGHLY**2 * expectation(squares**2)
    return (root, statistic.marginal.values) if is_square else None
