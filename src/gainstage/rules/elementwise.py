"""Pointwise ops of one and of several tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gainstage.rules.registry import Call, binary, elementwise, identity, pointwise, rule
from gainstage.signal import Value, affine, apply, combine, expand, known, take
from gainstage.signal.value import Marginal

aten = torch.ops.aten

pointwise(
    aten.relu.default,
    aten.relu6.default,
    aten.gelu.default,
    aten.silu.default,
    aten.mish.default,
    aten.elu.default,
    aten.selu.default,
    aten.celu.default,
    aten.leaky_relu.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.hardshrink.default,
    aten.softshrink.default,
    aten.softplus.default,
    aten.log_sigmoid.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.erf.default,
    aten.exp.default,
    aten.expm1.default,
    aten.log.default,
    aten.log1p.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.square.default,
    aten.reciprocal.default,
    aten.abs.default,
    aten.sin.default,
    aten.cos.default,
    aten.atan.default,
    aten.sign.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.threshold.default,
    aten.nan_to_num.default,
)

VANISHES, EXCLUDES = -50.0, -1e3  # logits whose exponential is nothing; logits that can only be meant as a mask

elementwise(torch.add, aten.add.Scalar)
elementwise(torch.sub, aten.sub.Tensor, aten.sub.Scalar)
elementwise(torch.mul, aten.mul.Tensor, aten.mul.Scalar)
elementwise(torch.div, aten.div.Tensor, aten.div.Scalar)
elementwise(torch.maximum, aten.maximum.default)
elementwise(torch.minimum, aten.minimum.default)
elementwise(torch.pow, aten.pow.Tensor_Tensor)

identity(
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.lift_fresh_copy.default,
    aten.positive.default,
)


@rule(aten.add.Tensor)
def add(call: Call, x: Any, y: Any, alpha: float = 1.0) -> Value:
    """``x + alpha y``; a known operand with very negative entries is the mask of a softmax."""
    if alpha == 1.0 and isinstance(x, Value) and isinstance(y, Value):
        if y.constant is not None and x.constant is None:
            return add_known(x, y)
        if x.constant is not None and y.constant is None:
            return add_known(y, x)
    return binary(torch.add, x, y, alpha)


def add_known(x: Value, y: Value) -> Value:
    """``x + y`` for a known y. With entries at which a softmax vanishes, it is known beforehand what the softmax prefers."""
    assert y.constant is not None
    data = y.constant
    if not data.is_floating_point() or data.numel() < 2 or float(data.min()) > VANISHES:
        return binary(torch.add, x, y)
    valid = data > VANISHES
    if not bool(valid.any()) or (float(data.min()) > EXCLUDES and bool((data[valid] != 0).any())):
        return binary(torch.add, x, y)
    return prefer(x, data.masked_fill(~valid, float("-inf")))


def prefer(x: Value, prior: torch.Tensor) -> Value:
    """Add to the known part of logits."""
    shape = np.broadcast_shapes(x.shape, tuple(prior.shape))
    prior = prior.to("cpu", torch.float64)
    return replace(expand(x, shape), prior=prior if x.prior is None else x.prior + prior)


@rule(aten.neg.default)
def negate(call: Call, x: Value) -> Value:
    """``-x``."""
    return affine(x, -1.0)


@rule(aten.rsub.Scalar)
def reverse_subtract(call: Call, x: Value, other: float, alpha: float = 1.0) -> Value:
    """``other - alpha x``."""
    return affine(x, -float(alpha), float(other))


@rule(aten.pow.Tensor_Scalar)
def power(call: Call, x: Value, exponent: float) -> Value:
    """``x^p``, entry by entry."""
    return apply(lambda t: torch.pow(t, exponent), x)


@rule(aten.addcmul.default)
def add_product(call: Call, x: Value, a: Value, b: Value, value: float = 1.0) -> Value:
    """``x + value a b``."""
    return combine(torch.add, x, affine(combine(torch.mul, a, b), float(value)))


@rule(aten.lerp.Scalar)
def interpolate(call: Call, x: Value, y: Value, weight: float) -> Value:
    """``(1 - w) x + w y``."""
    return combine(torch.add, affine(x, 1.0 - float(weight)), affine(y, float(weight)))


@rule(aten.lerp.Tensor)
def interpolate_by(call: Call, x: Value, y: Value, weight: Value) -> Value:
    """``x + w (y - x)``."""
    return combine(torch.add, x, combine(torch.mul, weight, combine(torch.sub, y, x)))


@rule(aten.prelu.default)
def prelu(call: Call, x: Value, slope: Value) -> Value:
    """``max(0, x) + a min(0, x)``: on the latent of x, with the slope's own moments where it varies by channel."""
    if slope.variance <= 1e-12:
        return apply(lambda t: torch.where(t > 0, t, slope.mean * t), x)
    dims = ((), slope.dims[0], *(() for _ in x.dims[2:])) if len(x.dims) > 1 else slope.dims
    return combine(lambda t, a: torch.where(t > 0, t, a * t), x, replace(slope, dims=dims))


@rule(aten.masked_fill.Scalar)
def masked_fill(call: Call, x: Value, mask: Value, value: float) -> Value:
    """Entries under the mask are set; a very negative value means "not in the softmax"."""
    assert mask.constant is not None
    return exclude(x, ~mask.constant.bool(), float(value))


@rule(aten.masked_fill.Tensor)
def masked_fill_tensor(call: Call, x: Value, mask: Value, value: Any) -> Value:
    """As :func:`masked_fill`."""
    assert mask.constant is not None
    return exclude(x, ~mask.constant.bool(), value.mean if isinstance(value, Value) else float(value))


def exclude(x: Value, valid: torch.Tensor, value: float) -> Value:
    """Replace the entries that are not valid."""
    if value < EXCLUDES:
        return prefer(x, torch.zeros(valid.shape, dtype=torch.float64).masked_fill(~valid.cpu(), float("-inf")))
    share = known(valid.to(torch.float64))
    kept = combine(torch.mul, x, share)
    return kept if value == 0.0 else combine(torch.add, kept, known((~valid).to(torch.float64) * value))


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def where(call: Call, condition: Value, x: Any, y: Any) -> Value:
    """One of two tensors by a known condition."""
    assert condition.constant is not None
    valid = condition.constant.bool()
    x_number = x if not isinstance(x, Value) else _constant_number(x)
    y_number = y if not isinstance(y, Value) else _constant_number(y)
    if isinstance(x, Value) and y_number is not None:
        return exclude(x, valid, float(y_number))
    if isinstance(y, Value) and x_number is not None:
        return exclude(y, ~valid, float(x_number))
    first = combine(torch.mul, x, known(valid.to(torch.float64)))
    return combine(torch.add, first, combine(torch.mul, y, known((~valid).to(torch.float64))))


def _constant_number(x: Value) -> float | None:
    if x.constant is None or x.constant.numel() == 0:
        return None
    first = float(x.constant.reshape(-1)[0])
    return first if bool((x.constant == first).all()) else None


@rule(aten.glu.default)
def gated_linear_unit(call: Call, x: Value, dim: int = -1) -> Value:
    """``a sigmoid(b)`` for the two halves of x."""
    half = x.shape[dim] // 2
    gate = apply(torch.sigmoid, take(x, dim, half, 2 * half))
    return binary(torch.mul, take(x, dim, 0, half), replace(gate, marginal=_apart(gate)))


def _apart(x: Value) -> Any:
    """Two halves of one tensor are different entries of it: their latents are not the same."""
    return Marginal(object(), lambda: x.marginal.values)
