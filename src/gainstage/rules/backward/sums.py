"""What several backward rules need: sums over dimensions, and zeros around a part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gainstage.signal import Value, affine, gaussian, join, mean_over, reshape
from gainstage.signal.axes import Axis, Dim
from gainstage.signal.copies import replace


def summed_over(g: Value, dims: Sequence[int]) -> Value:
    """Sum over dimensions, which stay with size 1; what cancels to less than the table resolves is nothing."""
    count = float(np.prod([g.shape[d] for d in dims]))
    gone = frozenset(axis for d in dims for axis in g.dims[d])
    found = affine(mean_over(g, list(gone)), count)
    if found.second_moment < 0.0:
        return zeros(found.dims)
    along = frozenset((name, axes) for name, axes in g.read if axes <= frozenset(found.axes))
    return replace(found, overlap=g.overlap, read=along) if along else found


def to_shape(g: Value, shape: Sequence[int]) -> Value:
    """Gradient of an operand of this shape that was broadcast: sums over what broadcasting added."""
    extra = len(g.dims) - len(shape)
    wide = (1,) * extra + tuple(shape)
    dims = [d for d, (have, want) in enumerate(zip(g.shape, wide, strict=True)) if want == 1 and have != 1]
    if dims:
        g = summed_over(g, dims)
    return reshape(g, shape) if extra else g


def zeros(dims: tuple[Dim, ...]) -> Value:
    """A gradient of nothing."""
    return gaussian(dims, 0.0, np.zeros((2,) * sum(len(dim) for dim in dims)))


def inside(g: Value, dim: int, start: int, size: int) -> Value:
    """Gradient of a tensor of which entries from ``start`` on along one dimension were taken: zero elsewhere."""
    dim %= len(g.dims)
    stop = start + g.shape[dim]

    def nothing(count: int) -> Value:
        return zeros(tuple((Axis(count),) * (count > 1) if d == dim else axes for d, axes in enumerate(g.dims)))

    parts = [nothing(start)] * (start > 0) + [g] + [nothing(size - stop)] * (size > stop)
    return join(parts, dim)
