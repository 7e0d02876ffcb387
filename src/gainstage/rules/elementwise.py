"""Pointwise ops of one and of several tensors."""

from __future__ import annotations

from typing import Any

import torch

from gainstage.rules.conditions import add_drawn, add_known
from gainstage.rules.registry import Call, binary, elementwise, identity, pointwise, rule
from gainstage.signal import Value, affine, apply, combine, mixture, take
from gainstage.signal.copies import replace
from gainstage.signal.marginal import Marginal

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
    aten.floor.default,
    aten.ceil.default,
    aten.round.default,
    aten.trunc.default,
    aten.frac.default,
    aten.remainder.Scalar,
    aten.fmod.Scalar,
    aten.floor_divide.Scalar,
    aten.div.Scalar_mode,
    aten.acos.default,
    aten.exp2.default,
    aten.log2.default,
    aten.lgamma.default,
)

elementwise(torch.add, aten.add.Scalar)
elementwise(torch.sub, aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor)
elementwise(torch.mul, aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor)
elementwise(torch.div, aten.div.Tensor, aten.div.Scalar, aten.divide.Tensor, aten.true_divide.Tensor)
elementwise(torch.maximum, aten.maximum.default, aten.max.other, aten.fmax.default)
elementwise(torch.minimum, aten.minimum.default, aten.min.other, aten.fmin.default)
elementwise(torch.pow, aten.pow.Tensor_Tensor)
for derivative in (aten.tanh_backward.default, aten.sigmoid_backward.default):  # models that differentiate themselves
    elementwise(derivative, derivative)

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
    aten.item.default,
)


@rule(aten.add.Tensor)
def add(call: Call, x: Any, y: Any, alpha: float = 1.0) -> Value:
    """``x + alpha y``; a known operand with very negative entries is the mask of a softmax."""
    if alpha == 1.0 and isinstance(x, Value) and isinstance(y, Value):
        if y.constant is not None and x.constant is None:
            return add_known(x, y)
        if x.constant is not None and y.constant is None:
            return add_known(y, x)
        return add_drawn(x, y) if x.valid_draws() is None else add_drawn(y, x)
    return binary(torch.add, x, y, alpha)


@rule(aten.neg.default)
def negate(call: Call, x: Value) -> Value:
    """``-x``."""
    return affine(x, -1.0)


@rule(aten.rsub.Scalar)
def reverse_subtract(call: Call, x: Value, other: float, alpha: float = 1.0) -> Value:
    """``other - alpha x``."""
    return affine(x, -float(alpha), float(other))


@rule(aten.pow.Scalar)
def power_of(call: Call, base: float, x: Value) -> Value:
    """``b^x``, entry by entry."""
    return apply(lambda t: torch.pow(float(base), t), x)


@rule(aten.clamp.Tensor)
def clamp_between(call: Call, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    """``min(max(x, low), high)`` for limits that are tensors."""
    x = x if low is None else binary(torch.maximum, x, low)
    return x if high is None else binary(torch.minimum, x, high)


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
    """``(1 - w) x + w y``."""
    return mixture(weight, y, x, is_choice=False)


@rule(aten.prelu.default)
def prelu(call: Call, x: Value, slope: Value) -> Value:
    """``max(0, x) + a min(0, x)``: on the latent of x, with the slope's own moments where it varies by channel."""
    if slope.variance <= 1e-12:
        return apply(lambda t: torch.where(t > 0, t, slope.mean * t), x)
    dims = ((), slope.dims[0], *(() for _ in x.dims[2:])) if len(x.dims) > 1 else slope.dims
    return combine(lambda t, a: torch.where(t > 0, t, a * t), x, replace(slope, dims=dims))


@rule(aten.glu.default)
def gated_linear_unit(call: Call, x: Value, dim: int = -1) -> Value:
    """``a sigmoid(b)`` for the two halves of x, which are taken to have nothing but the mean in common."""
    half = x.shape[dim] // 2
    gate = apply(torch.sigmoid, take(x, dim, half, 2 * half))
    return binary(torch.mul, take(x, dim, 0, half), replace(gate, marginal=_apart(gate)))


def _apart(x: Value) -> Any:
    """Two halves of one tensor are different entries of it: their latents are not the same."""
    return Marginal(object(), lambda: x.marginal.values)
