"""How numbers are written in tables: three significant digits, and ranges for grouped rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

# Values of one group that differ by less are shown as one: the step of the third digit is up to 1 %, a draw strays by more.
AGREEMENT = 0.02


def number(value: float) -> str:
    """Three significant digits; powers of ten only outside of 1e-4 ... 1e5; "-" for what is not defined (NaN)."""
    if math.isnan(value):
        return "-"
    if value == 0 or math.isinf(value):
        return f"{value:g}".replace("inf", "∞").replace("-0", "0")
    if 1e-4 <= abs(value) < 99_950:
        digits = max(0, 2 - math.floor(math.log10(float(f"{abs(value):.2e}"))))
        return f"{value:.{digits}f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def span(values: Iterable[float]) -> str:
    """One number where all values agree within 2 % of the largest, else "smallest .. largest"; NaN is left out."""
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return "-"
    low, high = min(defined), max(defined)
    if high - low <= AGREEMENT * max(abs(low), abs(high)) or number(low) == number(high):
        return number((low + high) / 2 if math.isfinite(high - low) else high)
    return f"{number(low)} .. {number(high)}"


def shape(size: Sequence[int]) -> str:
    """``2x64x56x56``; "scalar" for no dimensions."""
    return "x".join(map(str, size)) if size else "scalar"
