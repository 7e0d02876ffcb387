"""Gradients of softmax, attention and look-ups."""

from __future__ import annotations

from typing import Any

import torch

from gainstage.rules.attention import attention_logits, repeat_heads
from gainstage.rules.backward.linear import contract_backward
from gainstage.rules.backward.registry import BackwardCall, Gradient, backward
from gainstage.rules.backward.sums import summed_over, to_shape
from gainstage.signal import (
    Value,
    affine,
    combine,
    dropout,
    expand,
    mean_over,
    reshape,
    softmax,
    softmax_gradient,
)

aten = torch.ops.aten
LETTERS = "abcdefgh"


@backward(aten.softmax.int, aten._softmax.default)
def softmax_backward(call: BackwardCall, g: Value, x: Value, dim: int, *args: Any, **kwargs: Any) -> tuple[Gradient, ...]:
    """``p (g - sum p g)``."""
    dim %= len(x.dims)
    return (softmax_gradient(g, call.output, x, dim),)


@backward(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax_backward(call: BackwardCall, g: Value, x: Value, dim: int, *args: Any, **kwargs: Any) -> tuple[Gradient, ...]:
    """``g - p sum g``."""
    dim %= len(x.dims)
    total = affine(mean_over(g, g.dims[dim]), float(x.shape[dim]))
    return (combine(torch.sub, g, combine(torch.mul, softmax(x, dim), expand(total, x.shape))),)


@backward(aten.scaled_dot_product_attention.default)
def attention(
    call: BackwardCall, g: Value, q: Value, k: Value, v: Value, attn_mask: Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Gradient, ...]:  # fmt: skip
    """Values: ``p^T g``. Queries and keys: through the softmax's own Jacobian."""
    logits = attention_logits(q, k, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    weights = softmax(logits, -1)
    wide_k = repeat_heads(k, q.shape[-3]) if enable_gqa and k.shape[-3] != q.shape[-3] else k
    wide_v = repeat_heads(v, q.shape[-3]) if enable_gqa and v.shape[-3] != q.shape[-3] else v
    batch = LETTERS[: len(q.dims) - 2]
    used = dropout(weights, 1.0 - dropout_p) if dropout_p > 0.0 else weights
    to_weights, to_v = contract_backward(g, used, wide_v, batch + "xz", batch + "zy", batch + "xy")
    if dropout_p > 0.0:
        to_weights = dropout(to_weights, 1.0 - dropout_p)
    factor = scale if scale is not None else q.shape[-1] ** -0.5
    to_logits = affine(softmax_gradient(to_weights, weights, logits, len(weights.dims) - 1), factor)
    to_q, to_k = contract_backward(to_logits, q, wide_k, batch + "xy", batch + "zy", batch + "xz")
    to_bias = None if attn_mask is None or attn_mask.constant is not None else affine(to_logits, 1.0 / factor)
    return (
        to_shape(to_q, q.shape),
        _of_group(to_k, k),
        _of_group(to_v, v),
        None if to_bias is None or attn_mask is None else to_shape(to_bias, attn_mask.shape),
    )


def _of_group(g: Value, like: Value) -> Value:
    """Sum over the query heads that share a key head."""
    heads = like.shape[-3] if len(like.dims) > 2 else 1
    if g.shape == like.shape or heads == 1:
        return to_shape(g, like.shape)
    group = g.shape[-3] // heads
    split = reshape(g, (*g.shape[:-3], heads, group, *g.shape[-2:]))
    return reshape(summed_over(split, [len(split.dims) - 3]), like.shape)
