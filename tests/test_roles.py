"""Roles are read off the graph: small modules of every kind, with what each parameter must be for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from role_maps import Dense, Inception, LayerScaled, ResidualBlock, Siblings, SqueezeExcite, StandardisedConv, UNet
from role_models import (
    GLU,
    Attention,
    Decoder,
    Einsum,
    Experts,
    Fused,
    Grouped,
    HandLayerNorm,
    Interpolating,
    Language,
    Multitask,
    NormedQueries,
    Parallel,
    ParallelLeft,
    Positions,
    PostNorm,
    PreNorm,
    Recurrent,
    RMSNorm,
    SinkAttention,
    StateSpace,
    SwiGLU,
    W,
    WeightNormed,
    cut_by_head,
    cut_chunks,
    cut_permuted,
    encoder_layer,
    rotary_attention,
    softmax_attention,
    tokens,
)
from torch import nn

from gainstage.capture import capture
from gainstage.errors import RoleConflictError, UnknownNameError
from gainstage.roles import Branch, Roles, Setter, infer_roles
from gainstage.roles.coordinates import arriving, numbered, values_of
from gainstage.roles.wiring import wire


def roles_of(model, *args, **kwargs) -> Roles:
    return infer_roles(capture(model, args, kwargs))


def named(setters: tuple[Setter, ...]) -> set[str]:
    return {setter.use.parameter + rows_text(setter.use.rows) for setter in setters}


def rows_text(rows) -> str:
    return "".join(f"[{start}:{stop}]" for start, stop in rows)


def levels(branches: tuple[Branch, ...]) -> list[set[str]]:
    return [named(branch.setters) for branch in branches]


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
