"""The first update of each optimizer, as data: root mean square of its entries at learning rate 1.

Notation: g the first gradient, p the parameter, A x B a matrix. All state starts from zeros, as in torch. Expectations are over
the entries of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gainstage.errors import InputError, UnknownNameError, nearest
from gainstage.optim.first import FirstUpdate, Start


def _gradient(start: Start) -> float:
    """rms(g)"""
    assert start.gradient_rms is not None
    return start.gradient_rms


def _sgd(start: Start) -> float:
    """rms(g), and (1 + momentum) rms(g) with Nesterov's momentum: the buffer starts as g itself, whatever the dampening."""
    ahead = float(start.settings["momentum"]) if start.settings["nesterov"] else 0.0
    return _gradient(start) * (1.0 + ahead)


def _ratio(start: Start, eps: float) -> float:
    """sqrt(E[(g / (|g| + eps))^2]): of the entries that are given, or Gaussian ones of that size; 1, as for eps << |g|, without.

    The Gaussian integral over log|x| falls off at both ends, so that the trapezium rule converges exponentially.
    """
    if start.gradient_rms is None or eps == 0.0:
        return 1.0
    if start.gradient is not None:
        sizes = start.gradient[start.reached].abs()
        return float((sizes / (sizes + eps)).square().mean().sqrt())
    log_x = np.linspace(math.log(1e-9), math.log(12.0), 1200)
    x = np.exp(log_x)
    density = math.sqrt(2.0 / math.pi) * np.exp(-0.5 * x * x) * x
    squares = density * (x / (x + eps / start.gradient_rms)) ** 2
    return math.sqrt(float(squares.sum() * (log_x[1] - log_x[0])))


def _adaptive(start: Start) -> float:
    """|g| / (|g| + eps): both moments are corrected to g and g^2 (Kingma & Ba 2015, arXiv:1412.6980, section 3)."""
    return _ratio(start, start.settings["eps"])


def _nadam(start: Start) -> float:
    """1 + mu_2 (1 - beta_1) / (1 - mu_1 mu_2), mu_t = beta_1 (1 - 0.96^(t psi) / 2)

    The step is ((1 - mu_1) g / (1 - mu_1) + mu_2 m_1 / (1 - mu_1 mu_2)) / |g| (Dozat 2016, Incorporating
    Nesterov momentum into Adam). There m_1 = (1 - mu_1) g; torch averages with beta_1, so that m_1 = (1 - beta_1) g.
    """
    beta, psi = float(start.settings["betas"][0]), float(start.settings["momentum_decay"])
    first, second = (beta * (1.0 - 0.5 * math.pow(0.96, step * psi)) for step in (1, 2))
    return (1.0 + second * (1.0 - beta) / (1.0 - first * second)) * _adaptive(start)


def _rmsprop(start: Start) -> float:
    """1 / sqrt(1 - alpha), and 1 / sqrt(alpha (1 - alpha)) where centered: the average of g^2 is (1 - alpha) g^2, uncorrected.

    Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013, arXiv:1308.0850, eq. 38-45. eps is added to the root.
    """
    alpha = start.settings["alpha"]
    root = math.sqrt((1.0 - alpha) * (alpha if start.settings["centered"] else 1.0))
    return _ratio(start, start.settings["eps"] / root) / root


def _sign(_: Start) -> float:
    """1: the sign of (1 - beta_1) g (Chen et al. 2023, arXiv:2302.06675, algorithm 2)."""
    return 1.0


def _adafactor_settings(start: Start) -> dict[str, Any]:
    """eps_2 = 1 for what starts from zeros: its steps are then lr itself, and not 1/1000 of it."""
    first, second = start.settings["eps"]
    return {**start.settings, "eps": (first, second if start.rms > 0.0 else 1.0)}


def _adafactor(start: Start) -> float:
    """max(eps_2, rms(p)) min(rms(U), d): a step relative to the parameter, of an update that is clipped (Shazeer & Stern 2018).

    arXiv:1804.04235, algorithms 4 to 6; the decay 1 - t^-0.8 is 0 at t = 1. U = g / sqrt(V), V the outer product of the row and
    column means of g^2 over the mean. For a vector rms(U) = 1. It is 1 for a matrix whose g^2 is such a product, and above 1
    where large entries dominate their row and column, or the mean of g^2 is below its floor eps_1; the clipping then makes it
    d = 1. Clipping is over all entries of a matrix, and so is this rms. It is computed from the gradient where that is given.
    """
    given, relative = start.settings["eps"]
    least = torch.finfo(start.dtype).eps if given is None else float(given)
    clip = float(start.settings["d"])
    if start.gradient is not None:
        squares = start.gradient.square()
        estimate = squares
        if len(start.shape) > 1:
            rows, columns = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
            estimate = rows * columns / rows.mean(-2, keepdim=True).clamp(min=least)
        updates = squares / estimate.clamp(min=least**2)
        whole = float(updates.mean().sqrt())
        update = whole if len(start.shape) > 1 else float(updates[start.reached].mean().sqrt())
        return max(float(relative), start.rms) * update / max(1.0, whole / clip)
    return max(float(relative), start.rms) * min(1.0, clip)


