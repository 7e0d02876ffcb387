"""Slopes of functions of one tensor, where the kinks are as well."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.signal.copies import replace
from gainstage.signal.pointwise import Function, call_on, on_latent
from gainstage.signal.quadrature import Array, expectation, nodes
from gainstage.signal.value import Value

KINK = 0.05  # of the steepest slope: a change from one point of the grid to the next that is a kink


def slope(function: Function, x: Value) -> tuple[Value, Array]:
    """``f'(x)`` for any function of one tensor, its mean and table; and ``E[f'^2 | z]`` around each point z of the grid.

    Both are right where kinks lie on the grid and between its points. Where many entries have one value, such as the zeros that a
    ReLU leaves, what autograd takes there.
    """
    # A statistic hardly fluctuates: its slope is one number.
    points = x.marginal.values if x.statistic is None else np.full(nodes().shape, x.statistic.centre)
    step = 1e-6 * max(x.second_moment**0.5, 1e-30)
    here = call_on(function, points)
    left, right = (here - call_on(function, points - step)) / step, (call_on(function, points + step) - here) / step
    if x.statistic is None:
        equal = np.diff(points) == 0.0
        repeated = np.append(equal, False) | np.append(False, equal)
        kinks = repeated & (np.abs(left - right) > 1e-3 * np.abs(left + right))
        if kinks.any():
            left[kinks] = right[kinks] = _derivative(function, points[kinks])
        means, squares = _around((left, right), _shares_before(points, here, (left, right), equal))
    else:
        means, squares = 0.5 * (left + right), 0.5 * (left**2 + right**2)
    made = on_latent(x, means)
    table = made.table.copy()
    table[(1,) * table.ndim] = expectation(squares)
    return replace(made, table=table), squares


def _around(sides: tuple[Array, Array], shares: Array) -> tuple[Array, Array]:
    """Mean and mean square of the slopes between the middles of the steps to both sides of each point.

    ``sides``: slopes to the left and to the right of each point; ``shares``: of the step to the next, what comes before a kink.
    """
    left, right = sides
    before, after = right[:-1], left[1:]
    kinks = np.abs(after - before) > KINK * float(np.abs(np.concatenate(sides)).max())
    first, last = np.minimum(2.0 * shares, 1.0), np.maximum(2.0 * shares - 1.0, 0.0)

    def average(power: int) -> Array:
        to_left, to_right = left**power, right**power
        halves = [part * before**power + (1.0 - part) * after**power for part in (first, last)]
        to_right[:-1][kinks], to_left[1:][kinks] = halves[0][kinks], halves[1][kinks]
        return np.asarray(0.5 * (to_left + to_right))

    return average(1), average(2)


def _shares_before(points: Array, values: Array, sides: tuple[Array, Array], equal: NDArray[np.bool_]) -> Array:
    """Of the way from each point of the grid to the next, the share t that has the slope of the first where these differ.

    The chord of values is ``t before + (1 - t) after``. Where many entries are equal x goes on to that value as it does beyond.
    """
    left, right = sides
    steps = np.where(equal, 1.0, np.diff(points))
    change = right[:-1] - left[1:]
    found = (np.diff(values) / steps - left[1:]) / np.where(change == 0.0, 1.0, change)
    leaves, enters = equal[:-1] & ~equal[1:], ~equal[:-1] & equal[1:]  # the point between two steps
    found[1:-1][leaves[:-1]] = (1.0 - steps[1:-1] / steps[2:])[leaves[:-1]]
    found[1:-1][enters[1:]] = (steps[1:-1] / steps[:-2])[enters[1:]]
    return np.clip(found, 0.0, 1.0)


def _derivative(function: Function, points: Array) -> Array:
    """``f'`` as autograd has it."""
    with torch.enable_grad():
        leaf = torch.from_numpy(np.ascontiguousarray(points)).requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return np.asarray(gradient.numpy())
