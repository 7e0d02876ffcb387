"""Roles are read off the graph: small modules of every kind, with what each parameter must be for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gainstage.capture import capture
from gainstage.errors import RoleConflictError, UnknownNameError
from gainstage.roles import Branch, Roles, Setter, infer_roles
from gainstage.roles.coordinates import arriving, numbered, values_of
from gainstage.roles.wiring import wire

W = 8  # width of the small models
HEADS = 2


def roles_of(model, *args, **kwargs) -> Roles:
    return infer_roles(capture(model, args, kwargs))


def named(setters: tuple[Setter, ...]) -> set[str]:
    return {setter.use.parameter + rows_text(setter.use.rows) for setter in setters}


def rows_text(rows) -> str:
    return "".join(f"[{start}:{stop}]" for start, stop in rows)


def levels(branches: tuple[Branch, ...]) -> list[set[str]]:
    return [named(branch.setters) for branch in branches]


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


def conv(cin=W, cout=W, size=3, **options):
    return nn.Conv2d(cin, cout, size, padding=size // 2, bias=False, **options)


class ResidualBlock(nn.Module):
    def __init__(self, *, downsample=False):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(W), conv(), nn.BatchNorm2d(W)
        self.shortcut = nn.Sequential(nn.AvgPool2d(1), conv(size=1), nn.BatchNorm2d(W)) if downsample else nn.Identity()

    def forward(self, x):
        h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(h + self.shortcut(x))


class LayerScaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise, self.norm = conv(groups=W), nn.GroupNorm(1, W)
        self.wide, self.narrow = nn.Linear(W, 2 * W), nn.Linear(2 * W, W)
        self.gamma = nn.Parameter(torch.full((W, 1, 1), 1e-6))

    def forward(self, x):
        h = self.norm(self.depthwise(x)).permute(0, 2, 3, 1)
        return x + self.gamma * self.narrow(F.gelu(self.wide(h))).permute(0, 3, 1, 2)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = conv(), conv(2 * W)

    def forward(self, x):
        x = torch.cat((x, self.one(x)), 1)
        return torch.cat((x, self.two(torch.relu(x))), 1)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.three, self.five, self.last = conv(size=1), conv(), conv(size=5), conv(3 * W + W)

    def forward(self, x):
        pooled = F.max_pool2d(x, 3, 1, 1)
        return self.last(torch.cat((self.one(x).relu(), self.three(x).relu(), self.five(x).relu(), pooled), 1))


class Siblings(nn.Module):
    """ResNeXt written out: one stream, and one branch that is a sum of four."""

    def __init__(self):
        super().__init__()
        self.paths = nn.ModuleList(nn.Sequential(conv(W, 2), nn.ReLU(), conv(2, W)) for _ in range(3))
        self.head = conv()

    def forward(self, x):
        return self.head(sum(path(x) for path in self.paths[1:]) + self.paths[0](x))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep = conv(), nn.Conv2d(W, W, 2, stride=2)
        self.up, self.last = nn.ConvTranspose2d(W, 2 * W, 2, stride=2), conv(3 * W)

    def forward(self, x):
        skip = self.down(x).relu()
        return self.last(torch.cat((self.up(self.deep(skip).relu()), skip), 1))


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


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.reduce, self.expand, self.last = conv(), conv(W, 2, 1), conv(2, W, 1), conv()

    def forward(self, x):
        h = self.conv(x)
        h = h * torch.sigmoid(h)
        gate = self.expand(self.reduce(h.mean((2, 3), keepdim=True)).relu())
        return self.last(h * F.hardsigmoid(gate))


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


class StandardisedConv(nn.Module):
    """Weight standardisation with a gain, as in normaliser-free networks."""

    def __init__(self):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(W, W, 3, 3)), nn.Parameter(torch.ones(W, 1, 1, 1))

    def forward(self, x):
        flat = self.weight.reshape(1, W, -1)
        weight = F.batch_norm(flat, None, None, (self.gain * 0.1).view(-1), training=True).reshape_as(self.weight)
        return x + 0.2 * F.conv2d(x.relu(), weight, padding=1)


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


@dataclass(frozen=True)
class Case:
    """A model and what its parameters are for: ``name@rows`` lists several uses of fused projections."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    roles: dict[str, str]
    streams: list[list[set[str]]] = field(default_factory=list)
    merges: list[list[set[str]]] = field(default_factory=list)
    logits: list[tuple[set[str], set[str], bool]] = field(default_factory=list)
    heads: list[tuple[set[str], int]] | None = None


