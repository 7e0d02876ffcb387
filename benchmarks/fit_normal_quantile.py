"""Coefficients of the single-precision normal quantile in ``gainstage.apply.normal``, and their error.

For p = 1/2 + q and r = CENTRE^2 - q^2, z = q P(r) / Q(r) with P and Q of degree 4, on |q| <= CENTRE, minimax in the relative
error: Lawson's reweighted least squares on the linearised problem (C. L. Lawson 1961), against ``scipy.special.ndtri``. Then
P/Q as the continued fraction k + a1/(r + b1 + a2/(r + b2 + ...)), which takes fewer operations, by Euclid's algorithm.

    python -m benchmarks.fit_normal_quantile
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import NDArray
from scipy.special import ndtri

CENTRE = 0.4775  # a little more than Phi(2) - 1/2, so that a normal cut at 2 deviations never leaves it
DEGREE = 4


def fit(rounds: int = 200) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Numerator, denominator (lowest power first, Q(0) = 1) and largest relative error."""
    nodes = (1 + np.cos(np.pi * (np.arange(8000) + 0.5) / 8000)) / 2
    r = nodes * CENTRE**2
    q = np.sqrt(CENTRE**2 - r)
    target = -ndtri(0.5 - q) / q
    powers = r[:, None] ** np.arange(DEGREE + 1)
    matrix = np.concatenate([powers / target[:, None], -powers[:, 1:]], axis=1)
    weights, denominator = np.ones_like(r), np.ones_like(r)
    best, smallest = np.zeros(2 * DEGREE + 1), np.inf
    for _ in range(rounds):
        scale = np.sqrt(weights) / denominator
        coefficients = np.linalg.lstsq(matrix * scale[:, None], scale, rcond=None)[0]
        numerator, denominator = powers @ coefficients[: DEGREE + 1], 1 + powers[:, 1:] @ coefficients[DEGREE + 1 :]
        error = np.abs(numerator / denominator / target - 1)
        if error.max() < smallest:
            best, smallest = coefficients, float(error.max())
        weights *= error / error.mean()
    return best[: DEGREE + 1], np.r_[1.0, best[DEGREE + 1 :]], smallest


def continued_fraction(
    numerator: NDArray[np.float64], denominator: NDArray[np.float64]
) -> tuple[float, list[tuple[float, float]]]:
    """``k`` and the pairs ``(a, b)``, outermost first."""
    upper, lower = Polynomial(denominator), Polynomial(numerator)
    quotient, lower = divmod(lower, upper)
    pairs = []
    for degree in range(DEGREE, 0, -1):
        lower = Polynomial(lower.coef[:degree])  # what is above is rounding
        division, remainder = divmod(upper, lower)
        constant, slope = division.coef
        pairs.append((float(1 / slope), float(constant / slope)))
        upper, lower = lower, remainder / slope
    return float(quotient.coef[0]), pairs


def main() -> None:
    """Print what ``gainstage.apply.normal`` holds."""
    numerator, denominator, error = fit()
    k, pairs = continued_fraction(numerator, denominator)
    print(f"k = {k:.10g}")
    for index, (a, b) in enumerate(pairs, 1):
        print(f"a{index} = {a:.10g}, b{index} = {b:.10g}")
    print(f"largest relative error {error:.2e}")


if __name__ == "__main__":
    main()
