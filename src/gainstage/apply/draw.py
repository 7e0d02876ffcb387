"""Values of the families: entry by entry for any range of elements, or as a whole matrix for the orthogonal ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.apply.compiled import fill_for
from gainstage.apply.law import law_of
from gainstage.apply.stream import Stream
from gainstage.plan import Distribution, Family, Mixing


def draw_range(
    distribution: Distribution, stream: Stream, start: int, stop: int, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Entries ``start <= k < stop`` of a parameter, in its row-major order.

    The result is the same slice of what a call for the whole parameter returns. In single precision an entry takes 32 random
    bits, in double precision 64, so the two differ beyond rounding. Half-precision parameters are the
    single-precision values, rounded.

    Args:
        distribution: any family whose entries are independent, or constant.
        stream: the parameter's random bits.
        start: first entry.
        stop: one past the last entry.
        out: where to put them, contiguous float32 or float64; a new float32 array by default.

    Returns:
        ``out``.
    """
    assert not distribution.family.is_matrix
    assert distribution.mixing is None
    assert distribution.family is not Family.KEEP
    if out is None:
        out = np.empty(stop - start, np.float32)
    draw_runs(distribution, stream, np.array([start]), torch.from_numpy(out).view(1, -1))
    return out


def draw_runs(distribution: Distribution, stream: Stream, starts: NDArray[np.int64], out: torch.Tensor) -> None:
    """Runs of entries: rows and columns of a shard. For each start as many as ``out`` has columns.

    Args:
        distribution: as for :func:`draw_range`.
        stream: the parameter's random bits.
        starts: first entry of each run, ascending.
        out: [runs, length], contiguous, of a type that values are drawn in.
    """
    if distribution.family is Family.CONSTANT:
        value = torch.tensor([distribution.mean], dtype=torch.float64)
        _memory(out).fill(_memory(value if out.dtype == torch.float64 else value.float().to(out.dtype))[0])
        return
    law = law_of(distribution, out.dtype)
    fill_for(law, out.numel())(law, stream, starts, _memory(out))


def _memory(values: torch.Tensor) -> NDArray[Any]:
    """NumPy does not know every type of 16 bits; torch's own loops would start more threads."""
    memory: NDArray[Any] = (values.view(torch.uint16) if values.dtype.itemsize == 2 else values).numpy()
    return memory


def draw_matrix(distribution: Distribution, normals: torch.Tensor, output_dims: Sequence[int]) -> torch.Tensor:
    """A matrix with orthonormal rows or columns, scaled; uniform (Haar) among all such matrices.

    QR of a Gaussian matrix, with the signs of R's diagonal moved into Q (F. Mezzadri 2007, arXiv:math-ph/0609050, section 5). In
    the centre tap of a kernel only for the delta-orthogonal family (L. Xiao et al. 2018, arXiv:1806.05393, section 3).

    Args:
        distribution: an orthogonal family; ``std**2`` is the mean over the squares of all entries.
        normals: standard normal values in the shape of the result.
        output_dims: dimensions of the result that form the rows of the matrix.

    Returns:
        float64 tensor in the shape of ``normals``.
    """
    gaussian: torch.Tensor = normals.double()
    centre: tuple[Any, ...] = ()
    if distribution.family is Family.DELTA_ORTHOGONAL:
        centre = (..., *(size // 2 for size in normals.shape[2:]))
        gaussian = gaussian[centre]
    order = [*output_dims, *(dim for dim in range(gaussian.dim()) if dim not in output_dims)]
    permuted = gaussian.permute(order)
    rows = math.prod(permuted.shape[: len(output_dims)])
    matrix = permuted.reshape(rows, -1)
    columns = matrix.shape[1]
    q, r = torch.linalg.qr(matrix if rows >= columns else matrix.T)
    q *= torch.where(r.diagonal() < 0, -1.0, 1.0)
    # Unit columns of length max(rows, columns): the mean square of an entry of q is one over that.
    q *= distribution.std * math.sqrt(max(rows, columns))
    entries: torch.Tensor = (
        (q if rows >= columns else q.T).reshape(permuted.shape).permute(*(order.index(dim) for dim in range(len(order))))
    )
    if not centre:
        return entries
    kernel = torch.zeros_like(normals, dtype=torch.float64)
    kernel[centre] = entries * math.sqrt(math.prod(normals.shape[2:]))
    return kernel


_UNIT_ROWS = Distribution(family=Family.ORTHOGONAL, std=1.0)


def draw_mixed(mixing: Mixing, stream: Stream, bounds: tuple[int, int], outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``bounds`` of ``q M``, float64 [rows, columns].

    The q are drawn in whole blocks of ``rank`` rows, each from its own range of the stream, so that a row does not hang on which
    others are drawn with it. 4/3 rank^3 operations for a block, 2 rank columns for a row.

    Args:
        mixing: rank and matrix.
        stream: of the parameter that ``mixing`` names.
        bounds: first row, and one past the last.
        outputs: rows of the whole parameter.
        dtype: in which the random numbers are drawn, float32 or float64.
    """
    rank, first = mixing.rank, bounds[0]
    number = np.float64 if dtype == torch.float64 else np.float32
    drawn = torch.empty(bounds[1] - first, mixing.columns, dtype=torch.float64)
    matrix = torch.from_numpy(mixing.matrix.copy())
    for start in range(first - first % rank, bounds[1], rank):
        stop = min(start + rank, outputs)
        normals = np.empty((stop - start) * rank, number)
        draw_range(Distribution(family=Family.NORMAL, std=1.0), stream, start * rank, stop * rank, normals)
        block = draw_matrix(_UNIT_ROWS, torch.from_numpy(normals).view(stop - start, rank), (0,)) @ matrix
        low, high = max(start, first), min(stop, bounds[1])
        drawn[low - first : high - first] = block[low - start : high - start]
    return drawn
