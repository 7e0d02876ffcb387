"""Activations changed so that depth neither makes all inputs alike nor tears them apart: ``gamma f(alpha x + beta) + delta``.

A network maps the cosine between two inputs, layer by layer, through ``C(c) = E[f(z) f(z')] / E[f^2]``, z and z' standard normal
with correlation c (Poole et al. 2016, arXiv:1606.05340). Where f is tailored, the map of the whole network is what was asked for
(Martens et al. 2021, arXiv:2110.01765; Zhang et al. 2022, arXiv:2203.08120).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gainstage.signal.quadrature import Array, coarse, expectation, nodes, power_series, weights

Function = Callable[[torch.Tensor], torch.Tensor]

_SHIFTS, _REACH = 61, 6.0  # values of beta that are tried, on [-6, 6]: an activation bends within a few units of zero
_HALVINGS = 50
_EVERY = 8  # of the grid's points: where f is smooth, a step of 0.14 is as exact as one of 0.018
_SMALLEST, _LARGEST = 1e-5, 8.0  # values of alpha
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Tailored:
    """``gamma f(alpha x + beta) + delta``."""

    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 1.0
    delta: float = 0.0


def leaky_cosine(slope: float, cosine: float) -> float:
    """``C(c) = c + (1 - a)^2 / (pi (1 + a^2)) (sqrt(1 - c^2) - c arccos c)`` for LeakyReLU of slope a.

    Cho & Saul 2009 for a = 0; Zhang et al. 2022, arXiv:2203.08120, section 4.
    """
    c = min(max(cosine, -1.0), 1.0)
    bend = (1.0 - slope) ** 2 / (math.pi * (1.0 + slope**2))
    return c + bend * (math.sqrt(1.0 - c * c) - c * math.acos(c))


def cosine_map(values: Array) -> Callable[[float], float]:
    """``C(c) = sum_n a_n^2 c^n / E[f^2]`` from the values of f on the grid (Mehler)."""
    series = power_series(values)
    total = float(series.sum())
    return lambda cosine: float(np.polynomial.polynomial.polyval(cosine, series)) / total if total > 0.0 else 1.0


def cosine_slope(values: Array) -> float:
    """``C'(1) = E[f'^2] / E[f^2]`` from the values of f on the grid: above 1, like inputs are torn apart."""
    slopes = np.diff(values) / np.diff(nodes())
    mass = (weights()[1:] + weights()[:-1]) / 2.0
    total = expectation(values**2)
    return float(mass @ slopes**2) / total if total > 0.0 else 0.0


def tailored_slope(network: Callable[[Callable[[float], float]], float], target: float, least: float) -> float:
    """The slope a of a LeakyReLU for which the network maps cosine 0 to the target.

    Args:
        network: its cosine at the end, given the map of each activation.
        target: that cosine.
        least: slope that the activation has now.
    """
    low, high = least, 1.0
    for _ in range(_HALVINGS):
        slope = (low + high) / 2.0
        if network(lambda c, a=slope: leaky_cosine(a, c)) > target:  # type: ignore[misc]
            low = slope
        else:
            high = slope
    return high


def tailored_smooth(f: Function, curvature: float) -> Tailored | None:
    """The numbers with ``Q(1) = Q'(1) = C'(1) = 1`` and ``C''(1) = curvature``; None where there are none.

    ``Q(q) = E[g(sqrt(q) z)^2]`` is the map of second moments of the changed activation g, so that ``Q(1) = E[g^2]``,
    ``Q'(1) = E[g g' z]``, ``C'(1) = E[g'^2]``, ``C''(1) = E[g''^2]`` (Zhang et al. 2022, arXiv:2203.08120, section 4). For each
    beta, alpha follows from the ratio ``C''(1) / C'(1)``, gamma from C' and delta from Q; beta is where Q' is met.
    """
    shifts = np.linspace(-_REACH, _REACH, _SHIFTS)
    alphas, brackets = _scales(f, shifts, curvature), []
    for sign in (1.0, -1.0):
        misses = _conditions(f, alphas, shifts, sign)[0]
        places = np.flatnonzero(misses[1:] * misses[:-1] < 0.0)
        brackets += [(float(shifts[i]), float(shifts[i + 1]), sign) for i in places]
    for low, high, sign in sorted(brackets, key=lambda bracket: abs(bracket[0] + bracket[1])):
        made, miss = _tailored_at(f, _root(f, low, high, curvature, sign), curvature, sign)
        if abs(miss) < _TOLERANCE:  # not a jump, where alpha is none
            return made
    return None


def _root(f: Function, low: float, high: float, curvature: float, sign: float) -> float:
    """Where ``Q'(1) = 1`` between two shifts: false position with the Illinois correction."""
    at_low, at_high = (float(_misses(f, np.array([beta]), curvature, sign)[0]) for beta in (low, high))
    middle = low
    for _ in range(_HALVINGS):
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        miss = float(_misses(f, np.array([middle]), curvature, sign)[0])
        if not abs(miss) > _TOLERANCE / 10.0:
            break
        if miss * at_high < 0.0:
            low, at_low = high, at_high
        else:
            at_low /= 2.0
        high, at_high = middle, miss
    return middle


