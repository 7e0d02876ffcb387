"""Runs of entries, by NumPy: the values of a law, computed step by step over pieces of a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.apply.law import Law
from gainstage.apply.normal import normal_32, normal_64
from gainstage.apply.stream import Stream

# Entries whose bits are drawn at once: so many that the calls for the few in the tails do not count, and few enough for a core's
# share of the cache.
_PIECE = 2**19

# The same before they are rounded: the rounded ones lie in the cache, too.
_ROUNDED_PIECE = 2**18

# Entries per conversion: below torch's limit for going parallel, as the caller's threads are parallel.
CONVERSION = 2**15


def fill_runs(law: Law, stream: Stream, starts: NDArray[np.int64], out: NDArray[Any]) -> None:
    """Runs of entries. For each start as many as ``out`` has columns.

    Args:
        law: of every entry.
        stream: the parameter's random bits.
        starts: first entry of each run, ascending.
        out: [runs, length], contiguous; values of 16 bits as integers.
    """
    room = np.empty(min(_ROUNDED_PIECE, out.size), np.float32) if law.is_rounded else None
    for rows, columns in pieces(out.shape, _PIECE if room is None else _ROUNDED_PIECE):
        entries = out[rows, columns].reshape(-1)  # a view: one row, or rows as a whole
        words = stream.runs_of_bits(starts[rows] + columns.start, out[rows, columns].shape[1], law.bits)
        values = entries if room is None else room[: entries.size]
        _fill(law, words.reshape(-1).view(f"i{law.bits // 8}"), values)
        if room is not None:
            rounded, exact = torch.from_numpy(entries).view(law.dtype), torch.from_numpy(values)
            for start in range(0, entries.size, CONVERSION):
                rounded[start : start + CONVERSION].copy_(exact[start : start + CONVERSION])


def pieces(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix: whole rows, or parts of one row, of at most ``limit`` entries."""
    rows, columns = shape
    at_once = max(1, limit // max(1, columns))
    for row in range(0, rows, at_once):
        for column in range(0, columns, limit):
            yield slice(row, row + at_once), slice(column, column + limit)


def _fill(law: Law, words: NDArray[Any], out: NDArray[Any]) -> None:
    number = out.dtype.type
    if not law.normal:
        np.copyto(out, words, casting="unsafe")
        out *= number(law.scale)
    elif number is np.float32:
        normal_32(words, law.scale, out, law.width)
    else:
        np.multiply(normal_64(words, law.width), law.scale, out=out)
    if law.limit < np.inf:
        np.clip(out, -law.limit, law.limit, out=out)
    if law.mean:
        out += number(law.mean)
