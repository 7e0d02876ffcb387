"""The quantile function of the normal distribution, from random integers, alike to the last bit on every machine.

Only +, -, *, / and the square root are used, one NumPy call each: IEEE 754 fixes their results, where a library's logarithm
or a fused multiply-add depends on the processor. An integer ``w`` of ``b`` bits, taken as signed, stands for the
probability 1/2 + q with ``q = (w + 1/2) / 2^b``; the distance of ``q`` from the nearer end is known exactly, so tails are as
accurate as the centre. With 32 bits values reach 6.3 deviations, with 53 bits 8.3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# benchmarks/fit_normal_quantile.py: z = q (k + a1 / (r + b1 + a2 / (r + b2 + ... a5 / (r + b5)))), where r = CENTRE^2 - q^2,
# within 2.9e-7 of the quantile for r >= 0.
CENTRE = 0.4953
_K = 0.9149077585
_AB = (
    (1.251319763, 0.6682493903),
    (-0.05638516481, 0.2058821597),
    (-0.002638466391, 0.05798779833),
    (-0.0002153894687, 0.01999918152),
    (-1.445245134e-05, 0.007982639467),
)

# M. J. Wichura 1988, "Algorithm AS 241: the percentage points of the normal distribution", PPND16: relative error 1e-16.
# Centre |q| <= 0.425 in 0.180625 - q^2; tails in r = sqrt(-log(tail mass)), up to and beyond r = 5.
CENTRE_64 = 0.425
A = (
    3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3,
)  # fmt: skip
B = (
    1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3,
)  # fmt: skip
C = (
    1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
    1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4,
)  # fmt: skip
D = (
    1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9,
)  # fmt: skip
E = (
    6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
    2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7,
)  # fmt: skip
F = (
    1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
    7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15,
)  # fmt: skip

# Entries that one step of the fraction is taken for. A core's own cache would hold a quarter of that, and one thread is as fast
# with it; but two threads meet at the interpreter's lock before each step.
_PIECE = 2**18

# Single-precision tails: parabolas on each 64th of an octave of the tail mass, whose relative error is below 1e-7.
TAIL_BITS = 6

LOG_2 = 0.6931471805599453
HALF_ROOT = 0.7071067811865476
LOG_SERIES = tuple(1 / (2 * k + 1) for k in range(11))


def normal_32(words: NDArray[np.int32], scale: float, out: NDArray[np.float32], width: float = 1.0) -> None:
    """Normal values of standard deviation ``scale`` in single precision, within two millionths of ``scale``.

    Most of that is the rounding of a word to 24 bits where the quantile is steep; tails are drawn from all bits.

    Args:
        words: signed random integers.
        scale: standard deviation, before a cut.
        out: one value for each word.
        width: probability between the quantiles at which the normal is cut, at most ``2 * CENTRE``; 1 for the whole.
    """
    if width < 1:
        assert width <= 2 * CENTRE
        _central_32(words, 2.0**-32 * width, scale, out)
        return
    beyond = np.empty(words.size, np.bool_)
    _central_32(words, 2.0**-32, scale, out, beyond)
    outside = _places(beyond)
    tails = np.copysign(_tail_32(words[outside]), out[outside])
    tails *= np.float32(scale)
    out[outside] = tails


def _central_32(
    words: NDArray[np.int32], unit: float, scale: float, out: NDArray[np.float32], beyond: NDArray[np.bool_] | None = None
) -> None:
    """``scale`` times the quantile at 1/2 + q, q = ``unit`` times the word; and where q is beyond the centre.

    All is computed in words instead of q, which takes a multiplication less.
    """
    centre, last, pairs = central_constants(unit, scale)
    scratch = np.empty((2, min(_PIECE, words.size)), np.float32)
    for start in range(0, words.size, _PIECE):
        piece = slice(start, start + _PIECE)
        value = out[piece]
        r, fraction = scratch[:, : value.size]
        np.copyto(value, words[piece], casting="unsafe")
        np.multiply(value, value, out=r)
        np.subtract(centre, r, out=r)
        np.add(r, pairs[-1, 1], out=fraction)
        for (a, _), (_, b) in itertools.pairwise(pairs[::-1]):
            np.divide(a, fraction, out=fraction)
            fraction += r
            fraction += b
        np.divide(pairs[0, 0], fraction, out=fraction)
        fraction += last
        value *= fraction
        if beyond is not None:
            np.less(r, 0, out=beyond[piece])


def central_constants(unit: float, scale: float) -> tuple[np.float32, np.float32, NDArray[np.float32]]:
    """For the fraction in words: what their square is taken from, K, and the (a, b), the first ones outermost."""
    per = 1 / (unit * unit)
    (a, b), *inner = _AB
    pairs = [(a * per * unit * scale, b * per), *((a * per * per, b * per) for a, b in inner)]
    return np.float32(CENTRE * CENTRE * per), np.float32(_K * unit * scale), np.array(pairs, np.float32)


def _places(marks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where the marks are, few of which are set: eight are looked at together, in a fifth of the time."""
    whole = marks.size // 8 * 8
    eights = marks[:whole].view(np.uint64)
    groups = np.flatnonzero(eights != 0)
    within = np.flatnonzero(eights[groups].view(np.bool_))
    return np.concatenate([8 * groups[within >> 3] + (within & 7), whole + np.flatnonzero(marks[whole:])])


