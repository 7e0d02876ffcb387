"""Functions of two tensors that are independent: maxima, powers, and whatever else there is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gainstage.signal.linear import affine
from gainstage.signal.marginal import Marginal
from gainstage.signal.pairing import summed
from gainstage.signal.quadrature import Array, coarse, expectation_of_two, matmul, nodes, quantiles
from gainstage.signal.value import Value


def of_two(function: Callable[[Array, Array], Array], x: Value, y: Value) -> Value:
    """Any function of two independent entries: expectation over a grid of both, conditional on what they share.

    The table follows from the two-dimensional Mehler expansion ``sum_nm a_nm^2 rho_x^n rho_y^m``. Of each of the two it has the
    part ``Cov(f, x) / Var(x) (x - E[x])``, which a sum with x meets: of ``max(x, y)`` half of x.
    """
    points, mass = coarse(4)  # finer: functions with a kink give what is summed up from steps of the grid
    u = np.interp(points, nodes(), x.marginal.values)
    v = np.interp(points, nodes(), y.marginal.values)
    grid_u, grid_v = np.broadcast_arrays(u[:, None], v[None, :])
    surface = function(grid_u, grid_v)
    order = 16
    basis = np.polynomial.hermite_e.hermevander(points, order)
    norm = np.sqrt(np.cumprod(np.append(1.0, np.arange(1, order + 1))))
    basis = basis / norm * mass[:, None]
    squares = matmul(matmul(basis.T, surface), basis) ** 2
    second = expectation_of_two(surface**2, mass)
    squares[-1, -1] += max(second - float(squares.sum()), 0.0)
    table = np.polynomial.polynomial.polyval2d(x.correlation(), y.correlation(), squares)
    mean = expectation_of_two(surface, mass)
    weight = mass[:, None] * mass[None, :]
    found = Value(
        dims=x.dims,
        mean=mean,
        table=np.asarray(table),
        marginal=Marginal(object(), lambda: quantiles(surface, weight)),
        source=object(),
        lineage=x.lineage | y.lineage,
        stray=max(x.stray, y.stray, key=lambda stray: stray.variance).hidden(),
        is_weight=x.is_weight and y.is_weight,
    )
    given = (surface - mean) * weight
    parts = [
        (affine(part, float((given * (grid - part.mean)).sum()) / part.variance), 1.0)
        for part, grid in ((x, grid_u), (y, grid_v))
        if part.variance > 0.0
    ]
    return summed(found, *parts) if parts else found
