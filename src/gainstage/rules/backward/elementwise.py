"""Gradients of ops that work entry by entry: times the slope, the other factor, the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gainstage.rules.backward.linear import bias_gradient
from gainstage.rules.backward.registry import BackwardCall, Gradient, backward
from gainstage.rules.backward.sums import to_shape
from gainstage.rules.conditions import EXCLUDES, kept, only_number
from gainstage.signal import (
    Value,
    affine,
    apply,
    combine,
    dropout,
    join,
    left_by_slope,
    of_one_latent,
    slope,
    take,
    through_slope,
    to_summand,
    turned_by,
)
from gainstage.signal.copies import replace
from gainstage.signal.movement import parts_along
from gainstage.signal.slicing import slices

aten = torch.ops.aten

_UNLIKE = 0.1  # of the root mean square


def times_slope(call: BackwardCall, g: Value, x: Value, *args: Any, **kwargs: Any) -> tuple[Gradient, ...]:
    """``g f'(x)``: second moment ``E[g^2] E[f'(x)^2]``; of several tensors side by side that differ, of each."""
    parts = parts_along(x)
    if parts is not None and _differ(parts[1]):
        pieces = zip(slices(g, *parts), slices(call.output, *parts), parts[1], strict=True)
        each = [times_slope(replace(call, output=y), piece, part, *args, **kwargs) for piece, y, part in pieces]
        return (join([found for (found,) in each if found is not None], parts[0]),)
    op: Any = call.op
    steepness = slope(lambda t: op(t, *args, **kwargs), x)
    slopes = steepness[0].marginal.values
    against, gone = turned_by(g, x, call.output, slopes), left_by_slope(x, call.output, slopes)
    return (through_slope(g, steepness, against, gone),)


backward(aten.pow.Tensor_Scalar)(times_slope)


def _differ(parts: Sequence[Value]) -> bool:
    """Whether a function has another slope on some parts: behind a norm they are alike, and the gradient stays in one piece."""
    means, levels = np.array([part.mean for part in parts]), np.array([part.second_moment for part in parts])
    root = float(np.sqrt(levels.max()))
    return max(float(np.ptp(means)), float(np.ptp(np.sqrt(levels)))) > _UNLIKE * root


@backward(
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device,
    aten.to.other, aten._to_copy.default, aten.type_as.default, aten.lift_fresh_copy.default, aten.positive.default,
)  # fmt: skip
def unchanged(call: BackwardCall, g: Value, x: Value, *args: Any, **kwargs: Any) -> tuple[Gradient, ...]:
    """``g``."""
    return (g,)


@backward(aten.detach.default, aten.item.default)
def stopped(call: BackwardCall, g: Value, x: Value) -> tuple[Gradient, ...]:
    """Nothing: the gradient ends here."""
    return (None,)


@backward(aten.neg.default)
def negated(call: BackwardCall, g: Value, x: Value) -> tuple[Gradient, ...]:
    """``-g``."""
    return (affine(g, -1.0),)


def _for(x: Any, g: Value) -> Gradient:
    return to_shape(g, x.shape) if isinstance(x, Value) else None


def _of_sum(call: BackwardCall, g: Value, x: Any, y: Any, factor: float) -> tuple[Gradient, Gradient]:
    """Gradients of x and y in ``x + factor y``."""
    if not (isinstance(x, Value) and isinstance(y, Value)):
        return _for(x, g), _for(y, affine(g, factor))
    to_x = to_summand(g, call.output, x, y, factor)
    to_y = to_summand(g, call.output, affine(y, factor), x, 1.0)
    return to_shape(to_x, x.shape), to_shape(affine(to_y, factor), y.shape)


@backward(aten.add.Tensor, aten.add.Scalar)
def added(call: BackwardCall, g: Value, x: Any, y: Any, alpha: float = 1) -> tuple[Gradient, ...]:
    """``g`` and ``alpha g``."""
    return _of_sum(call, g, x, y, float(alpha))


@backward(aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor)
def subtracted(call: BackwardCall, g: Value, x: Any, y: Any, alpha: float = 1) -> tuple[Gradient, ...]:
    """``g`` and ``-alpha g``."""
    return _of_sum(call, g, x, y, -float(alpha))


@backward(aten.rsub.Scalar)
def subtracted_from(call: BackwardCall, g: Value, x: Value, other: float, alpha: float = 1) -> tuple[Gradient, ...]:
    """``-alpha g``."""
    return (affine(g, -float(alpha)),)


def _times(g: Value, factor: Any) -> Value:
    return combine(torch.mul, g, factor) if isinstance(factor, Value) else affine(g, float(factor))


def _times_slope_of(g: Value, x: Value, factor: Any) -> Value:
    """``g factor`` for a product of x with the factor, which may be a function of x itself."""
    if not (isinstance(factor, Value) and of_one_latent(x, factor)):
        return _times(g, factor)
    return through_slope(g, (factor, factor.marginal.values**2))


@backward(aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor)
def multiplied(call: BackwardCall, g: Value, x: Any, y: Any) -> tuple[Gradient, ...]:
    """``g y`` and ``g x``."""
    to_x = _for(x, _times_slope_of(g, x, y)) if isinstance(x, Value) and call.wants(0) else None
    return to_x, _for(y, _times_slope_of(g, y, x)) if isinstance(y, Value) and call.wants(1) else None


@backward(aten.div.Tensor, aten.div.Scalar, aten.divide.Tensor, aten.true_divide.Tensor)
def divided(call: BackwardCall, g: Value, x: Any, y: Any) -> tuple[Gradient, ...]:
    """``g / y`` and ``-g x / y^2``."""
    if not isinstance(y, Value):
        return _for(x, affine(g, 1.0 / float(y))), None
    if of_one_latent(x, y):
        by_y = _times_slope_of(g, x, apply(torch.reciprocal, y))
        return by_y, affine(_times_slope_of(by_y, y, combine(torch.div, x, y)), -1.0) if call.wants(1) else None
    by_y = combine(torch.div, g, y)
    to_y = affine(combine(torch.div, _times(by_y, x), y), -1.0) if call.wants(1) else None
    return _for(x, by_y), None if to_y is None else _for(y, to_y)


@backward(aten.addcmul.default)
def product_added(call: BackwardCall, g: Value, x: Value, a: Value, b: Value, value: float = 1) -> tuple[Gradient, ...]:
    """``g``, ``value g b`` and ``value g a``."""
    scaled = affine(g, float(value))
    return _for(x, g), _for(a, _times(scaled, b)), _for(b, _times(scaled, a))


@backward(aten.lerp.Scalar)
def interpolated(call: BackwardCall, g: Value, x: Value, y: Value, weight: float) -> tuple[Gradient, ...]:
    """``(1 - w) g`` and ``w g``."""
    return _for(x, affine(g, 1.0 - float(weight))), _for(y, affine(g, float(weight)))


@backward(aten.glu.default)
def gated(call: BackwardCall, g: Value, x: Value, dim: int = -1) -> tuple[Gradient, ...]:
    """``g sigmoid(b)`` to the first half, ``g a sigmoid'(b)`` to the second."""
    half = x.shape[dim] // 2
    a, b = take(x, dim, 0, half), take(x, dim, half, 2 * half)
    to_b = through_slope(combine(torch.mul, g, a), slope(torch.sigmoid, b))
    return (join([combine(torch.mul, g, apply(torch.sigmoid, b)), to_b], dim),)


