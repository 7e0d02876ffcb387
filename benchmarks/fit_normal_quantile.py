"""Coefficients of the single-precision normal quantile in ``gainstage.apply.normal``, and their error.

For p = 1/2 + q and r = CENTRE^2 - q^2, z = q P(r) / Q(r) with P and Q of degree 5, on |q| <= CENTRE, minimax in the absolute
error: Lawson's reweighted least squares on the linearised problem (C. L. Lawson 1961), against ``scipy.special.ndtri``. Then
P/Q as the continued fraction k + a1/(r + b1 + a2/(r + b2 + ...)), which takes fewer operations, by Euclid's algorithm.

    python -m benchmarks.fit_normal_quantile
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import Polynomial
from numpy.polynomial.chebyshev import Chebyshev, chebvander
from numpy.typing import NDArray
from scipy.special import ndtri

CENTRE = 0.4953  # to 2.6 deviations: what lies beyond, one entry in a hundred, takes as long as one more level of the fraction
DEGREE = 5


def fit(rounds: int = 600) -> tuple[Polynomial, Polynomial, float]:
    """Numerator and denominator in r, and the largest error of z."""
    nodes = np.cos(np.pi * (np.arange(4000) + 0.5) / 4000)  # of 2 r / CENTRE^2 - 1
    q = CENTRE * np.sqrt((1 - nodes) / 2)
    z = -ndtri(0.5 - q)
    powers = chebvander(nodes, DEGREE)
    matrix = np.concatenate([powers * (q / z)[:, None], -powers[:, 1:]], axis=1)
    scale = np.maximum(z, 0.5)  # error of z per relative error; below 1/2 the relative error is bounded
    weights, denominator = np.ones_like(q), np.ones_like(q)
    best, smallest = np.zeros(2 * DEGREE + 1), np.inf
    for _ in range(rounds):
        row = np.sqrt(weights) / denominator * scale
        coefficients = np.linalg.lstsq(matrix * row[:, None], row, rcond=None)[0]
        numerator, denominator = powers @ coefficients[: DEGREE + 1], 1 + powers[:, 1:] @ coefficients[DEGREE + 1 :]
        error = np.abs(numerator / denominator * q / z - 1) * scale
        if error.max() < smallest:
            best, smallest = coefficients, float(error.max())
        weights *= np.sqrt(error / error.mean())
    domain = (0, CENTRE**2)
    upper, lower = Chebyshev(best[: DEGREE + 1], domain), Chebyshev(np.r_[1.0, best[DEGREE + 1 :]], domain)
    return upper.convert(kind=Polynomial), lower.convert(kind=Polynomial), smallest


def continued_fraction(numerator: Polynomial, denominator: Polynomial) -> tuple[float, list[tuple[float, float]]]:
    """``k`` and the pairs ``(a, b)``, outermost first."""
    upper, lower = denominator, numerator
    quotient, lower = divmod(lower, upper)
    pairs = []
    for degree in range(DEGREE, 0, -1):
        lower = Polynomial(lower.coef[:degree])  # what is above is rounding
        division, remainder = divmod(upper, lower)
        constant, slope = division.coef
        pairs.append((float(1 / slope), float(constant / slope)))
        upper, lower = lower, remainder / slope
    return float(quotient.coef[0]), pairs


def evaluate(k: float, pairs: list[tuple[float, float]], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quantile at 1/2 + q."""
    r = CENTRE**2 - q * q
    fraction: NDArray[np.float64] = np.zeros_like(r)
    for a, b in reversed(pairs):
        fraction = a / (fraction + r + b)
    return q * (k + fraction)


def main() -> None:
    """Print what ``gainstage.apply.normal`` holds."""
    numerator, denominator, error = fit()
    k, pairs = continued_fraction(numerator, denominator)
    k, pairs = float(f"{k:.10g}"), [(float(f"{a:.10g}"), float(f"{b:.10g}")) for a, b in pairs]
    print(f"k = {k:.10g}")
    for index, (a, b) in enumerate(pairs, 1):
        print(f"a{index} = {a:.10g}, b{index} = {b:.10g}")
    q = np.linspace(1e-9, CENTRE, 10**6)
    print(f"largest error {error:.2e}, with the digits above {np.abs(evaluate(k, pairs, q) + ndtri(0.5 - q)).max():.2e}")


if __name__ == "__main__":
    main()
