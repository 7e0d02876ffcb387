"""Runs of entries, in torch's operations, for memory of a CUDA device: the same values, to the bit.

Each operation is a kernel of its own and rounds as IEEE 754 says: no multiplication melts with an addition, and no division
becomes a product with a reciprocal. In single precision only: what computes in double precision is drawn on the host.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.apply.law import Law, law_of
from gainstage.apply.normal import TAIL_BITS, central_constants, first_segment, tail_table
from gainstage.apply.stream import KEY_STEPS, MULTIPLIERS, ROUNDS, Stream
from gainstage.plan import Distribution, Family

_PER_BLOCK = 8  # words of 32 bits

_LOW = 0xFFFFFFFF


def draws_on(memory: torch.Tensor) -> bool:
    """Tell whether a parameter's entries are drawn where they lie, and not on the host."""
    return memory.device.type == "cuda" and memory.is_contiguous() and memory.dtype != torch.float64


def draw_runs(distribution: Distribution, stream: Stream, starts: NDArray[np.int64], out: torch.Tensor) -> None:
    """Runs of entries, as :func:`gainstage.apply.draw.draw_runs` draws them; rounded once where ``out`` has fewer bits.

    Args:
        distribution: of independent entries, or constant.
        stream: the parameter's random bits.
        starts: first entry of each run, ascending.
        out: [runs, length], on any device, of any strides.
    """
    if distribution.family is Family.CONSTANT:
        out.fill_(distribution.mean)
        return
    words = words_of_runs(stream, torch.from_numpy(starts).to(out.device), out.shape[1])
    out.copy_(_values(law_of(distribution, torch.float32), words))


def words_of_runs(stream: Stream, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Signed words of the entries ``start <= k < start + length``, for each start; int32 [runs, length]."""
    blocks = torch.arange(-(-(length + _PER_BLOCK - 1) // _PER_BLOCK), device=starts.device)
    words = _philox(stream.key, starts[:, None] // _PER_BLOCK + blocks)
    within = torch.arange(length, device=starts.device)
    return words.gather(1, starts[:, None] % _PER_BLOCK + within)


def _philox(key: int, counters: torch.Tensor) -> torch.Tensor:
    """The words of the blocks with these counters: int64 [runs, blocks] -> int32 [runs, 8 blocks]."""
    keys = [key % 2**64, key >> 64]
    nothing = torch.zeros_like(counters)
    block = (counters, nothing, nothing, nothing)
    for _ in range(ROUNDS):
        (high, low), (high_2, low_2) = (_product(block[place], by) for place, by in zip((0, 2), MULTIPLIERS, strict=True))
        block = (high_2 ^ block[1] ^ _signed(keys[0]), low_2, high ^ block[3] ^ _signed(keys[1]), low)
        keys = [(each + step) % 2**64 for each, step in zip(keys, KEY_STEPS, strict=True)]
    return torch.stack(block, -1).view(torch.int32).flatten(1)  # in memory, the low half of a word comes first


def _product(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a product of unsigned words that signed ones hold: from products of halves, which do not overflow."""
    low, high = x & _LOW, _upper(x)
    mixed, mixed_2 = low * (factor >> 32), high * (factor & _LOW)
    carried = _upper(low * (factor & _LOW)) + (mixed & _LOW) + (mixed_2 & _LOW)
    return high * (factor >> 32) + _upper(mixed) + _upper(mixed_2) + (carried >> 32), x * _signed(factor)


def _upper(x: torch.Tensor) -> torch.Tensor:
    return (x >> 32) & _LOW


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _values(law: Law, words: torch.Tensor) -> torch.Tensor:
    """float32, in the shape of the words."""
    values = _normal(words, law) if law.normal else words.float() * law.scale
    if law.limit < math.inf:
        values = values.clamp(-law.limit, law.limit)
    return values + law.mean if law.mean else values


def _normal(words: torch.Tensor, law: Law) -> torch.Tensor:
    """As :func:`gainstage.apply.normal.normal_32`."""
    centre, last, pairs = central_constants(2.0**-32 * law.width, law.scale)
    values = words.float()
    r = float(centre) - values * values
    fraction = r + float(pairs[-1, 1])
    for (a, _), (_, b) in itertools.pairwise(pairs[::-1]):
        fraction = torch.div(torch.tensor(a), fraction) + r + float(b)
    values = values * (torch.div(torch.tensor(pairs[0, 0]), fraction) + float(last))
    if law.width < 1:
        return values
    beyond = (r < 0).nonzero(as_tuple=True)
    values[beyond] = torch.copysign(_tail(words[beyond]), values[beyond]) * law.scale
    return values


def _tail(words: torch.Tensor) -> torch.Tensor:
    """``|z|`` of words beyond the centre."""
    constant, linear, square = (torch.from_numpy(table).to(words.device) for table in tail_table())
    mass = (2**31 - 1 - (words ^ (words >> 31))).float() + 0.5
    bits, shift = mass.view(torch.int32), 23 - TAIL_BITS
    position = (bits & ((1 << shift) - 1)).float()
    index = (bits >> shift) - first_segment()
    return (square[index] * position + linear[index]) * position + constant[index]
