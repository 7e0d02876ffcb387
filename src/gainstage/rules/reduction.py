"""Means, sums, pooling, softmax."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from gainstage.rules.linear import per_dim, windows
from gainstage.rules.registry import Call, rule
from gainstage.signal import Value, affine, apply, filter_dim, known, max_over, mean_over, normalise, reshape, softmax
from gainstage.signal.alike import averaged
from gainstage.signal.contraction import Places
from gainstage.signal.copies import replace
from gainstage.signal.sampling import draw

aten = torch.ops.aten


def average(x: Value, dims: Sequence[int] | None, keepdim: bool) -> Value:
    """Mean over dimensions."""
    chosen = [d % len(x.dims) for d in (dims or range(len(x.dims)))]
    y = mean_over(x, [axis for d in chosen for axis in x.dims[d]])
    return y if keepdim else reshape(y, [n for d, n in enumerate(y.shape) if d not in chosen])


def total(x: Value, dims: Sequence[int] | None, keepdim: bool) -> Value:
    """Sum over dimensions."""
    chosen = [d % len(x.dims) for d in (dims or range(len(x.dims)))]
    return affine(average(x, chosen, keepdim), float(prod(x.shape[d] for d in chosen)))


@rule(aten.mean.dim)
def mean(call: Call, x: Value, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: object = None) -> Value:
    """``K[0] + (K[1] - K[0]) / n`` along each axis."""
    return average(x, dim, keepdim)


@rule(aten.mean.default)
def mean_all(call: Call, x: Value, *, dtype: object = None) -> Value:
    """Mean of all entries."""
    return average(x, None, False)


@rule(aten.sum.dim_IntList)
def summed(call: Call, x: Value, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: object = None) -> Value:
    """``n`` times the mean."""
    return total(x, dim, keepdim)


@rule(aten.sum.default)
def summed_all(call: Call, x: Value, *, dtype: object = None) -> Value:
    """Sum of all entries."""
    return total(x, None, False)


@rule(aten.var.correction)
def variance(call: Call, x: Value, dim: Any = None, *, correction: float | None = 1, keepdim: bool = False) -> Value:
    """Mean square of what is left when the mean over the dimensions is taken off, times ``n / (n - correction)``."""
    chosen = [d % len(x.dims) for d in (dim or range(len(x.dims)))]
    axes = [axis for d in chosen for axis in x.dims[d]]
    count = prod(axis.size for axis in axes)
    centred = normalise(x, axes, 0.0)
    level = x.second_moment - float(averaged(x.table, [x.axes.index(axis) for axis in axes], axes)[(-1,) * x.table.ndim])
    square = average(apply(torch.square, centred), chosen, keepdim)
    if square.statistic is not None:  # one of x as well, and of all that is linear in x, such as what is left without the mean
        of = square.statistic.of | x.names
        square = replace(square, statistic=replace(square.statistic, of=of))
    return affine(square, max(level, 0.0) * count / max(count - (1 if correction is None else correction), 1e-300))


@rule(aten.var.dim)
def variance_unbiased(call: Call, x: Value, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Value:
    """As :func:`variance`."""
    found: Value = variance(call, x, dim, correction=int(unbiased), keepdim=keepdim)
    return found


@rule(aten.std.correction)
def deviation(call: Call, x: Value, dim: Any = None, *, correction: float | None = 1, keepdim: bool = False) -> Value:
    """Square root of the variance."""
    return apply(torch.sqrt, variance(call, x, dim, correction=correction, keepdim=keepdim))


@rule(aten.std.dim)
def deviation_unbiased(call: Call, x: Value, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Value:
    """As :func:`deviation`."""
    found: Value = deviation(call, x, dim, correction=int(unbiased), keepdim=keepdim)
    return found


@rule(aten.softmax.int, aten._softmax.default)
def softmax_rule(call: Call, x: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    """See :mod:`gainstage.signal.attention`."""
    return softmax(x, dim)


def averaging(size: int, kernel: int, stride: int, padding: int, outputs: int, include_pad: bool) -> np.ndarray[Any, Any]:
    """Coefficients [outputs, size] of an average pool along one dimension."""
    starts = stride * np.arange(outputs)[:, None] - padding
    place = np.arange(size)[None, :]
    inside = ((place >= starts) & (place < starts + kernel)).astype(float)
    divisor = np.minimum(starts + kernel, size + padding) - starts if include_pad else inside.sum(1, keepdims=True)
    return np.asarray(inside / divisor)


@rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def average_pool(
    call: Call, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    """Average over windows."""
    rank = len(list(kernel)) if len(list(kernel)) > 1 else len(x.dims) - 2
    kernels, strides, pads = per_dim(kernel, rank), per_dim(stride or kernel, rank), per_dim(padding, rank)
    for i in range(rank):
        d = len(x.dims) - rank + i
        matrix = averaging(x.shape[d], kernels[i], strides[i], pads[i], call.shape[d], count_include_pad)
        x = filter_dim(x, d, matrix)
    return x


@rule(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
def adaptive_average_pool(call: Call, x: Value, output_size: Any) -> Value:
    """Average over windows that tile the map."""
    for d in range(2 if len(call.shape) > len(list(output_size)) + 1 else 1, len(x.dims)):
        size, outputs = x.shape[d], call.shape[d]
        if outputs == 1:
            x = mean_over(x, x.dims[d])
        elif outputs != size:
            x = filter_dim(x, d, adaptive_windows(size, outputs))
    return x


def adaptive_windows(size: int, outputs: int) -> np.ndarray[Any, Any]:
    """Coefficients [outputs, size] of adaptive average pooling along one dimension."""
    inside = (adaptive_places(size, outputs)[:, :, None] == np.arange(size)).any(1).astype(float)
    return np.asarray(inside / inside.sum(1, keepdims=True))


def adaptive_places(size: int, outputs: int) -> Places:
    """Places [outputs, taps] that windows hold which tile a dimension; -1 where a window holds fewer than others."""
    p = np.arange(outputs)[:, None]
    starts, ends = p * size // outputs, -(-(p + 1) * size // outputs)
    place = starts + np.arange((ends - starts).max())[None, :]
    return np.where(place < ends, place, -1)


@rule(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    call: Call, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Value:
    """Largest entry of each window."""
    return max_over(x, *pooled_windows(x, call.shape, kernel, stride, padding, dilation))


@rule(
    aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default,
    aten.max_pool1d_with_indices.default, aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default,
)  # fmt: skip
def max_pool_and_places(call: Call, x: Value, *args: Any) -> tuple[Value, Value]:
    """Largest entry of each window, and where it is: one realisation of that."""
    op: Any = call.op
    (sample,) = draw([x], np.random.default_rng(x.shape))
    return max_over(x, *windows_of_pool(op, x, call.shape, *args)), known(op(sample, *args)[1])


def windows_of_pool(
    op: object, x: Value, shape: Sequence[int], size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[range, list[Places]]:  # fmt: skip
    """As :func:`pooled_windows`, also for as many windows as an adaptive pool is told to have."""
    if "adaptive" not in str(op):
        return pooled_windows(x, shape, size, stride, padding, dilation)
    dims = range(len(x.dims) - len(list(size)), len(x.dims))
    return dims, [adaptive_places(x.shape[d], shape[d]) for d in dims]


def pooled_windows(
    x: Value, shape: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[range, list[Places]]:
    """The dimensions of x that a pool of this result's shape runs along, and its windows along each."""
    rank = len(x.dims) - (2 if len(x.dims) > len(list(kernel)) + 1 else 1)
    each = zip(
        x.shape[-rank:], per_dim(kernel, rank), per_dim(stride or kernel, rank), per_dim(padding, rank), per_dim(dilation, rank),
        shape[-rank:], strict=True,
    )  # fmt: skip
    return range(len(x.dims) - rank, len(x.dims)), [windows(*args) for args in each]


