"""Attention of other people's models: logits of the variance that was asked for, measured on real passes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gainstage as gs
from gainstage.errors import InputError
from gainstage.signal.attention import entropy

WIDTH, HEADS, TOKENS = 64, 4, 24


class Block(nn.Module):
    """Attention by hand, with what is done to queries, keys and logits as an option."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)
        self.temperature = nn.Parameter(torch.full((HEADS, 1, 1), 10.0 if form == "temperature" else math.log(10.0)))

    def logits(self, x):
        q, k = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k))
        if self.form == "norms":
            return self.q_norm(q) @ self.k_norm(k).mT / math.sqrt(q.shape[-1])
        if self.form == "plain":
            return q @ k.mT / math.sqrt(q.shape[-1])
        scale = self.temperature if self.form == "temperature" else self.temperature.clamp(max=math.log(100.0)).exp()
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale

    def forward(self, x):
        v = self.v(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return (self.logits(x).softmax(-1) @ v).transpose(1, 2).flatten(-2)


def alike(seed, share=0.5):
    """Tokens with this cosine to each other."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(8, 1, WIDTH, generator=g)
    return share**0.5 * common + (1 - share) ** 0.5 * torch.randn(8, TOKENS, WIDTH, generator=g)


@pytest.mark.parametrize("form", ["plain", "norms", "temperature", "exponential"])
@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_logits_have_the_variance_that_is_asked_for(form, variance):
    block = Block(form)
    plan = gs.plan(block, (alike(0),), policy=gs.policies.unit(logit_variance=variance))
    found = []
    for seed in range(16):
        gs.apply(block, plan, seed=seed)
        with torch.no_grad():
            found.append(float(block.logits(alike(seed)).var(-1).mean()))
    # 16 draws stray by 8 % each at this width; a norm over 16 entries, whose own size strays, is good for 6 % more
    assert np.mean(found) == pytest.approx(variance, rel=0.12)
    assert f"variance {variance:g} over the keys" in plan.explain("q_norm.weight" if form == "norms" else "q.weight") or form in (
        "temperature",
        "exponential",
    )


def test_what_a_norm_cancels_is_said():
    plan = gs.plan(Block("norms"), (alike(0),))
    assert "a norm between cancels its scale" in plan.explain("q.weight")
    assert "the scale of their weights cancels" in plan.explain("k_norm.weight")
    assert plan.parameters["temperature"].role == "unused"


def test_the_closed_form_of_a_single_head():
    """d_in^2 sigma^4 v_q v_k = 1 with v_q = v_k: v = 1/(d_in sigma^2)."""
    block = Block("plain")
    plan = gs.plan(block, (2.0 * torch.randn(64, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)),))
    assert plan.parameters["q.weight"].distribution.std ** 2 == pytest.approx(1 / (WIDTH * 4.0), rel=0.01)


@pytest.mark.parametrize("variance", [0.1, 1.0, 4.0])
def test_entropy_against_sampling(variance):
    logits = variance**0.5 * torch.randn(20_000, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampled = torch.special.entr(logits.softmax(-1)).sum(-1)
    assert entropy(variance, 48) == pytest.approx(float(sampled.mean()), abs=4 * float(sampled.std()) / 20_000**0.5)


def test_entropy_of_a_real_causal_attention():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 128, dropout=0.0, batch_first=True, norm_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    x = alike(0, 0.0)
    gs.initialize(layer, (x, mask))
    (signal,) = gs.inspect(layer, (x, mask), gradients=False).attention
    with torch.no_grad():
        weights = layer.self_attn(*[layer.norm1(x)] * 3, attn_mask=mask, average_attn_weights=False)[1]
    rows = torch.special.entr(weights.double()).sum(-1)[..., 1:] / torch.arange(2, TOKENS + 1).log()
    assert signal.entropy == pytest.approx(float(rows.mean()), rel=0.02)


class Biased(nn.Module):
    """Attention with biases that fall with the distance (ALiBi), in one product as in Bloom."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
        places = torch.arange(TOKENS)
        self.register_buffer("bias", -slopes[:, None, None] * (places[:, None] - places).abs())

    def probabilities(self, x):
        q, k = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).flatten(0, 1) for p in (self.q, self.k))
        bias = self.bias.repeat(len(x), 1, 1)
        return torch.baddbmm(bias, q, k.mT, alpha=q.shape[-1] ** -0.5).unflatten(0, (len(x), HEADS)).softmax(-1)

    def forward(self, x):
        return self.probabilities(x) @ self.v(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def test_biases_of_positions_are_no_noise():
    block, x = Biased(), torch.randn(8, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    plan = gs.plan(block, (x,))
    # v = 1 / d_in, whatever the biases are
    assert plan.parameters["q.weight"].distribution.std ** 2 == pytest.approx(1 / WIDTH, rel=0.02)
    found = []
    for seed in range(16):
        gs.apply(block, plan, seed=seed)
        with torch.no_grad():
            found.append(float(torch.special.entr(block.probabilities(x).double()).sum(-1).mean()) / math.log(TOKENS))
    (signal,) = gs.inspect(block, (x,), gradients=False).attention
    # a bias of slope 1/2 leaves 4 keys, where "as if they were equal" is good for 3 %
    assert signal.entropy == pytest.approx(np.mean(found), rel=0.03)


class Masked(nn.Module):
    """Causal attention of one head; the mask is added, or comes with the product."""

    def __init__(self, *, fused):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), -math.inf).triu(1))
        self.fused = fused

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        logits = torch.baddbmm(self.mask, q, k.mT) if self.fused else q @ k.mT + self.mask
        return logits.softmax(-1) @ x


def test_a_mask_that_comes_with_a_product_is_a_mask():
    torch.manual_seed(0)
    block, x = Masked(fused=False), torch.randn(8, TOKENS, WIDTH)
    fused = Masked(fused=True)
    fused.load_state_dict(block.state_dict())
    apart, together = (gs.inspect(model, (x,), gradients=False).nodes for model in (block, fused))
    for node, other in (("baddbmm", "add"), ("softmax", "softmax"), ("matmul", "matmul_1")):
        assert together[node].second_moment == pytest.approx(apart[other].second_moment, rel=1e-9), node


@pytest.mark.parametrize("wish", [0.0, -1.0, math.inf, math.nan])
def test_a_variance_that_is_none_is_refused(wish):
    with pytest.raises(InputError, match="logit_variance"):
        gs.policies.unit(logit_variance=wish)