def _tail_32(words: NDArray[np.int32]) -> NDArray[np.float32]:
    """``|z|`` of words beyond the centre, by interpolation in :func:`tail_table`."""
    constant, linear, square = tail_table()
    # Words from the end, counted from 0: w or -1-w less than the largest. Half a word more is the tail mass.
    from_end = np.iinfo(np.int32).max - (words ^ (words >> 31))
    mass = from_end.astype(np.float32)
    mass += np.float32(0.5)
    bits = mass.view(np.int32)
    shift = 23 - TAIL_BITS
    position = (bits & ((1 << shift) - 1)).astype(np.float32)
    index = (bits >> shift) - first_segment()
    value: NDArray[np.float32] = square[index] * position
    value += linear[index]
    value *= position
    value += constant[index]
    return value


def first_segment() -> int:
    """Leading bits of the least tail mass, half a word."""
    return int(np.float32(0.5).view(np.int32)) >> (23 - TAIL_BITS)


@cache
def tail_table() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Coefficients of ``|z|`` in the lower bits of the tail mass, a single-precision number of words, for its leading bits.

    The parabola goes through the double-precision quantile at the Chebyshev nodes of the segment.
    """
    shift = 23 - TAIL_BITS
    last = int(np.float32(2.0**31 * (1 - 2 * CENTRE) + 256).view(np.int32)) >> shift
    starts = np.arange(first_segment(), last + 1, dtype=np.int32) << shift
    low = starts.view(np.float32).astype(np.float64)
    width = (starts + (1 << shift)).view(np.float32) - low
    left, middle, right = ((1 - root) / 2 for root in (math.sqrt(0.75), 0.0, -math.sqrt(0.75)))
    z_left, z_middle, z_right = (_tail_quantile((low + width * node) * 2.0**-32) for node in (left, middle, right))
    # Newton's divided differences, then powers of the position in the segment (from 0 to 1).
    first = (z_middle - z_left) / (middle - left)
    second = ((z_right - z_middle) / (right - middle) - first) / (right - left)
    constant = z_left - first * left + second * left * middle
    linear = first - second * (left + middle)
    unit = 2.0**-shift
    return constant.astype(np.float32), (linear * unit).astype(np.float32), (second * unit * unit).astype(np.float32)


def normal_64(words: NDArray[np.int64], width: float = 1.0) -> NDArray[np.float64]:
    """Standard normal values in double precision from the leading 53 bits, relative error about 1e-15.

    Args:
        words: signed random integers.
        width: probability between the quantiles at which the normal is cut; 1 for the whole.
    """
    q: NDArray[np.float64] = np.asarray(((words >> 11) + 0.5) * 2.0**-53, np.float64)
    tail = 0.5 - np.abs(q)  # exact: both have at most 54 bits after the point
    if width < 1:
        q *= width
        tail = 0.5 - np.abs(q)
    out = np.empty_like(q)
    near = np.abs(q) <= CENTRE_64
    centre = q[near]
    r = 0.180625 - centre * centre
    out[near] = centre * _horner(A, r) / _horner(B, r)
    far = ~near
    out[far] = np.copysign(_tail_quantile(tail[far]), q[far])
    return out


def _tail_quantile(mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """``|z|`` where the normal has probability ``mass`` beyond it, for masses below 0.075 (AS 241)."""
    r = np.sqrt(-portable_log(mass))
    near = r - 1.6
    out: NDArray[np.float64] = _horner(C, near) / _horner(D, near)
    beyond = np.flatnonzero(r > 5)
    if beyond.size:
        far = r[beyond] - 5
        out[beyond] = _horner(E, far) / _horner(F, far)
    return out


def portable_log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """``log(2^e m) = e log 2 + 2 (s + s^3/3 + s^5/5 + ...)``, ``s = (m-1)/(m+1)``, ``sqrt(1/2) <= m < sqrt(2)``.

    The series is cut where ``s <= 0.172`` makes its terms smaller than double precision.
    """
    m, e = np.frexp(x)
    low = m < HALF_ROOT
    m[low] *= 2
    exponent = e - low
    s = (m - 1) / (m + 1)
    series = _horner(LOG_SERIES, s * s)
    result: NDArray[np.float64] = exponent * LOG_2 + 2 * s * series
    return result


def _horner(coefficients: Sequence[float], x: NDArray[Any]) -> NDArray[Any]:
    """Polynomial in ``x``, lowest coefficient first, in the type of ``x``."""
    *lower, leading = (x.dtype.type(c) for c in coefficients)
    out: NDArray[Any] = np.multiply(x, leading)
    for index, coefficient in enumerate(reversed(lower)):
        if index:
            out *= x
        out += coefficient
    return out