def _muon(start: Start) -> float:
    """sqrt(sum_i phi(s_i)^2 / (A B)) adjust(A, B), s the singular values of g / |g|; phi = 1 without a gradient: rank min(A, B).

    Jordan et al. 2024 (the Muon post): phi is the quintic a s + b s^3 + c s^5, iterated; it leaves .68 to 1.14 in place of 1, and
    less for singular values below .01. adjust is sqrt(max(1, A/B)) there, and .2 sqrt(max(A, B)) in Liu et al. 2025,
    arXiv:2502.16982, section 2.2. Momentum and Nesterov's form only scale g in the first step.
    """
    rows, columns = start.shape
    settings = start.settings
    if settings["adjust_lr_fn"] == "match_rms_adamw":
        adjust = 0.2 * math.sqrt(max(rows, columns))
    else:
        adjust = math.sqrt(max(1.0, rows / columns))
    if start.gradient is None:
        return adjust / math.sqrt(max(rows, columns))
    return adjust * _norm_of_quintic(start.gradient, settings) / math.sqrt(rows * columns)


def _norm_of_quintic(gradient: torch.Tensor, settings: Mapping[str, Any]) -> float:
    """sqrt(sum_i phi(s_i)^2), by products of matrices in bfloat16.

    As torch computes it: phi lifts directions of the gradient's rounding errors by up to a^5, which is a tenth of the norm where
    the gradient has a low rank; exact singular values miss that.
    """
    a, b, c = settings["ns_coefficients"]
    x = gradient.bfloat16() if gradient.shape[0] <= gradient.shape[1] else gradient.bfloat16().T
    x = x / torch.linalg.vector_norm(x).clamp(min=settings["eps"])
    for _ in range(settings["ns_steps"]):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)  # rounded once per product
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


LAWS = {
    law.name: law
    for law in (
        FirstUpdate(
            name="sgd",
            magnitude=_sgd,
            derivation="u = g + weight_decay p; times 1 + momentum with nesterov=True",
            settings={"momentum": 0.0, "nesterov": False},
            needs_gradient=True,
            is_decay_decoupled=False,
        ),
        FirstUpdate(name="adam", magnitude=_adaptive, derivation="|u| = |g| / (|g| + eps)", settings={"eps": 1e-8}),
        FirstUpdate(
            name="adamw",
            magnitude=_adaptive,
            derivation="|u| = |g| / (|g| + eps)",
            settings={"eps": 1e-8},
            is_decay_decoupled=True,
        ),
        FirstUpdate(name="adamax", magnitude=_adaptive, derivation="|u| = |g| / (|g| + eps)", settings={"eps": 1e-8}),
        FirstUpdate(
            name="nadam",
            magnitude=_nadam,
            derivation="|u| = 1 + mu_2 (1 - beta_1) / (1 - mu_1 mu_2)",
            settings={"betas": (0.9, 0.999), "momentum_decay": 4e-3, "eps": 1e-8},
        ),
        FirstUpdate(
            name="radam",
            magnitude=_gradient,
            derivation="u = g: no variance is tractable at t = 1 (Liu et al. 2020, arXiv:1908.03265, algorithm 2)",
            needs_gradient=True,
        ),
        FirstUpdate(
            name="rmsprop",
            magnitude=_rmsprop,
            derivation="|u| = 1 / sqrt(1 - alpha)",
            settings={"alpha": 0.99, "centered": False, "eps": 1e-8},
        ),
        FirstUpdate(
            name="adagrad",
            magnitude=_adaptive,
            derivation="|u| = |g| / (sqrt(g^2) + eps) (Duchi, Hazan & Singer 2011), from accumulators of zero",
            settings={"eps": 1e-10},
        ),
        FirstUpdate(name="lion", magnitude=_sign, derivation="|u| = |sign((1 - beta_1) g)| = 1", is_decay_decoupled=True),
        FirstUpdate(
            name="adafactor",
            magnitude=_adafactor,
            derivation="rms(u) = max(eps_2, rms(p)) min(rms(U), d)",
            settings={"eps": (None, 1e-3), "d": 1.0},
            settings_for=_adafactor_settings,
            is_decay_decoupled=True,
            largest_rate=1.0,
        ),
        FirstUpdate(
            name="muon",
            magnitude=_muon,
            derivation="rms(u) = sqrt(max(1, A/B) / max(A, B))",
            settings={"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "eps": 1e-7, "adjust_lr_fn": None},
            is_decay_decoupled=True,
            rest="adamw",
        ),
    )
}


def find_law(optimizer: str | FirstUpdate) -> FirstUpdate:
    """The law itself, or the one of that name, in capitals or not.

    Raises:
        UnknownNameError: no law has this name.
        InputError: neither a name nor a law.
    """
    if isinstance(optimizer, FirstUpdate):
        return optimizer
    if not isinstance(optimizer, str):
        raise InputError(f"an optimizer is named, or given as a gainstage.FirstUpdate, not as {type(optimizer).__name__}")
    if optimizer.lower() not in LAWS:
        raise UnknownNameError(
            f"there is no law for the first update of {optimizer!r}{nearest(optimizer.lower(), LAWS)}; "
            f"known are {', '.join(LAWS)}. What is missing is the rms of its first update at learning rate 1. To add it, pass "
            f"optimizer=gainstage.FirstUpdate(name={optimizer!r}, magnitude=lambda start: ..., derivation='...') "
            "where start has the parameter's shape, rms and gradient_rms."
        )
    return LAWS[optimizer.lower()]
