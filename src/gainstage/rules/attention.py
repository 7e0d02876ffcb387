"""Scaled dot-product attention."""

from __future__ import annotations

import torch

from gainstage.rules.conditions import add_drawn, exclude, prefer
from gainstage.rules.registry import Call, rule
from gainstage.signal import Value, affine, contract, dropout, expand, reshape, softmax
from gainstage.signal.copies import replace

aten = torch.ops.aten
LETTERS = "abcdefgh"


def attention_logits(
    q: Value, k: Value, mask: Value | None, *, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False
) -> Value:
    """``scale q k^T`` with its mask: ``K_l[all] = scale^2 d K_q K_k`` for independent entries."""
    if enable_gqa and k.shape[-3] != q.shape[-3]:
        k = repeat_heads(k, q.shape[-3])
    batch = LETTERS[: len(q.dims) - 2]
    logits = contract(q, k, batch + "xy", batch + "zy", batch + "xz")
    logits = affine(logits, scale if scale is not None else q.shape[-1] ** -0.5)
    if is_causal:
        logits = exclude(logits, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril())
    return logits if mask is None else masked(logits, mask)


def repeat_heads(k: Value, heads: int) -> Value:
    """Grouped-query attention: each key head serves several query heads."""
    group = heads // k.shape[-3]
    one = (*k.shape[:-2], 1, *k.shape[-2:])
    wide = (*k.shape[:-2], group, *k.shape[-2:])
    return reshape(expand(reshape(k, one), wide), (*k.shape[:-3], heads, *k.shape[-2:]))


def masked(logits: Value, mask: Value) -> Value:
    """Logits with a mask: True where a key may be seen, or a number that is added."""
    if mask.constant is None:
        return add_drawn(logits, mask)
    if mask.constant.dtype == torch.bool:
        return exclude(logits, mask.constant)
    return prefer(logits, mask.constant)


@rule(aten.scaled_dot_product_attention.default)
def attention(
    call: Call, q: Value, k: Value, v: Value, attn_mask: Value | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """``K_o[S] = sum over keys of K_p[S] K_v[S]`` with the softmax's exact participation ratio."""
    logits = attention_logits(q, k, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    weights = softmax(logits, -1)
    if dropout_p > 0.0:
        weights = dropout(weights, 1.0 - dropout_p)
    if enable_gqa and v.shape[-3] != q.shape[-3]:
        v = repeat_heads(v, q.shape[-3])
    batch = LETTERS[: len(q.dims) - 2]
    result = contract(weights, v, batch + "xz", batch + "zy", batch + "xy")
    return replace(result, stray=v.stray.hidden())