@backward(aten.prelu.default)
def prelu(call: BackwardCall, g: Value, x: Value, weight: Value) -> tuple[Gradient, ...]:
    """``g`` where x is positive and ``a g`` elsewhere; the slope gets ``sum g min(x, 0)``."""
    to_x = through_slope(g, slope(lambda t: torch.where(t > 0, t, weight.mean * t), x))
    negative = combine(torch.mul, g, _negative_part(x))
    return to_x, _of_slope(negative, weight)


def _negative_part(x: Value) -> Value:
    return apply(lambda t: t.clamp_max(0), x)


def _of_slope(g: Value, weight: Value) -> Gradient:
    """Sum over all entries that share a slope."""
    if weight.shape[0] > 1:
        return bias_gradient(g, weight, 1)
    return to_shape(to_shape(g, (1,) * len(g.dims)), weight.shape)


@backward(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def filled(call: BackwardCall, g: Value, x: Value, mask: Value, value: Any) -> tuple[Gradient, ...]:
    """``g`` where the mask is off; of logits that are excluded there it is nothing there by itself."""
    if mask.constant is None:
        raise NotImplementedError("masked_fill by a mask that depends on the input")
    return _for(x, g if only_number(value) < EXCLUDES else kept(g, ~mask.constant.bool())), None, None


@backward(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def chosen(call: BackwardCall, g: Value, condition: Value, x: Any, y: Any) -> tuple[Gradient, ...]:
    """``g`` to the operand that was taken; where logits are excluded it is nothing by itself."""
    if condition.constant is None:
        raise NotImplementedError("where by a condition that depends on the input")
    valid = condition.constant.bool()
    for chosen, other in ((x, y), (y, x)):
        if isinstance(chosen, Value) and only_number(other) < EXCLUDES:
            return None, *(_for(part, g) if part is chosen else None for part in (x, y))
    return None, _for(x, kept(g, valid)), _for(y, kept(g, ~valid))


@backward(aten.dropout.default)
def dropped(call: BackwardCall, g: Value, x: Value, p: float, train: bool) -> tuple[Gradient, ...]:
    """The same coins, and the same ``1/(1 - p)``."""
    return (dropout(g, 1.0 - p) if train and 0.0 < p < 1.0 else g,)


@backward(
    aten.bernoulli.p, aten.bernoulli.default, aten.uniform.default, aten.empty_like.default, aten.new_empty.default,
    aten.rand_like.default, aten.randn_like.default, aten.exponential.default,
)  # fmt: skip
def drawn(call: BackwardCall, g: Value, *args: Any, **kwargs: Any) -> tuple[Gradient, ...]:
    """Nothing: what is drawn takes the shape of its operand, or its probabilities, through which torch sends no gradient."""
    return ()


@backward(aten.feature_dropout.default)
def channels_dropped(call: BackwardCall, g: Value, x: Value, p: float, train: bool) -> tuple[Gradient, ...]:
    """The same coins, one for each channel."""
    return (dropout(g, 1.0 - p, shared=range(2, len(x.dims))) if train and 0.0 < p < 1.0 else g,)
