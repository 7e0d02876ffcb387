"""Gradients of means, sums, pools and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gainstage.rules.backward.registry import BackwardCall, Gradient, backward
from gainstage.rules.backward.sums import to_shape
from gainstage.rules.linear import per_dim
from gainstage.rules.reduction import (
    adaptive_windows,
    averaging,
    interpolating,
    pooled_windows,
    repeating,
    windows_of_pool,
)
from gainstage.signal import (
    Value,
    affine,
    along_own,
    apply,
    combine,
    expand,
    filter_dim,
    largest_gradient,
    normalise_gradient,
    reshape,
    to_be_summed,
)

aten = torch.ops.aten


def spread_out(g: Value, x: Value, dims: Sequence[int] | None, keepdim: bool, scale: float) -> Value:
    """The same gradient for all entries that were summed."""
    chosen = [d % len(x.dims) for d in (dims or range(len(x.dims)))]
    if not keepdim:
        g = reshape(g, [1 if d in chosen else n for d, n in enumerate(x.shape)])
    return affine(expand(g, x.shape), scale)


def _count(x: Value, dims: Sequence[int] | None) -> float:
    return float(np.prod([x.shape[d] for d in (dims or range(len(x.dims)))]))


@backward(aten.mean.dim)
def mean(
    call: BackwardCall, g: Value, x: Value, dim: Sequence[int] | None, keepdim: bool = False, **kwargs: Any
) -> tuple[Gradient, ...]:
    """``g / n``."""
    return (spread_out(g, x, dim, keepdim, 1.0 / _count(x, dim)),)


@backward(aten.mean.default)
def mean_all(call: BackwardCall, g: Value, x: Value, **kwargs: Any) -> tuple[Gradient, ...]:
    """``g / n``."""
    return (spread_out(g, x, None, False, 1.0 / _count(x, None)),)


@backward(aten.sum.dim_IntList)
def summed(
    call: BackwardCall, g: Value, x: Value, dim: Sequence[int] | None, keepdim: bool = False, **kwargs: Any
) -> tuple[Gradient, ...]:
    """``g``."""
    return (spread_out(g, x, dim, keepdim, 1.0),)


@backward(aten.sum.default)
def summed_all(call: BackwardCall, g: Value, x: Value, **kwargs: Any) -> tuple[Gradient, ...]:
    """``g``."""
    return (spread_out(g, x, None, False, 1.0),)


@backward(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def average_pool(
    call: BackwardCall, g: Value, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> tuple[Gradient, ...]:  # fmt: skip
    """The transposed averages."""
    rank = len(list(kernel)) if len(list(kernel)) > 1 else len(x.dims) - 2
    kernels, strides, pads = per_dim(kernel, rank), per_dim(stride or kernel, rank), per_dim(padding, rank)
    for i in range(rank):
        d = len(x.dims) - rank + i
        g = filter_dim(g, d, averaging(x.shape[d], kernels[i], strides[i], pads[i], g.shape[d], count_include_pad).T)
    return (g,)


@backward(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
def adaptive_average_pool(call: BackwardCall, g: Value, x: Value, output_size: Any) -> tuple[Gradient, ...]:
    """The transposed averages."""
    for d in range(len(x.dims)):
        size, outputs = x.shape[d], g.shape[d]
        if outputs != size:
            g = filter_dim(g, d, adaptive_windows(size, outputs).T)
    return (g,)


@backward(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    call: BackwardCall, g: Value, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Gradient, ...]:  # fmt: skip
    """Each output's gradient to the largest entry of its window: ``E[g^2] outputs / inputs``, mostly where x is large.

    Windows that overlap may share their largest entry, where what they send adds up.
    """
    return (largest_gradient(g, x, *pooled_windows(x, call.shape, kernel, stride, padding, dilation)),)


@backward(
    aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default,
    aten.max_pool1d_with_indices.default, aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default,
)  # fmt: skip
def max_pool_and_places(call: BackwardCall, g: tuple[Gradient, ...], x: Value, *args: Any) -> tuple[Gradient, ...]:
    """As :func:`max_pool`; nothing flows through places."""
    assert g[0] is not None
    return (largest_gradient(g[0], x, *windows_of_pool(call.op, x, call.shape, *args)),)


@backward(aten.max.dim)
def largest_and_place(
    call: BackwardCall, g: tuple[Gradient, ...], x: Value, dim: int, keepdim: bool = False
) -> tuple[Gradient, ...]:
    """As :func:`largest`."""
    assert g[0] is not None
    return largest(call, g[0], x, [dim], keepdim)


@backward(aten.amax.default)
def largest(call: BackwardCall, g: Value, x: Value, dim: Sequence[int] = (), keepdim: bool = False) -> tuple[Gradient, ...]:
    """As :func:`max_pool`, of one window."""
    chosen = sorted(d % len(x.dims) for d in (dim or range(len(x.dims))))
    g = reshape(g, [1 if d in chosen else n for d, n in enumerate(x.shape)])
    return (largest_gradient(g, x, chosen, [np.arange(x.shape[d])[None, :] for d in chosen]),)


def _affine_part(
    g: Value, xhat: Value, weight: Value | None, bias: Value | None, shape: Sequence[int]
) -> tuple[Gradient, Gradient]:
    """Gradients of the norm's scale, ``sum g xhat``, and of its shift, ``sum g``."""
    kept = [*[1] * (len(g.dims) - len(shape)), *shape]
    axes = [axis for dim, size in zip(g.dims, kept, strict=True) if size == 1 for axis in dim]
    to_weight = None if weight is None else reshape(to_shape(along_own(g, xhat, axes), shape), weight.shape)
    to_bias = None if bias is None else reshape(to_shape(to_be_summed(g, axes), shape), bias.shape)
    return to_weight, to_bias


