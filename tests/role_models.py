"""Small modules in which each parameter has a known role."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

W = 8  # width of the small models


HEADS = 2


def tokens(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(0, 11, (batch, length))


def split_heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def join_heads(x):
    return x.transpose(1, 2).flatten(-2)


def softmax_attention(q, k, v):
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    mask = torch.ones(q.shape[-2], k.shape[-2]).tril() == 0
    return logits.masked_fill(mask, float("-inf")).softmax(-1) @ v


class Attention(nn.Module):
    """Self-attention with separate projections; cross-attention when it is given a memory."""

    def __init__(self, core=F.scaled_dot_product_attention):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(W, W) for _ in range(4))
        self.core = core

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return self.out(join_heads(self.core(split_heads(self.q(x)), split_heads(self.k(memory)), split_heads(self.v(memory)))))


def feed_forward() -> nn.Sequential:
    return nn.Sequential(nn.Linear(W, 2 * W), nn.GELU(), nn.Linear(2 * W, W), nn.Dropout(0.1))


class PreNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), feed_forward()
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(2))

    def forward(self, x):
        x = x + self.attn(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class PostNorm(PreNorm):
    def forward(self, x):
        x = self.norms[0](x + self.attn(x))
        return self.norms[1](self.mlp(x) + x)


class Parallel(PreNorm):
    def forward(self, x):
        h = self.norms[0](x)
        return self.mlp(h) + self.attn(h) + x


class ParallelLeft(Parallel):
    def forward(self, x):
        h = self.norms[0](x)
        return x + self.mlp(h) + self.attn(h)


class Fused(nn.Module):
    """One projection for queries, keys and values, cut in the way that ``cut`` says."""

    def __init__(self, cut: Callable, core=F.scaled_dot_product_attention, *, transposed=False):
        super().__init__()
        self.cut, self.core, self.transposed = cut, core, transposed
        self.qkv = nn.Parameter(torch.randn(W, 3 * W) if transposed else torch.randn(3 * W, W))
        self.out = nn.Linear(W, W)

    def forward(self, x):
        h = x @ self.qkv if self.transposed else F.linear(x, self.qkv)
        return self.out(join_heads(self.core(*self.cut(h))))


def cut_chunks(h):
    return [split_heads(part) for part in h.chunk(3, -1)]


def cut_permuted(h):
    return h.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def cut_by_head(h):
    return h.unflatten(-1, (HEADS, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)


class Grouped(nn.Module):
    """Grouped-query attention out of one projection: two query heads, one head of keys and of values."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(W, 2 * W), nn.Linear(W, W)

    def forward(self, x):
        q, k, v = self.qkv(x).split([W, W // 2, W // 2], -1)
        k, v = (t.unflatten(-1, (1, -1)).transpose(1, 2).repeat_interleave(HEADS, 1) for t in (k, v))
        return self.out(join_heads(F.scaled_dot_product_attention(split_heads(q), k, v)))


class Einsum(nn.Module):
    """Projections with a dimension of heads, contracted by einsum."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(W, HEADS, W // HEADS)) for _ in range(3))
        self.out = nn.Parameter(torch.randn(HEADS, W // HEADS, W))

    def forward(self, x):
        q, k, v = (torch.einsum("btc,chd->bthd", x, weight) for weight in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.5).softmax(-1)
        return torch.einsum("bqhd,hdc->bqc", torch.einsum("bhqk,bkhd->bqhd", weights, v), self.out)


def rotate(x):
    angle = torch.outer(torch.arange(x.shape[-2]), 10.0 ** -torch.arange(x.shape[-1] // 2)).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat((-second, first), -1) * angle.sin()


def rotary_attention(q, k, v):
    return softmax_attention(rotate(q), rotate(k), v)


class RMSNorm(nn.Module):
    """Written out by hand; with ``one_plus`` the scale is 1 + weight."""

    def __init__(self, width=W, *, one_plus=False):
        super().__init__()
        self.weight, self.one_plus = nn.Parameter(torch.zeros(width)), one_plus

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (1.0 + self.weight) if self.one_plus else self.weight * x


class HandLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(W)), nn.Parameter(torch.zeros(W))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.g + self.b


class NormedQueries(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(W, W) for _ in range(3))
        self.q_norm, self.k_norm = RMSNorm(W // HEADS), nn.LayerNorm(W // HEADS)

    def forward(self, x):
        q, k = self.q_norm(split_heads(self.q(x))), self.k_norm(split_heads(self.k(x)))
        return join_heads(F.scaled_dot_product_attention(rotate(q), rotate(k), split_heads(self.v(x))))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.cross = Attention(softmax_attention), Attention()

    def forward(self, x, memory):
        x = x + self.own(x)
        return x + self.cross(x, memory)


class Language(nn.Module):
    def __init__(self, *, tied, loss=False):
        super().__init__()
        self.embed, self.places = nn.Embedding(11, W), nn.Parameter(torch.zeros(1, 5, W))
        self.block, self.norm, self.head = PreNorm(), nn.LayerNorm(W), nn.Linear(W, 11, bias=False)
        self.loss = loss
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        logits = self.head(self.norm(self.block(self.embed(ids) + self.places)))
        capped = 30.0 * torch.tanh(logits / 30.0)
        return F.cross_entropy(capped.flatten(0, 1), ids.flatten()) if self.loss else capped


class SwiGLU(nn.Module):
    def __init__(self, *, fused=False):
        super().__init__()
        self.gate, self.up = nn.Linear(W, 4 * W if fused else 2 * W), nn.Linear(W, 2 * W)
        self.down, self.fused = nn.Linear(2 * W, W), fused

    def forward(self, x):
        gate, up = self.gate(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return x + self.down(F.silu(gate) * up)


class GLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.last = nn.Linear(W, 2 * W), nn.Linear(W, W)

    def forward(self, x):
        return x + self.last(F.glu(self.both(x)))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(W, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, W, 4 * W)), nn.Parameter(torch.randn(3, 4 * W, W))
        self.norm = nn.LayerNorm(W)

    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        h = torch.bmm(flat.expand(3, -1, -1), self.up).relu()
        y = torch.bmm(h, self.down)
        picked = y.transpose(0, 1).gather(1, chosen[..., None].expand(-1, -1, W))
        return self.norm(x + (picked * weights[..., None]).sum(1).unflatten(0, x.shape[:2]))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTM(W, W, batch_first=True), nn.GRU(W, W, batch_first=True), nn.Linear(W, 3)

    def forward(self, x):
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


class WeightNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(W, W))

    def forward(self, x):
        return x + self.linear(x)


class Positions(nn.Module):
    """Parameters that no contraction consumes."""

    def __init__(self):
        super().__init__()
        self.token, self.table = nn.Parameter(torch.zeros(1, 1, W)), nn.Parameter(torch.zeros(1, 6, W))
        self.q, self.k, self.v, self.last = (nn.Linear(W, W) for _ in range(4))
        self.relative, self.temperature = nn.Embedding(12, HEADS), nn.Parameter(torch.ones(HEADS, 1, 1))
        self.slope, self.unused = nn.PReLU(W), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.table
        places = torch.arange(6)
        bias = self.relative(places[:, None] - places[None, :] + 6).permute(2, 0, 1)
        logits = split_heads(self.q(x)) @ split_heads(self.k(x)).transpose(-1, -2) * self.temperature
        y = join_heads((logits + bias).softmax(-1) @ split_heads(self.v(x)))
        return self.last(self.slope(y.transpose(1, 2)).transpose(1, 2)).sum((0, 1)).sin()


class Multitask(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.one, self.two, self.aux = nn.Linear(W, W), nn.Linear(W, 3), nn.Linear(W, 1), nn.Linear(W, 5)

    def forward(self, x):
        h = self.trunk(x).relu()
        return {"one": self.one(h).log_softmax(-1), "two": self.two(h).squeeze(-1), "aux": self.aux(h), "hidden": h}


class StateSpace(nn.Module):
    """A scan: the rate's shift and decay are kept, and the skip D around the scan is no residual stream."""

    def __init__(self):
        super().__init__()
        self.decay, self.skip, self.shift = (nn.Parameter(torch.zeros(W)) for _ in range(3))
        self.rate, self.put, self.read, self.out = (nn.Linear(W, W, bias=False) for _ in range(4))

    def forward(self, x):
        rate = F.softplus(self.rate(x) + self.shift)
        kept, put, state, states = (-self.decay.exp() * rate).exp(), rate * self.put(x), torch.zeros(x.shape[0], W), []
        for t in range(x.shape[1]):
            state = kept[:, t] * state + put[:, t]
            states.append(state)
        return x + self.out(torch.stack(states, 1) * self.read(x) + self.skip * x)


class Interpolating(nn.Module):
    """Token shift: w x + (1 - w) y has no scale to set."""

    def __init__(self):
        super().__init__()
        self.mix, self.last = nn.Parameter(torch.rand(W)), nn.Linear(W, W)

    def forward(self, x):
        return self.last(x * self.mix + x.roll(1, 1) * (1 - self.mix)).relu()


class SinkAttention(nn.Module):
    """A parameter stands among the logits, and two layers share a learned bias of them; a GELU is written out."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.q2, self.k2, self.wide = (nn.Linear(W, W, bias=False) for _ in range(6))
        self.sink, self.bias = nn.Parameter(torch.zeros(1, HEADS, 1, 1)), nn.Embedding(5, HEADS)

    def forward(self, x):
        bias = self.bias(torch.arange(5)[:, None] - torch.arange(5).clamp(max=0)).permute(2, 0, 1)[None]
        bias = bias + torch.ones(5, 5).tril()
        x = self.attend(self.q(x), self.k(x), self.v(x), bias)
        h = self.wide(self.attend(self.q2(x), self.k2(x), x, bias))
        return 0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.044715 * h.pow(3))))

    def attend(self, q, k, v, bias):
        logits = split_heads(q) @ split_heads(k).transpose(-1, -2) / 2 + bias
        weights = torch.cat((logits, self.sink.expand(*logits.shape[:-1], 1)), -1).softmax(-1)
        return join_heads(weights[..., :-1] @ split_heads(v))


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(W, HEADS, 2 * W, batch_first=True, **options)