def _misses(f: Function, shifts: Array, curvature: float, sign: float) -> Array:
    """``Q'(1) - 1`` for each beta; NaN where no alpha gives the curvature."""
    alphas = _scales(f, shifts, curvature)
    return _conditions(f, alphas, shifts, sign)[0]


def _tailored_at(f: Function, beta: float, curvature: float, sign: float) -> tuple[Tailored, float]:
    shifts = np.array([beta])
    alphas = _scales(f, shifts, curvature)
    miss, gammas, deltas = _conditions(f, alphas, shifts, sign)
    made = Tailored(alpha=float(alphas[0]), beta=beta, gamma=float(gammas[0]), delta=float(deltas[0]))
    return made, float(miss[0])


def _scales(f: Function, shifts: Array, curvature: float) -> Array:
    """Alpha with ``alpha^2 E[f''^2] / E[f'^2] = curvature`` at ``alpha z + beta``, by bisection from below."""
    low = np.full(shifts.shape, math.log(_SMALLEST))
    high = np.full(shifts.shape, math.log(_LARGEST))
    mass = coarse(_EVERY)[1]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        alphas = np.exp(middle)
        _, first, second = _derivatives(f, alphas, shifts)
        ratio = alphas**2 * np.vecdot(second**2, mass) / np.maximum(np.vecdot(first**2, mass), 1e-300)
        above = ratio > curvature
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    alphas = np.exp((low + high) / 2.0)
    inside = (alphas > 2.0 * _SMALLEST) & (alphas < 0.5 * _LARGEST)
    return np.where(inside, alphas, np.nan)


def _conditions(f: Function, alphas: Array, shifts: Array, sign: float) -> tuple[Array, Array, Array]:
    """``Q'(1) - 1``, gamma and delta: ``gamma^2 alpha^2 E[f'^2] = 1``, and ``E[g] = sign sqrt(1 - Var(g))``."""
    value, first, _ = _derivatives(f, alphas, shifts)
    slope = first * alphas[:, None]
    z, w = coarse(_EVERY)
    gammas = 1.0 / np.sqrt(np.maximum(np.vecdot(slope**2, w), 1e-300))
    mean = np.vecdot(value, w)
    variance = np.maximum(np.vecdot((value - mean[:, None]) ** 2, w), 0.0)
    deltas = sign * np.sqrt(np.maximum(1.0 - gammas**2 * variance, 0.0)) - gammas * mean
    g = gammas[:, None] * value + deltas[:, None]
    return np.vecdot(g * gammas[:, None] * slope * z, w) - 1.0, gammas, deltas


def _derivatives(f: Function, alphas: Array, shifts: Array) -> tuple[Array, Array, Array]:
    """f, f' and f'' at ``alpha z + beta`` on the grid, one row for each pair."""
    safe = np.where(np.isfinite(alphas), alphas, 1.0)
    with torch.enable_grad():
        u = torch.from_numpy(safe[:, None] * coarse(_EVERY)[0] + shifts[:, None]).requires_grad_()
        value = f(u)
        (first,) = torch.autograd.grad(value.sum(), u, create_graph=True)
        second = torch.autograd.grad(first.sum(), u)[0] if first.requires_grad else torch.zeros_like(u)
    return value.detach().numpy(), first.detach().numpy(), second.numpy()
