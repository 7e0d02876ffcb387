"""Slopes of functions of one tensor, where the kinks are as well."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.signal.pointwise import Function, call_on, on_latent
from gainstage.signal.quadrature import Array, nodes, weights
from gainstage.signal.value import Value

KINK = 0.05  # of the steepest slope: a change from one point of the grid to the next that is a kink


def slope(function: Function, x: Value) -> Value:
    """``f'(x)`` for any function of one tensor.

    ``E[f']`` and ``E[f'^2]`` are right where kinks lie on the grid and between its points. Where many entries have one value,
    such as the zeros that a ReLU leaves, what autograd takes there.
    """
    # A statistic hardly fluctuates: its slope is one number.
    points = x.marginal.values if x.statistic is None else np.full(nodes().shape, x.statistic.centre)
    step = 1e-6 * max(x.second_moment**0.5, 1e-30)
    here = call_on(function, points)
    left, right = (here - call_on(function, points - step)) / step, (call_on(function, points + step) - here) / step
    found = 0.5 * (left + right)
    if x.statistic is not None:
        return on_latent(x, found)
    equal = np.diff(points) == 0.0
    repeated = np.append(equal, False) | np.append(False, equal)
    kinks = repeated & (np.abs(left - right) > 1e-3 * np.abs(left + right))
    if kinks.any():
        found[kinks] = _derivative(function, points[kinks])
    return on_latent(x, _with_kinks(found, np.where(equal, 0.0, _chords(points, here)), (left, right), repeated))


def _chords(points: Array, values: Array) -> Array:
    """Slopes from each point to the next; 0 where both are one."""
    width = np.diff(points)
    return np.asarray(np.diff(values) / np.where(width > 0.0, width, 1.0))


def _with_kinks(found: Array, chords: Array, sides: tuple[Array, Array], repeated: NDArray[np.bool_]) -> Array:
    """Slopes at two points beside each kink that have the mean and the mean square of the slopes around them.

    Of the way from one point to the next the share t has the slope before the kink: the chord is ``t before + (1 - t) after``.
    """
    left, right = sides
    found, mass, free = found.copy(), weights(), ~repeated
    least = KINK * float(np.abs(found[free]).max(initial=0.0))
    on_point = np.append(np.abs(right - left)[:-1] > least, False)
    between = np.append(np.abs(left[1:] - right[:-1]) > least, False)
    for i in np.flatnonzero(on_point | between):
        if not (free[i] and free[i + 1]):
            continue
        free[i : i + 2] = False
        before, after = right[i], left[i + 1]
        t = float(np.clip((chords[i] - after) / (before - after), 0.0, 1.0)) if between[i] else 0.5
        own, other = mass[i] / (mass[i] + mass[i + 1]), mass[i + 1] / (mass[i] + mass[i + 1])
        around = np.array([left[i], before, after, right[i + 1]])
        shares = 0.5 * np.array([own, t, 1.0 - t, other])
        mean = float(shares @ around)
        apart = np.copysign(max(float(shares @ around**2) - mean**2, 0.0) ** 0.5, around[3] - around[0])
        found[i], found[i + 1] = mean - apart * (other / own) ** 0.5, mean + apart * (own / other) ** 0.5
    return found


def _derivative(function: Function, points: Array) -> Array:
    """``f'`` as autograd has it."""
    with torch.enable_grad():
        leaf = torch.from_numpy(np.ascontiguousarray(points)).requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return np.asarray(gradient.numpy())