def sequence():
    return (torch.randn(2, 5, W),)


def image():
    return (torch.randn(2, W, 6, 6),)


QKV = {"attn.q.weight": "query", "attn.k.weight": "key", "attn.v.weight": "value", "attn.q.bias": "bias"}
ENDS = {"attn.out.weight": "residual_end", "mlp.0.weight": "hidden", "mlp.2.weight": "residual_end"}
NORMS = {"norms.0.weight": "norm_scale", "norms.0.bias": "norm_shift"}
LOGITS = [({"attn.q.weight"}, {"attn.k.weight"}, False)]
FUSED_LOGITS = [({"qkv[0:8]"}, {"qkv[8:16]"}, False)]
FUSED = {"qkv[0:8]": "query", "qkv[8:16]": "key", "qkv[16:24]": "value"}
BY_HEAD = {"qkv[0:4][12:16]": "query", "qkv[4:8][16:20]": "key", "qkv[8:12][20:24]": "value"}
SEPARATE = {"q.weight": "query", "k.weight": "key", "v.weight": "value"}

CASES = [
    Case("pre-norm", PreNorm, sequence, QKV | ENDS | NORMS, [[{"attn.out.weight"}, {"mlp.2.weight"}]], logits=LOGITS, heads=[]),
    Case("post-norm", PostNorm, sequence, QKV | ENDS | NORMS, [[{"attn.out.weight"}, {"mlp.2.weight"}]], logits=LOGITS, heads=[]),
    Case("parallel", Parallel, sequence, QKV | ENDS, [[{"mlp.2.weight"}, {"attn.out.weight"}]], logits=LOGITS),
    Case("parallel-left", ParallelLeft, sequence, QKV | ENDS, [[{"mlp.2.weight"}, {"attn.out.weight"}]], logits=LOGITS),
    Case("fused-chunks", lambda: Fused(cut_chunks), sequence, FUSED, logits=FUSED_LOGITS, heads=[({"out.weight"}, W)]),
    Case("fused-permuted", lambda: Fused(cut_permuted, softmax_attention), sequence, FUSED, logits=FUSED_LOGITS),
    Case("fused-transposed", lambda: Fused(cut_permuted, transposed=True), sequence, FUSED, logits=FUSED_LOGITS),
    Case("fused-by-head", lambda: Fused(cut_by_head), sequence, BY_HEAD,
         logits=[({"qkv[0:4][12:16]"}, {"qkv[4:8][16:20]"}, False)]),
    Case("fused-rotary", lambda: Fused(cut_by_head, rotary_attention), sequence, BY_HEAD,
         logits=[({"qkv[0:4][12:16]"}, {"qkv[4:8][16:20]"}, False)]),
    Case("grouped-query", Grouped, sequence,
         {"qkv.weight[0:8]": "query", "qkv.weight[8:12]": "key", "qkv.weight[12:16]": "value", "qkv.bias": "bias"},
         logits=[({"qkv.weight[0:8]"}, {"qkv.weight[8:12]"}, False)]),
    Case("einsum", Einsum, sequence, {"q": "query", "k": "key", "v": "value", "out": "output_head"},
         logits=[({"q"}, {"k"}, False)], heads=[({"out"}, W)]),
    Case("multihead", lambda: encoder_layer(norm_first=True), sequence,
         {"self_attn.in_proj_weight[0:8]": "query", "self_attn.in_proj_weight[8:16]": "key",
          "self_attn.in_proj_weight[16:24]": "value", "self_attn.out_proj.weight": "residual_end", "linear1.weight": "hidden"},
         [[{"self_attn.out_proj.weight"}, {"linear2.weight"}]],
         logits=[({"self_attn.in_proj_weight[0:8]"}, {"self_attn.in_proj_weight[8:16]"}, False)]),
    Case("rotary", lambda: Attention(rotary_attention), sequence, SEPARATE, logits=[({"q.weight"}, {"k.weight"}, False)]),
    Case("normed-queries", NormedQueries, sequence,
         SEPARATE | {"q_norm.weight": "norm_scale", "k_norm.weight": "norm_scale", "k_norm.bias": "norm_shift"},
         logits=[({"q_norm.weight"}, {"k_norm.weight"}, True)]),
    Case("decoder", Decoder, lambda: (torch.randn(2, 5, W), torch.randn(2, 7, W)),
         {"own.q.weight": "query", "cross.k.weight": "key", "cross.v.weight": "value", "cross.out.weight": "residual_end"},
         [[{"own.out.weight"}, {"cross.out.weight"}]],
         logits=[({"own.q.weight"}, {"own.k.weight"}, False), ({"cross.q.weight"}, {"cross.k.weight"}, False)]),
    Case("resnet", lambda: nn.Sequential(ResidualBlock(downsample=True), ResidualBlock(), ResidualBlock()), image,
         {"0.conv2.weight": "hidden", "1.conv1.weight": "hidden", "1.bn2.weight": "norm_scale", "1.bn2.bias": "norm_shift"},
         [[{"1.bn2.weight"}, {"2.bn2.weight"}]], merges=[[{"0.bn2.weight"}, {"0.shortcut.2.weight"}]], heads=[]),
    Case("layer-scale", LayerScaled, image,
         {"gamma": "layer_scale", "narrow.weight": "hidden", "depthwise.weight": "depthwise", "norm.weight": "norm_scale"},
         [[{"gamma"}]]),
    Case("dense", Dense, image, {"one.weight": "hidden", "two.weight": "hidden"}),
    Case("inception", Inception, image, {"one.weight": "merge_end", "five.weight": "merge_end", "last.weight": "output_head"},
         merges=[[{"one.weight"}, {"three.weight"}, {"five.weight"}, set()]]),
    Case("siblings", Siblings, image, {"paths.0.0.weight": "hidden", "paths.2.2.weight": "merge_end"},
         merges=[[{"paths.1.2.weight"}, {"paths.2.2.weight"}, {"paths.0.2.weight"}]]),
    Case("u-net", UNet, image, {"down.weight": "hidden", "up.weight": "hidden", "up.bias": "bias", "last.weight": "output_head"}),
    Case("tied", lambda: Language(tied=True), lambda: (tokens(),),
         {"embed.weight": "tied_head", "places": "kept", "block.attn.q.weight": "query", "norm.weight": "norm_scale"},
         [[{"block.attn.out.weight"}, {"block.mlp.2.weight"}]],
         logits=[({"block.attn.q.weight"}, {"block.attn.k.weight"}, False)], heads=[({"embed.weight"}, 11)]),
    Case("loss", lambda: Language(tied=False, loss=True), lambda: (tokens(),),
         {"embed.weight": "embedding", "head.weight": "output_head"},
         [[{"block.attn.out.weight"}, {"block.mlp.2.weight"}]],
         logits=[({"block.attn.q.weight"}, {"block.attn.k.weight"}, False)], heads=[({"head.weight"}, 11)]),
    Case("swiglu", SwiGLU, sequence, {"gate.weight": "gate", "up.weight": "hidden", "down.weight": "residual_end"},
         [[{"down.weight"}]]),
    Case("swiglu-fused", lambda: SwiGLU(fused=True), sequence,
         {"gate.weight[0:16]": "gate", "gate.weight[16:32]": "hidden", "up.weight": "unused"}, [[{"down.weight"}]]),
    Case("glu", GLU, sequence, {"both.weight[0:8]": "hidden", "both.weight[8:16]": "gate"}, [[{"last.weight"}]]),
    Case("squeeze-excite", SqueezeExcite, image, {"conv.weight": "hidden", "reduce.weight": "hidden", "expand.weight": "gate"}),
    Case("experts", Experts, sequence, {"router.weight": "router", "up": "hidden", "down": "residual_end"}, [[{"down"}]]),
    Case("recurrent", Recurrent, sequence,
         {"lstm.weight_ih_l0": "recurrent", "gru.weight_hh_l0": "recurrent", "lstm.bias_ih_l0": "bias",
          "head.weight": "output_head"},
         heads=[({"head.weight"}, 3)]),
    Case("standardised", StandardisedConv, image, {"weight": "hidden", "gain": "norm_scale"}, [[{"gain"}]]),
    Case("weight-norm", WeightNormed, sequence,
         {"linear.parametrizations.weight.original0": "norm_scale", "linear.parametrizations.weight.original1": "hidden"},
         [[{"linear.parametrizations.weight.original0"}]]),
    Case("rms-norm", lambda: nn.Sequential(RMSNorm(), nn.Linear(W, W), RMSNorm(one_plus=True)), sequence,
         {"0.weight": "norm_scale", "1.weight": "hidden", "2.weight": "norm_scale"}, heads=[]),
    Case("hand-layer-norm", lambda: nn.Sequential(HandLayerNorm(), nn.Linear(W, 3)), sequence,
         {"0.g": "norm_scale", "0.b": "norm_shift", "1.weight": "output_head"}, heads=[({"1.weight"}, 3)]),
    Case("positions", Positions, sequence,
         {"token": "kept", "table": "kept", "relative.weight": "kept", "temperature": "temperature", "slope.weight": "slope",
          "unused": "unused", "q.weight": "query", "last.weight": "hidden"},
         logits=[({"q.weight"}, {"k.weight"}, False)], heads=[]),
    Case("state-space", StateSpace, sequence,
         {"decay": "log_scale", "shift": "kept", "skip": "layer_scale", "out.weight": "residual_end", "read.weight": "hidden"},
         [[{"out.weight"}]]),
    Case("interpolating", Interpolating, sequence, {"mix": "kept", "last.weight": "hidden"}),
    Case("sinks", SinkAttention, sequence,
         {"sink": "kept", "bias.weight": "kept", "q2.weight": "query", "v.weight": "value", "wide.weight": "hidden"},
         logits=[({"q.weight"}, {"k.weight"}, False), ({"q2.weight"}, {"k2.weight"}, False)], heads=[]),
    Case("multitask", Multitask, lambda: (torch.randn(4, W),),
         {"trunk.weight": "hidden", "one.weight": "output_head", "two.weight": "output_head", "aux.weight": "output_head"},
         heads=[({"one.weight"}, 3), ({"two.weight"}, 1), ({"aux.weight"}, 5)]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_roles_of_small_modules(case):
    torch.manual_seed(0)
    roles = roles_of(case.build(), *case.inputs())
    uses = {use.parameter + rows_text(use.rows): use for found in roles.uses.values() for use in found}
    found = {name: uses[name].role.value if name in uses and "[" in name else roles.of(name).value for name in case.roles}
    assert found == case.roles
    assert [levels(stream.branches) for stream in roles.streams] == case.streams
    assert [levels(merge.branches) for merge in roles.merges] == case.merges
    assert [(named(logits.queries), named(logits.keys), logits.is_normalised) for logits in roles.logits] == case.logits
    if case.heads is not None:
        assert [(named(head.setters), head.width) for head in roles.heads] == case.heads
    assert all(use.reason for found in roles.uses.values() for use in found)


def overridden(build: Callable[[], nn.Module], overrides: dict[str, str]) -> Roles:
    return infer_roles(capture(build(), sequence()), overrides)


def test_an_override_changes_uses_and_structures():
    roles = overridden(PreNorm, {"mlp.0.w*": "residual_end", "mlp.2.weight": "hidden", "attn.q.weight": "key"})
    assert [levels(stream.branches) for stream in roles.streams] == [[{"attn.out.weight"}, {"mlp.0.weight"}]]
    assert {roles.of(name).value for name in ("mlp.2.weight", "attn.k.weight")} == {"hidden", "key"}
    assert [(named(logits.queries), named(logits.keys)) for logits in roles.logits] == [
        (set(), {"attn.q.weight", "attn.k.weight"})
    ]
    branch = roles.streams[0].branches[1]
    assert branch.setters[0].use in roles.uses["mlp.0.weight"]
    assert "'mlp.0.w*'" in branch.setters[0].use.reason


def test_a_kept_parameter_leaves_all_structures():
    roles = overridden(PreNorm, {"attn.*.weight": "kept"})
    assert [levels(stream.branches) for stream in roles.streams] == [[set(), {"mlp.2.weight"}]]
    assert [(logits.queries, logits.keys) for logits in roles.logits] == [((), ())]


def test_an_override_makes_a_head():
    roles = overridden(lambda: nn.Sequential(nn.Linear(W, 5), nn.LayerNorm(5)), {"0.weight": "output_head"})
    assert [(named(head.setters), head.width) for head in roles.heads] == [({"0.weight"}, 5)]


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"mlp.7.weight": "hidden"}, UnknownNameError, ["'mlp.7.weight'", "Nearest: mlp."]),
        ({"mlp.0.weight": "residual"}, UnknownNameError, ["'residual'", "Nearest: residual_end"]),
        ({"attn.q.bias": "query"}, RoleConflictError, ["attn.q.bias cannot be query", "is added to the contraction"]),
        ({"norms.0.weight": "embedding"}, RoleConflictError, ["cannot be embedding", "norm_scale"]),
        ({"*.q.*t": "key", "attn.q.weight": "query"}, RoleConflictError, ["'*.q.*t'", "'attn.q.weight'", "key", "query"]),
        ({"attn.q.weight": "merge_end"}, RoleConflictError, ["merge_end", "reaches no branch"]),
    ],
)
def test_impossible_overrides_are_refused_with_both_reasons(overrides, error, words):
    with pytest.raises(error) as caught:
        overridden(PreNorm, overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


class Pair(nn.Module):
    """Two blocks with a projection each, on a stream."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(W, W), "proj": nn.Linear(W, W)}) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(W), nn.Linear(W, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["proj"](block["fc"](self.norm(x)).relu()).tanh()
        return self.head(x)


def test_a_module_path_names_those_of_its_parameters_that_can_take_the_role():
    roles = infer_roles(capture(Pair(), (torch.randn(2, W),)), {"blocks.*.fc": "residual_end"})
    assert {roles.of(f"blocks.{i}.fc.weight").value for i in range(2)} == {"residual_end"}
    assert roles.of("blocks.0.fc.bias").value == "bias"
    assert [{s.use.parameter for s in b.setters} for b in roles.streams[0].branches] == [
        {"blocks.0.fc.weight"},
        {"blocks.1.fc.weight"},
    ]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"blocks.*.porj": "residual_end"}, UnknownNameError, r"No parameter and no module .*Nearest: blocks\.\d\.proj"),
        ({"norm": "residual_end", "nor*": "norm_scale"}, RoleConflictError, "asked to be two things"),
        ({"blocks.0.fc": "embedding"}, RoleConflictError, "cannot be embedding.*by the graph it is hidden"),
    ],
)
def test_module_paths_that_cannot_be_meant(overrides, error, message):
    with pytest.raises(error, match=message):
        infer_roles(capture(Pair(), (torch.randn(2, W),)), overrides)


class Broadcast(nn.Module):
    """One layer for both factors, of which one is spread over positions, together with the other."""

    def __init__(self):
        super().__init__()
        self.both = nn.Linear(W, 2 * W)
        self.out = nn.Linear(W, W)

    def forward(self, x):
        a, b = self.both(x).chunk(2, dim=-1)
        spread, other = torch.broadcast_tensors(b[:, :1], a)
        return self.out(torch.cat([spread, other], dim=0) + other.sum())


def test_what_is_broadcast_together_keeps_its_own_coordinates():
    graph = capture(Broadcast(), (torch.randn(2, 5, W),))
    wiring = wire(graph)
    source = next(i for i, name in enumerate(wiring.names) if name == "linear")
    targets = [i for i, node in enumerate(wiring.nodes) if wiring.names[i] == "getitem" and "broadcast" in str(node.args[0])]
    found = arriving(wiring, source, numbered((2, 5, 2 * W), 2), targets, range(len(wiring.nodes)))
    assert len(targets) == 2
    assert set(values_of(found).tolist()) == set(range(2 * W))


def cut_backwards(h):
    return cut_chunks(h)[::-1]


def test_blocks_one_after_the_other_have_the_roles_of_each_by_itself():
    x = torch.randn(2, 5, W)
    cuts = [cut_chunks, cut_backwards, cut_chunks, cut_by_head, cut_permuted, cut_backwards]
    found = roles_of(nn.Sequential(*map(Fused, cuts)), x).uses
    for i, cut in enumerate(cuts):
        alone = roles_of(nn.Sequential(Fused(cut)), x).uses["0.qkv"]
        assert [(use.role, use.rows) for use in found[f"{i}.qkv"]] == [(use.role, use.rows) for use in alone]
