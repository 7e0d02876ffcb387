"""Attention logits of a real pass: the scaled products of queries and keys on their way to a softmax, in whatever form.

Followed by their tensors alone: a product of two tensors is marked, the mark goes along with scalings, caps and views, and is
left as it is by what is added (masks, biases of positions); where a marked tensor arrives at a softmax over its last axis, its
variance over the keys that the softmax can see is taken.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_HIDDEN = -50.0  # an added mask below this hides a key
_SCALING = {aten.mul, aten.div, aten.tanh, aten._to_copy, aten.view, aten._unsafe_view, aten.transpose, aten.permute, aten.clone,
            aten.expand, aten.unsqueeze, aten.squeeze, aten.select, aten.slice}  # fmt: skip
_IN_PLACE = {aten.mul_: aten.mul, aten.div_: aten.div}
_KEEPING = {aten.add, aten.add_, aten.sub, aten.masked_fill, aten.masked_fill_, aten.where, aten.clamp, aten.clamp_min}
_SOFTMAX = {aten._softmax, aten._safe_softmax}


class Logits(TorchDispatchMode):
    """Notes the variance over the keys, and the entropy over its maximum, of every softmax of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.variances: list[float] = []
        self.entropies: list[float] = []
        self._marks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> itself, kept alive; the logits without biases

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, then look."""
        kwargs = kwargs or {}
        op = func.overloadpacket
        found = [self._marks[id(a)][1] for a in args if id(a) in self._marks]
        if op in _SOFTMAX and found and args[0].shape == found[0].shape:
            self._note(found[0], args[0])
        if op is aten._scaled_dot_product_flash_attention_for_cpu:
            self._fused(*args, **kwargs)
        result = func(*args, **kwargs)
        if op is aten.bmm:
            self._mark(result, result)
        elif op is aten.baddbmm:
            self._mark(result, kwargs.get("alpha", 1) * (args[1] @ args[2]))
        elif found and op in _SCALING | _IN_PLACE.keys():
            plain = [self._marks[id(a)][1] if id(a) in self._marks else a for a in args]
            self._mark(result, _IN_PLACE.get(op, op)(*plain, **kwargs))
        elif found and op in _KEEPING and result.shape == found[0].shape:
            self._mark(result, found[0])
        return result

    def _mark(self, result: torch.Tensor, logits: torch.Tensor) -> None:
        self._marks[id(result)] = (result, logits.clone())

    def _fused(self, query: torch.Tensor, key: torch.Tensor, _value: Any, *rest: Any, **options: Any) -> None:
        is_causal, attn_mask, scale = len(rest) > 1 and rest[1], options.get("attn_mask"), options.get("scale")
        if key.shape[-3] != query.shape[-3]:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        mask = torch.zeros_like(logits)
        if is_causal:
            mask = mask.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
        self._note(logits, logits + (mask if attn_mask is None else attn_mask))

    def _note(self, logits: torch.Tensor, biased: torch.Tensor) -> None:
        """Unbiased variance over visible keys and entropy over its maximum, averaged over rows with two visible keys or more."""
        visible = biased > _HIDDEN
        count = visible.sum(-1)
        several = count > 1
        mean = torch.where(visible, logits, 0.0).sum(-1, keepdim=True) / count.unsqueeze(-1)
        squares = torch.where(visible, (logits - mean) ** 2, 0.0).sum(-1)
        self.variances.append(float((squares[several] / (count[several] - 1)).mean()))
        entropy = torch.special.entr(biased.double().softmax(-1)).sum(-1)
        self.entropies.append(float((entropy[several] / count[several].log()).mean()))