def _through(
    g: Value, x: Value, dims: Sequence[int], eps: float, weight: Value | None, bias: Value | None, shape: Sequence[int],
    *, centre: bool = True,
) -> tuple[Gradient, Gradient, Gradient]:  # fmt: skip
    inner = g if weight is None else combine(torch.mul, g, reshape(weight, shape))
    to_x, xhat = normalise_gradient(inner, x, dims, eps, centre=centre)
    return to_x, *_affine_part(g, xhat, weight, bias, shape)


@backward(aten.layer_norm.default)
def layer_norm(
    call: BackwardCall, g: Value, x: Value, shape: Sequence[int], weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, cudnn_enable: bool = False,
) -> tuple[Gradient, ...]:  # fmt: skip
    """Divided by the deviation of the input; its mean and its part along the output go."""
    dims = range(len(x.dims) - len(shape), len(x.dims))
    to_x, to_weight, to_bias = _through(g, x, dims, eps, weight, bias, shape)
    return to_x, None, to_weight, to_bias


@backward(aten.rms_norm.default)
def rms_norm(
    call: BackwardCall, g: Value, x: Value, shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> tuple[Gradient, ...]:
    """As layer norm, the mean left in place."""
    dims = range(len(x.dims) - len(shape), len(x.dims))
    to_x, to_weight, _ = _through(g, x, dims, eps or 1.2e-7, weight, None, shape, centre=False)
    return to_x, None, to_weight


@backward(aten.batch_norm.default)
def batch_norm(
    call: BackwardCall, g: Value, x: Value, weight: Value | None, bias: Value | None, running_mean: Value | None,
    running_var: Value | None, training: bool, momentum: float, eps: float, cudnn_enabled: bool = False,
) -> tuple[Gradient, ...]:  # fmt: skip
    """In training: as layer norm, over samples and positions. In evaluation: times a constant."""
    shape = [x.shape[1] if d == 1 else 1 for d in range(len(x.dims))]
    if training or running_mean is None or running_var is None:
        dims = [d for d in range(len(x.dims)) if d != 1]
        return _through(g, x, dims, eps, weight, bias, shape)
    factor = apply(lambda t: (t + eps).rsqrt(), reshape(running_var, shape))
    xhat = combine(torch.mul, combine(torch.sub, x, reshape(running_mean, shape)), factor)
    inner = g if weight is None else combine(torch.mul, g, reshape(weight, shape))
    return combine(torch.mul, inner, factor), *_affine_part(g, xhat, weight, bias, shape)


@backward(aten.group_norm.default)
def group_norm(
    call: BackwardCall, g: Value, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, cudnn_enabled: bool = True,
) -> tuple[Gradient, ...]:  # fmt: skip
    """As layer norm, over the channels of a group and all positions."""
    shape = [x.shape[1] if d == 1 else 1 for d in range(len(x.dims))]
    inner = g if weight is None else combine(torch.mul, g, reshape(weight, shape))
    split = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    to_x, xhat = normalise_gradient(reshape(inner, split), reshape(x, split), range(2, len(split)), eps)
    to_weight, to_bias = _affine_part(g, reshape(xhat, x.shape), weight, bias, shape)
    return reshape(to_x, x.shape), None, to_weight, to_bias


@backward(aten.instance_norm.default)
def instance_norm(
    call: BackwardCall, g: Value, x: Value, weight: Value | None, bias: Value | None, running_mean: Value | None,
    running_var: Value | None, use_input_stats: bool, momentum: float, eps: float, cudnn_enabled: bool = False,
) -> tuple[Gradient, ...]:  # fmt: skip
    """As layer norm, over the positions of each sample and channel."""
    shape = [x.shape[1] if d == 1 else 1 for d in range(len(x.dims))]
    return _through(g, x, range(2, len(x.dims)), eps, weight, bias, shape)


@backward(aten.linalg_vector_norm.default)
def vector_norm(
    call: BackwardCall, g: Value, x: Value, order: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False,
    dtype: object = None,
) -> tuple[Gradient, ...]:  # fmt: skip
    """``g x / |x|``."""
    if order != 2:
        raise NotImplementedError("gradient of a norm that is not Euclidean")
    ratio = combine(torch.div, g, call.output)
    return (combine(torch.mul, spread_out(ratio, x, dim, keepdim, 1.0), x),)


@backward(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
def upsample_nearest(call: BackwardCall, g: Value, x: Value, *args: Any) -> tuple[Gradient, ...]:
    """Sum over the copies."""
    for d in range(2, len(x.dims)):
        if x.shape[d] != g.shape[d]:
            g = filter_dim(g, d, repeating(x.shape[d], g.shape[d]).T)
    return (g,)


@backward(
    aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec, aten.upsample_linear1d.vec, aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
)  # fmt: skip
def upsample_smooth(
    call: BackwardCall, g: Value, x: Value, output_size: Any, align_corners: bool, scale_factors: Any = None
) -> tuple[Gradient, ...]:
    """The transposed interpolation."""
    for d in range(2, len(x.dims)):
        if x.shape[d] != g.shape[d]:
            g = filter_dim(g, d, interpolating(x.shape[d], g.shape[d], str(call.op), align_corners=align_corners).T)
    return (g,)


@backward(aten.cumsum.default)
def cumulative_sum(call: BackwardCall, g: Value, x: Value, dim: int, *, dtype: object = None) -> tuple[Gradient, ...]:
    """Sum over all later entries."""
    size = x.shape[dim]
    return (filter_dim(g, dim % len(x.dims), np.triu(np.ones((size, size)))),)
