"""Counter-based random bits: a function of seed, parameter name and element index, and of nothing else.

Every parameter has a stream of its own, Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
under a key hashed from the seed and the name. Word ``w`` of the stream is word ``w % 4`` of the block with counter
``w // 4``, so any range can be computed alone: on another thread, another rank, in another order.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Hashed into every key. Whatever changes the value of an element for a given seed must change this number.
STREAM_VERSION = 1

# Of Philox4x64-10, for whoever computes it without NumPy (section 3.3 and table 2).
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
ROUNDS = 10

_WORDS_PER_BLOCK = 4
_COUNTERS = 2**256

# A gap between two runs is drawn and dropped when it is shorter than this: a call for the second run takes longer (8 us).
_GAP = 2**12

# Elements drawn at once for runs with gaps between them.
_SPAN = 2**18


@dataclass(frozen=True, slots=True)
class Stream:
    """The random bits of one parameter.

    Args:
        key: 128 bits, the Philox key; see :func:`stream_of`.
    """

    key: int

    def uniform_bits(self, start: int, stop: int, bits: int = 32) -> NDArray[Any]:
        """Uniform integers of the elements ``start <= k < stop``.

        Args:
            start: first element, counted from 0.
            stop: one past the last element.
            bits: 64, one word of the stream per element, or 32, two elements per word, the low half first.

        Returns:
            unsigned integers of that many bits, one for each element.
        """
        assert 0 <= start <= stop
        assert bits in {32, 64}
        per_block = _WORDS_PER_BLOCK * 64 // bits
        block = start // per_block
        count = -(-stop // per_block) - block
        # NumPy steps the counter before it computes a block, so that its first block is that of the next counter.
        generator = np.random.Philox(key=self.key, counter=(block - 1) % _COUNTERS)
        words = generator.random_raw(count * _WORDS_PER_BLOCK)
        numbers = words.astype("<u8", copy=False).view(f"<u{bits // 8}")  # in memory, the low half of a word comes first
        offset = block * per_block
        return numbers[start - offset : stop - offset].astype(f"u{bits // 8}", copy=False)

    def runs_of_bits(self, starts: NDArray[np.int64], length: int, bits: int = 32) -> NDArray[Any]:
        """Uniform integers of the elements ``start <= k < start + length``, for each start.

        Args:
            starts: ascending, at least ``length`` apart.
            length: of every run.
            bits: as for :meth:`uniform_bits`.

        Returns:
            [runs, length].
        """
        if starts.size == 1:
            return self.uniform_bits(int(starts[0]), int(starts[0]) + length, bits)[np.newaxis]
        out = np.empty((starts.size, length), f"u{bits // 8}")
        breaks = np.flatnonzero(np.diff(starts) > length + _GAP) + 1
        for begin, end in itertools.pairwise([0, *breaks.tolist(), starts.size]):
            row = begin
            while row < end:
                first = int(starts[row])
                stop = max(row + 1, int(np.searchsorted(starts[row:end], first + _SPAN - length, "right")) + row)
                drawn = self.uniform_bits(first, int(starts[stop - 1]) + length, bits)
                windows = np.lib.stride_tricks.sliding_window_view(drawn, length)
                step = int(starts[min(row + 1, stop - 1)]) - first
                regular = bool((np.diff(starts[row:stop]) == step).all())
                out[row:stop] = windows[:: max(1, step)] if regular else windows[starts[row:stop] - first]
                row = stop
        return out


def stream_of(seed: int, name: str) -> Stream:
    """The stream of a parameter.

    Args:
        seed: any integer.
        name: canonical name of the parameter.
    """
    label = f"gainstage {STREAM_VERSION}\0{seed}\0{name}".encode("utf-8", "surrogatepass")
    return Stream(int.from_bytes(hashlib.blake2b(label, digest_size=16).digest(), "little"))
