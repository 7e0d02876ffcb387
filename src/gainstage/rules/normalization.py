"""Normalization layers: one function over different axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from gainstage.rules.reduction import total
from gainstage.rules.registry import Call, rule
from gainstage.signal import Value, affine, apply, combine, normalise, reshape
from gainstage.signal.copies import replace

aten = torch.ops.aten


def _scaled(y: Value, weight: Value | None, bias: Value | None, shape: Sequence[int]) -> Value:
    for function, operand, idle in ((torch.mul, weight, 1.0), (torch.add, bias, 0.0)):
        if operand is None:
            continue
        if operand.mean == idle and operand.variance == 0.0:
            y = replace(y, lineage=y.lineage | operand.lineage)
        else:
            y = combine(function, y, reshape(operand, shape))
    return y


@rule(aten.layer_norm.default)
def layer_norm(
    call: Call, x: Value, shape: Sequence[int], weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5,
    cudnn_enable: bool = False,
) -> Value:  # fmt: skip
    """Over the last dimensions: subtracts what the channels of one position share."""
    axes = [axis for dim in x.dims[len(x.dims) - len(shape) :] for axis in dim]
    return _scaled(normalise(x, axes, eps), weight, bias, shape)


@rule(aten.rms_norm.default)
def rms_norm(call: Call, x: Value, shape: Sequence[int], weight: Value | None = None, eps: float | None = None) -> Value:
    """As layer norm, the mean left in place."""
    axes = [axis for dim in x.dims[len(x.dims) - len(shape) :] for axis in dim]
    return _scaled(normalise(x, axes, eps or 1.2e-7, centre=False), weight, None, shape)


@rule(aten.batch_norm.default)
def batch_norm(
    call: Call, x: Value, weight: Value | None, bias: Value | None, running_mean: Value | None, running_var: Value | None,
    training: bool, momentum: float, eps: float, cudnn_enabled: bool = False,
) -> Value:  # fmt: skip
    """In training over batch and positions of each channel; else by the running statistics."""
    shape = [x.shape[1] if d == 1 else 1 for d in range(len(x.dims))]
    if training or running_mean is None or running_var is None:
        axes = [axis for d, dim in enumerate(x.dims) for axis in dim if d != 1]
        return _scaled(normalise(x, axes, eps, over_places=True), weight, bias, shape)
    centred = combine(torch.sub, x, reshape(running_mean, shape))
    factor = apply(lambda t: (t + eps).rsqrt(), reshape(running_var, shape))
    return _scaled(combine(torch.mul, centred, factor), weight, bias, shape)


@rule(aten.group_norm.default)
def group_norm(
    call: Call, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:  # fmt: skip
    """Over the channels of a group and all positions."""
    split = reshape(x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    axes = [axis for dim in split.dims[2:] for axis in dim]
    y = reshape(normalise(split, axes, eps), x.shape)
    return _scaled(y, weight, bias, [x.shape[1] if d == 1 else 1 for d in range(len(x.dims))])


@rule(aten.instance_norm.default)
def instance_norm(
    call: Call, x: Value, weight: Value | None, bias: Value | None, running_mean: Value | None, running_var: Value | None,
    use_input_stats: bool, momentum: float, eps: float, cudnn_enabled: bool = False,
) -> Value:  # fmt: skip
    """Over the positions of each sample and channel."""
    axes = [axis for dim in x.dims[2:] for axis in dim]
    return _scaled(normalise(x, axes, eps), weight, bias, [x.shape[1] if d == 1 else 1 for d in range(len(x.dims))])


@rule(aten._weight_norm.default)
def weight_norm(call: Call, v: Value, g: Value, dim: int = 0) -> Value:
    """``g v / |v|``, the norm over all dimensions but one."""
    reduced = [d for d in range(len(v.dims)) if d != dim % len(v.dims)]
    axes = [axis for d in reduced for axis in v.dims[d]]
    root = prod(v.shape[d] for d in reduced) ** 0.5
    return combine(torch.mul, affine(normalise(v, axes, 0.0, centre=False), 1.0 / root), g)


@rule(aten.linalg_vector_norm.default)
def vector_norm(
    call: Call, x: Value, order: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: object = None
) -> Value:
    """``(sum |x|^p)^(1/p)``: a statistic of x that hardly fluctuates."""
    powered = apply(lambda t: t.abs() ** order, x)
    summed = total(powered, dim, keepdim)
    return apply(lambda t: t.clamp_min(0) ** (1.0 / order), summed)
