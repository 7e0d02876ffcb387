"""Weights that are not drawn entry by entry: orthogonal rows, mixed by a known matrix."""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gainstage.errors import InputError

_BYTES = 8  # of a double


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """``w = std q M``: q [rank] is a row of a matrix drawn for ``stream``, M [rank, columns] is known.

    The matrix has as many rows as the parameter has outputs. Every ``rank`` of them are orthogonal, of length sqrt(rank), uniform
    among all such matrices; the next are drawn anew. Two parameters with one stream have the same rows q: a bias can take off
    what the weight makes of the mean.

    Args:
        stream: name of the parameter whose random numbers these are.
        rank: rows of M.
        columns: entries of the parameter for each of its outputs.
        data: M row by row, little-endian doubles; the squares of its entries sum to ``columns``.

    Raises:
        InputError: data of another length, not finite, or not of that size.
    """

    stream: str
    rank: int
    columns: int
    data: bytes

    def __post_init__(self) -> None:
        """Refuse what is no such matrix."""
        if min(self.rank, self.columns) < 1 or len(self.data) != _BYTES * self.rank * self.columns:
            raise InputError(f"{len(self.data)} bytes are not those of a matrix [{self.rank}, {self.columns}] of doubles")
        size = float(np.square(self.matrix).sum())
        if not math.isfinite(size) or abs(size / self.columns - 1.0) > 1e-9:
            raise InputError(f"the squares of a mixing matrix sum to {size}, not to its {self.columns} columns")

    @classmethod
    def by(cls, stream: str, matrix: NDArray[np.float64]) -> tuple[Mixing, float]:
        """For a matrix of any size, and the factor that ``std`` takes over from it."""
        rank, columns = matrix.shape
        factor = float(np.square(matrix).sum() / columns) ** 0.5
        return cls(stream=stream, rank=rank, columns=columns, data=(matrix / factor).astype("<f8").tobytes()), factor

    @property
    def matrix(self) -> NDArray[np.float64]:
        """M."""
        return np.frombuffer(self.data, "<f8").reshape(self.rank, self.columns)

    @property
    def text(self) -> str:
        """The data as plans and scripts have them: base64."""
        return base64.b64encode(self.data).decode("ascii")

    @classmethod
    def of_text(cls, text: str, *, stream: str, rank: int, columns: int) -> Mixing:
        """Back from :attr:`text`.

        Raises:
            InputError: not base64, or as above.
        """
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"the matrix is no base64: {error}") from error
        return cls(stream=stream, rank=rank, columns=columns, data=data)
