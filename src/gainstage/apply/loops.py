"""Runs of entries in compiled loops: what :mod:`gainstage.apply.runs` does with NumPy step by step, and the same bits.

Words, formulas and the order of all operations are those of :mod:`gainstage.apply.stream` and :mod:`gainstage.apply.normal`;
numba reorders and fuses none unless it is told to. A few hundred words at a time are computed, round by round, and become
values, so that the compiler meets loops over neighbours, of which a processor does several at once, and everything but the
result stays in the core's own cache. The interpreter is not needed meanwhile: threads do not wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
import torch
from numba.extending import overload
from numpy.typing import NDArray

from gainstage.apply.law import Law
from gainstage.apply.normal import (
    CENTRE_64,
    HALF_ROOT,
    LOG_2,
    LOG_SERIES,
    TAIL_BITS,
    A,
    B,
    C,
    D,
    E,
    F,
    central_constants,
    first_segment,
    tail_table,
)
from gainstage.apply.stream import KEY_STEPS, MULTIPLIERS, ROUNDS, Stream

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _part(function: _Function) -> _Function:
    """Compiled into what calls it. Divisions are IEEE's; Python's would look for zeros one by one."""
    compiled: _Function = numba.njit(error_model="numpy")(function)
    return compiled


def _whole(function: _Function) -> _Function:
    """Compiled for callers from Python, and kept for other processes where there is a folder to keep it in."""
    try:
        compiled: _Function = numba.njit(error_model="numpy", nogil=True, cache=True)(function)
    except RuntimeError:
        compiled = numba.njit(error_model="numpy", nogil=True)(function)
    return compiled


# Counters at once: four words each.
_LANES = 128

_U = np.uint64
_LOW, _HALF = _U(2**32 - 1), _U(32)
_FACTOR_0, _FACTOR_1 = map(_U, MULTIPLIERS)
_STEP_0, _STEP_1 = map(_U, KEY_STEPS)


@_part
def _product(a: Any, b: Any) -> Any:
    """High and low 64 bits of ``a b``, from halves: processors multiply several pairs of these at once."""
    a0, a1, b0, b1 = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    low = a0 * b0
    first = a1 * b0 + (low >> _HALF)
    second = a0 * b1 + (first & _LOW)
    return a1 * b1 + (first >> _HALF) + (second >> _HALF), (second << _HALF) | (low & _LOW)


@_part
def philox(key: Any, state: Any, lanes: Any) -> None:
    """Philox4x64-10 of the counters in the first columns of ``state``, in place (Salmon et al. 2011, section 3.3)."""
    key0, key1 = key
    c0, c1, c2, c3 = state[0], state[1], state[2], state[3]
    for _ in range(ROUNDS):
        for i in range(lanes):
            high0, low0 = _product(c0[i], _FACTOR_0)
            high1, low1 = _product(c2[i], _FACTOR_1)
            c0[i] = high1 ^ c1[i] ^ key0
            c1[i] = low1
            c2[i] = high0 ^ c3[i] ^ key1
            c3[i] = low0
        key0 += _STEP_0
        key1 += _STEP_1


# Arguments of the loops. The type decides which one is meant.
class _Uniform(NamedTuple):
    words: Any  # room for those of all lanes, as they are computed and as they are read
    scale: Any
    limit: Any
    mean: Any
    half: bool  # values are rounded to 16 bits: of bfloat16, if brain, else of float16
    brain: bool


class _Normal32(NamedTuple):
    words: Any
    scale: Any
    limit: Any
    mean: Any
    half: bool
    brain: bool
    constants: Any
    table: Any
    marks: Any  # room for those of entries beyond the centre, as groups of eight and one by one


class _Normal64(NamedTuple):
    words: Any
    scale: Any
    limit: Any
    mean: Any
    half: bool
    brain: bool
    width: Any


def fill_centred(law: Any, words: Any, out: Any) -> None:
    """Fill ``out`` with values of mean zero; in compiled code one of the functions below, by the type of ``law``."""
    raise NotImplementedError("numba is told to compile nothing")


@_part
def round_half(brain: Any, values: Any, out: Any) -> None:
    """To nearest, ties to even. Denormals of float16 are multiples of 2^-24, as are singles between 1/2 and 1."""
    bits = values.view(np.uint32)
    for i in range(out.size):
        if brain:
            out[i] = (bits[i] + 0x7FFF + (bits[i] >> 16 & 1)) >> 16
        else:
            size = bits[i] & 0x7FFFFFFF
            normal = (size - (112 << 23) + 0xFFF + (size >> 13 & 1)) >> 13
            denormal = np.float32(abs(values[i]) + np.float32(0.5)).view(np.uint32) - 0x3F000000
            out[i] = (bits[i] >> 16 & 0x8000) | (denormal if size < 113 << 23 else min(normal, 0x7C00))


@_whole
def _fill(law: Any, key: Any, starts: Any, values: Any, halves: Any) -> None:
    """Runs of entries: ``values``, or ``halves``, which are computed in the first row of ``values``."""
    numbers, words = law.words
    state = np.empty((4, _LANES), np.uint64)
    per_counter = words.size // _LANES
    length = halves.shape[1] if law.half else values.shape[1]
    for row in range(starts.size):
        done = 0
        while done < length:
            counter, skipped = divmod(starts[row] + done, per_counter)
            count = min(length - done, words.size - skipped)
            lanes = (skipped + count - 1) // per_counter + 1
            for i in range(lanes):
                state[0, i], state[1, i], state[2, i], state[3, i] = _U(counter + i), _U(0), _U(0), _U(0)
            philox(key, state, lanes)
            for i in range(lanes):
                for j in range(4):
                    numbers[4 * i + j] = state[j, i]
            out = values[0, :count] if law.half else values[row, done : done + count]
            fill_centred(law, words[skipped : skipped + count], out)
            if law.limit < np.inf:
                for i in range(count):
                    out[i] = min(max(out[i], -law.limit), law.limit)
            if law.mean != 0:
                for i in range(count):
                    out[i] += law.mean
            if law.half:
                round_half(law.brain, out, halves[row, done : done + count])
            done += count


def _centred_by(law: Any, words: Any, out: Any) -> Callable[[Any, Any, Any], None]:  # noqa: ARG001  (types, by their names)
    return {_Uniform: _uniform, _Normal32: _normal_32, _Normal64: _normal_64}[law.instance_class]


overload(fill_centred, jit_options={"error_model": "numpy"})(_centred_by)


def _uniform(law: Any, words: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = law.scale * out.dtype.type(words[i])


def _normal_32(law: Any, words: Any, out: Any) -> None:
    centre, last, ((a1, b1), (a2, b2), (a3, b3), (a4, b4), (a5, b5)) = law.constants
    eights, beyond = law.marks
    for i in range(out.size):
        n = np.float32(words[i])
        r = centre - n * n
        t = r + b5
        t = a5 / t + r + b4
        t = a4 / t + r + b3
        t = a3 / t + r + b2
        t = a2 / t + r + b1
        out[i] = n * (a1 / t + last)
        beyond[i] = r < _ZERO
    for eight in range((out.size + 7) // 8):
        if eights[eight]:  # one in fourteen
            for i in range(8 * eight, min(8 * eight + 8, out.size)):
                if beyond[i]:
                    out[i] = np.float32(math.copysign(_tail_32(words[i], law.table), out[i])) * law.scale


_ZERO = np.float32(0)
_SHIFT = 23 - TAIL_BITS
_FIRST_SEGMENT = first_segment()


@_part
def _tail_32(word: Any, table: Any) -> Any:
    constant, linear, square = table
    mass = np.float32(2**31 - 1 - (word ^ (word >> 31))) + np.float32(0.5)
    bits = np.float32(mass).view(np.int32)
    position = np.float32(bits & ((1 << _SHIFT) - 1))
    index = (bits >> _SHIFT) - _FIRST_SEGMENT
    return (square[index] * position + linear[index]) * position + constant[index]


def _normal_64(law: Any, words: Any, out: Any) -> None:
    for i in range(out.size):
        q = law.width * ((np.float64(words[i] >> 11) + 0.5) * 2.0**-53)
        r = 0.180625 - q * q
        out[i] = law.scale * (q * _polynomial(A, r) / _polynomial(B, r))
    for i in range(out.size):
        q = law.width * ((np.float64(words[i] >> 11) + 0.5) * 2.0**-53)
        if abs(q) > CENTRE_64:
            out[i] = law.scale * math.copysign(_tail_quantile(0.5 - abs(q)), q)


@_part
def _tail_quantile(mass: Any) -> Any:
    r = math.sqrt(-_log(mass))
    if r > 5:
        return _polynomial(E, r - 5) / _polynomial(F, r - 5)
    return _polynomial(C, r - 1.6) / _polynomial(D, r - 1.6)


@_part
def _log(x: Any) -> Any:
    m, e = math.frexp(x)
    if m < HALF_ROOT:
        m, e = 2 * m, e - 1
    s = (m - 1) / (m + 1)
    return e * LOG_2 + 2 * s * _polynomial(LOG_SERIES, s * s)


@_part
def _polynomial(coefficients: Any, x: Any) -> Any:
    value = coefficients[-1]
    for k in range(len(coefficients) - 2, -1, -1):
        value = value * x + coefficients[k]
    return value


def fill_runs(law: Law, stream: Stream, starts: NDArray[np.int64], out: NDArray[Any]) -> None:
    """As :func:`gainstage.apply.runs.fill_runs`."""
    values, halves = (np.empty((1, 8 * _LANES), np.float32), out) if law.is_rounded else (out, np.empty((0, 0), np.uint16))
    _fill(constants_of(law), (_U(stream.key % 2**64), _U(stream.key >> 64)), starts, values, halves)


def constants_of(law: Law) -> _Uniform | _Normal32 | _Normal64:
    """What the loops take of a law, in their precision."""
    number = np.float64 if law.bits == 64 else np.float32
    numbers = np.empty(4 * _LANES, np.uint64)
    words = numbers, numbers.view(f"i{law.bits // 8}")
    ends = words, number(law.scale), number(law.limit), number(law.mean), law.is_rounded, law.dtype == torch.bfloat16
    if not law.normal:
        return _Uniform(*ends)
    if law.bits == 64:
        return _Normal64(*ends, law.width)
    centre, last, pairs = central_constants(2.0**-32 * law.width, law.scale)
    eights = np.empty(_LANES, np.uint64)
    return _Normal32(*ends, (centre, last, tuple(map(tuple, pairs))), tail_table(), (eights, eights.view(np.bool_)))
