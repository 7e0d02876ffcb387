"""How numbers are written in tables: three significant digits, and ranges for grouped rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

# Values of one group that differ by less are shown as one: the step of the third digit is up to 1 %, a draw strays by more.
AGREEMENT = 0.02


def number(value: float, significant: int = 3) -> str:
    """Three significant digits, or as many as asked for; powers of ten outside of 1e-4 ... 1e5; "-" for NaN, not defined."""
    if math.isnan(value):
        return "-"
    if value == 0 or math.isinf(value):
        return f"{value:g}".replace("inf", "∞").replace("-0", "0")
    if 1e-4 <= abs(value) < 99_950:
        rounded = float(f"{abs(value):.{significant - 1}e}")
        return f"{value:.{max(0, significant - 1 - math.floor(math.log10(rounded)))}f}"
    return _scientific(value, significant)


def span(values: Iterable[float]) -> str:
    """One number where all values agree within 2 %, else "smallest..largest" with two digits each; NaN is left out."""
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return "-"
    low, high = min(defined), max(defined)
    if low == high or (math.isfinite(high - low) and high - low <= AGREEMENT * max(abs(low), abs(high))):
        return number(high if low == high else (low + high) / 2)
    first, last = _rough(low), _rough(high)
    return first if first == last else f"{first}..{last}"


def cosine_span(values: Iterable[float]) -> str:
    """As :func:`span`, with two decimals: cosines are compared with 0 and 1, not with each other."""
    shown = [f"{value:.2f}".replace("-0.00", "0.00") for value in values if not math.isnan(value)]
    if not shown:
        return "-"
    low, high = min(shown, key=float), max(shown, key=float)
    return low if low == high else f"{low}..{high}"


def _rough(value: float) -> str:
    """Two digits in the shorter of the two notations."""
    fixed = number(value, 2)
    if value == 0 or math.isinf(value):
        return fixed
    return min(fixed, _scientific(value, 2), key=len)


def _scientific(value: float, significant: int) -> str:
    mantissa, exponent = f"{value:.{significant - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def shape(size: Sequence[int]) -> str:
    """``2x64x56x56``; "scalar" for no dimensions."""
    return "x".join(map(str, size)) if size else "scalar"