@rule(aten.amax.default)
def largest(call: Call, x: Value, dim: Sequence[int] = (), keepdim: bool = False) -> Value:
    """Largest entry along some dimensions."""
    chosen = sorted(d % len(x.dims) for d in (dim or range(len(x.dims))))
    return reshape(max_over(x, chosen, [np.arange(x.shape[d])[None, :] for d in chosen]), call.shape)


@rule(aten.amin.default)
def smallest(call: Call, x: Value, dim: Sequence[int] = (), keepdim: bool = False) -> Value:
    """``-max(-x)``."""
    found: Value = largest(call, affine(x, -1.0), dim, keepdim)
    return affine(found, -1.0)


@rule(aten.max.dim, aten.min.dim)
def largest_and_place(call: Call, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    """As :func:`largest` or :func:`smallest`, and where it is: one realisation of that."""
    op: Any = call.op
    extreme = largest if op is aten.max.dim else smallest
    (sample,) = draw([x], np.random.default_rng(x.shape))
    return extreme(call, x, [dim], keepdim), known(op(sample, dim, keepdim)[1])


@rule(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
def upsample_nearest(call: Call, x: Value, output_size: Any = None, scale_factors: Any = None) -> Value:
    """Each entry repeated."""
    for d in range(2, len(x.dims)):
        size, outputs = x.shape[d], call.shape[d]
        if size != outputs:
            x = filter_dim(x, d, repeating(size, outputs))
    return x


def repeating(size: int, outputs: int) -> np.ndarray[Any, Any]:
    """Coefficients [outputs, size] of nearest-neighbour interpolation along one dimension."""
    return np.asarray(np.eye(size)[np.minimum(np.arange(outputs) * size // outputs, size - 1)])


@rule(
    aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec, aten.upsample_linear1d.vec, aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
)  # fmt: skip
def upsample_smooth(call: Call, x: Value, output_size: Any, align_corners: bool, scale_factors: Any = None) -> Value:
    """Separable interpolation, with the coefficients of the op itself."""
    for d in range(2, len(x.dims)):
        size, outputs = x.shape[d], call.shape[d]
        if size != outputs:
            x = filter_dim(x, d, interpolating(size, outputs, str(call.op), align_corners=align_corners))
    return x


def interpolating(size: int, outputs: int, op: str, *, align_corners: bool) -> np.ndarray[Any, Any]:
    """Coefficients [outputs, size] of smooth interpolation along one dimension, read off the op of this name itself."""
    image = torch.eye(size, dtype=torch.float64).reshape(1, size, size, 1).expand(1, size, size, 2).contiguous()
    scaled = torch.nn.functional.interpolate(
        image, (outputs, 2), mode="bicubic" if "cubic" in op else "bilinear", align_corners=align_corners,
        antialias="_aa" in op,
    )  # fmt: skip
    return np.asarray(scaled[0, :, :, 0].T.contiguous().numpy())


@rule(aten.cumsum.default)
def cumulative_sum(call: Call, x: Value, dim: int, *, dtype: object = None) -> Value:
    """Lower-triangular sum along a dimension."""
    size = x.shape[dim]
    return filter_dim(x, dim % len(x.dims), np.tril(np.ones((size, size))))
