"""Situation 1: attention logits have the variance over the keys that the plan asks for, in every layer of every form."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from benchmarks.situations.logits import Logits
from benchmarks.situations.models import Cross, Subject, each, from_timm, from_torch, from_torchvision, from_transformers
from benchmarks.situations.rows import DRAWS, Measurement, Row, row_over
from benchmarks.zoo.reference import Example
from torch import nn

import gainstage as gs

ASKED = (0.8, 1.25)
SUBJECTS = (
    from_torch("Transformer", lambda: Example(nn.Transformer(64, 4, 2, 2, 128, batch_first=True), _pair(64, 64))),
    from_torch("MultiheadAttention, cross", lambda: Example(Cross(), (*_pair(64, 48), torch.randn(4, 20, 32)))),
    from_torchvision("vit_b_16"),
    from_torchvision("swin_t"),
    from_torchvision("maxvit_t"),
    from_timm("deit_tiny_patch16_224"),
    from_timm("beit_base_patch16_224"),
    from_timm("eva02_tiny_patch14_224"),
    from_timm("vit_tiny_patch16_224", "vit_tiny, qk_norm", qk_norm=True),
    from_timm("mvitv2_tiny"),
    from_timm("swinv2_tiny_window8_256"),
    from_transformers("gpt2"),
    from_transformers("llama", "llama, grouped queries", num_key_value_heads=2),
    from_transformers("bloom", "bloom, ALiBi", n_layer=2, n_head=4),
    from_transformers("gemma2", "gemma2, soft cap", num_key_value_heads=2, head_dim=32),
    from_transformers("qwen3", "qwen3, norms of q and k", num_key_value_heads=2, head_dim=32),
    from_transformers("t5", "t5, relative bias, unscaled", head="Seq2SeqLM", d_model=128, d_kv=32, d_ff=256, num_layers=2),
    from_transformers("bart", "bart, cross", head="Seq2SeqLM", d_model=128, encoder_layers=2, decoder_layers=2),
    from_transformers("bert", head="MaskedLM"),
    from_transformers("deberta-v2", head="MaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"]),
)


def _pair(width: int, other: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 12, width), torch.randn(4, 20, other)


def measurements() -> list[Measurement]:
    """The unit variance for every form, and the entropy that is predicted."""
    return each(SUBJECTS, rows_of)


def rows_of(subject: Subject) -> Iterator[Row]:
    """Variances over the keys, and predicted over measured entropies."""
    first = subject.draw(0)
    plan = gs.plan(first.model, first.args, first.kwargs)
    found = []
    for seed in range(DRAWS):
        example = subject.draw(seed)
        gs.apply(example.model, plan, seed=seed)
        with torch.no_grad(), Logits() as logits:
            example.model(*example.args, **(example.kwargs or {}))
        found.append((logits.variances, logits.entropies))
    variances = np.mean([variance for variance, _ in found], axis=0)
    named = {"situation": "attention", "package": subject.package, "model": subject.name}
    trace = gs.inspect(example.model, example.args, example.kwargs, gradients=False)
    entropies = np.mean([entropy for _, entropy in found], axis=0)
    by_place = {signal.path: signal.entropy for signal in trace.attention}  # several products may feed one softmax
    ratios = [found / float(entropy) for found, entropy in zip(by_place.values(), entropies, strict=True)]
    yield row_over(variances.tolist(), **named, quantity="variance of the logits over the keys", asked=ASKED)
    yield row_over(ratios, **named, quantity="entropy of the attention, predicted over measured", asked=(0.95, 1.05))
