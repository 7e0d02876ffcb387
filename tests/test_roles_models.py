"""Roles of real models, every parameter of them: patterns in order, the first that matches says what the parameter must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.capture import capture
from gainstage.cli.huggingface import cpu_torchvision_if_installed
from gainstage.roles import Roles, infer_roles
from gainstage.roles.infer import _Inference
from gainstage.roles.sites import find_sites
from gainstage.roles.wiring import wire

Built = tuple[nn.Module, tuple, dict]


def vision(library: str, name: str) -> Callable[[], Built]:
    def build() -> Built:
        cpu_torchvision_if_installed()
        module = pytest.importorskip(library)
        model = module.models.get_model(name, weights=None) if library == "torchvision" else module.create_model(name)
        return model.train(), (torch.randn(2, 3, 224, 224),), {}

    return build


def language(config: str, head: str, **options) -> Callable[[], Built]:
    def build() -> Built:
        cpu_torchvision_if_installed()
        transformers = pytest.importorskip("transformers")
        settings = {"vocab_size": 97, "use_cache": False, **options}
        model = getattr(transformers, head)(getattr(transformers, config)(**settings))
        inputs = {"input_ids": torch.randint(3, 97, (2, 8))}
        if head.startswith("T5"):
            inputs["decoder_input_ids"] = torch.randint(3, 97, (2, 6))
        return model.train(), (), inputs

    return build


@dataclass(frozen=True)
class Case:
    """``streams``: the number of branches of each; ``logits``, ``merges``: how many; ``heads``: names of what sets each."""

    name: str
    build: Callable[[], Built]
    roles: tuple[tuple[str, str], ...]
    streams: list[int]
    merges: int
    logits: int
    heads: list[str]


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
DECODER = (
    ("*.q_proj.weight", "query"), ("*.k_proj.weight", "key"), ("*.v_proj.weight", "value"), ("*norm.weight", "norm_scale"),
    ("*.gate_proj.weight", "gate"), ("*.up_proj.weight", "hidden"),
)  # fmt: skip
DECODER_ENDS = (("*.o_proj.weight", "residual_end"), ("*.down_proj.weight", "residual_end"))
NORM = (("*norm*.weight", "norm_scale"), ("*norm*.bias", "norm_shift"))
TIMM_END = (("head*.weight", "output_head"), ("*bias", "bias"))

CASES = [
    Case("resnet50", vision("torchvision", "resnet50"),
         (("*bn?.weight", "norm_scale"), ("*bn?.bias", "norm_shift"), ("*downsample.1.weight", "norm_scale"),
          ("*downsample.1.bias", "norm_shift"), ("fc.weight", "output_head"), ("fc.bias", "bias"), ("*", "hidden")),
         [2, 3, 5, 2], 4, 0, ["fc.weight"]),
    Case("deit", vision("timm", "deit_tiny_patch16_224"),
         (("cls_token", "kept"), ("pos_embed", "kept"), *NORM, ("*qkv.weight", "query"), ("*attn.proj.weight", "residual_end"),
          ("*fc2.weight", "residual_end"), *TIMM_END, ("*", "hidden")),
         [24], 0, 12, ["head.weight"]),
    Case("nfnet", vision("timm", "nfnet_l0"),
         (("*.gain", "norm_scale"), ("*attn_last.fc2.weight", "gate"), *TIMM_END, ("*", "hidden")),
         [1, 5, 2], 4, 0, ["head.fc.weight"]),
    Case("xcit", vision("timm", "xcit_nano_12_p16_224"),
         (("cls_token", "kept"), ("*temperature", "temperature"),
          ("*gamma?", "layer_scale"), ("*proj.6.1.weight", "norm_scale"), *NORM,
          ("*.bn.weight", "norm_scale"), ("*.bn.bias", "norm_shift"), ("patch_embed.proj.*.1.weight", "norm_scale"),
          ("patch_embed.proj.*.1.bias", "norm_shift"), ("*qkv.weight", "query"), ("*attn.q.weight", "query"),
          ("*attn.k.weight", "key"), ("*attn.v.weight", "value"), ("*local_mp.conv?.weight", "depthwise"),
          ("*token_projection.weight", "merge_end"), *TIMM_END, ("*", "hidden")),
         [36, 1, 2, 1], 1, 14, ["head.weight"]),
    Case("gpt2", language("GPT2Config", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=16),
         (("*wte.weight", "tied_head"), ("*wpe.weight", "embedding"), ("*.ln_?.weight", "norm_scale"),
          ("*.ln_?.bias", "norm_shift"), ("*c_attn.weight", "query"),
          ("*c_proj.weight", "residual_end"), ("*c_fc.weight", "hidden"), ("*", "bias")),
         [4], 1, 2, ["transformer.wte.weight"]),
    Case("llama", language("LlamaConfig", "LlamaForCausalLM", **GROUPED),
         (*DECODER, *DECODER_ENDS, ("*embed_tokens.weight", "embedding"), ("lm_head.weight", "output_head")),
         [4], 0, 2, ["lm_head.weight"]),
    Case("gemma2", language("Gemma2Config", "Gemma2ForCausalLM", **GROUPED),
         (*DECODER, ("*embed_tokens.weight", "tied_head"), ("*", "hidden")), [4], 0, 2, ["model.embed_tokens.weight"]),
    Case("mixtral", language("MixtralConfig", "MixtralForCausalLM", num_local_experts=3, **GROUPED),
         (*DECODER, ("*.o_proj.weight", "residual_end"), ("*gate_up_proj", "gate"), ("*down_proj", "residual_end"),
          ("*gate.weight", "router"), ("*embed_tokens.weight", "embedding"), ("lm_head.weight", "output_head")),
         [4], 0, 2, ["lm_head.weight"]),
    Case("bert", language("BertConfig", "BertForMaskedLM", **SMALL),
         (("*word_embeddings.weight", "tied_head"), ("*embeddings.weight", "embedding"), ("*LayerNorm.weight", "norm_scale"),
          ("*LayerNorm.bias", "norm_shift"), ("*query.weight", "query"), ("*key.weight", "key"), ("*value.weight", "value"),
          ("*output.dense.weight", "residual_end"), ("*dense.weight", "hidden"), ("*", "bias")),
         [4], 1, 2, ["bert.embeddings.word_embeddings.weight"]),
    Case("t5", language("T5Config", "T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
         (("shared.weight", "tied_head"), ("*.q.weight", "query"), ("*.k.weight", "key"), ("*.v.weight", "value"),
          ("*.o.weight", "residual_end"), ("*.wo.weight", "residual_end"), ("*.wi.weight", "hidden"),
          ("*relative_attention_bias.weight", "kept"), ("*norm.weight", "norm_scale")),
         [4, 6], 0, 6, ["shared.weight"]),
]  # fmt: skip


def expected_role(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    return next((role for pattern, role in patterns if fnmatchcase(name, pattern)), "no pattern matches")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_parameter_of_a_real_model(case):
    torch.manual_seed(0)
    model, args, kwargs = case.build()
    roles: Roles = infer_roles(capture(model, args, kwargs))
    found = {name: roles.of(name).value for name in roles.uses}
    assert found == {name: expected_role(name, case.roles) for name in found}
    assert [len(stream.branches) for stream in roles.streams] == case.streams
    assert all(branch.setters for stream in roles.streams for branch in stream.branches)
    assert (len(roles.merges), len(roles.logits)) == (case.merges, case.logits)
    assert [setter.use.parameter for head in roles.heads for setter in head.setters] == case.heads


@pytest.mark.parametrize(("config", "head"), [("LlamaConfig", "LlamaForCausalLM"), ("GPT2Config", "GPT2LMHeadModel")])
def test_blocks_that_repeat_are_walked_through_once(config, head):
    """Each block makes views of the rotary tables for itself."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4} | ({} if head.startswith("GPT2") else {"intermediate_size": 64})
    found = []
    for layers in (2, 4):
        model, args, kwargs = language(config, head, num_hidden_layers=layers, **sizes)()
        wiring = wire(capture(model, args, kwargs))
        _Inference(wiring, find_sites(wiring)).roles()
        found.append(len(wiring.arrived))
    assert found[0] == found[1] > 0


class Boxes(nn.Module):
    """Sizes of boxes by an exponential around a reference, of two groups with a head each, as detectors refine them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.read = nn.ModuleList([nn.Linear(32, 4) for _ in range(2)]), nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.read(torch.cat([0.02 * head(x).exp() for head in self.heads], 1)))


def test_no_level_is_asked_of_an_exponential() -> None:
    """Both groups would be loud enough to merge only by ``E[exp(u)^2] = exp(2 E[u^2])``: by a few boxes that are huge."""
    plan = gs.plan(Boxes(), (torch.randn(8, 6, 32),))
    assert plan.predictions["heads.0@0"][0] == pytest.approx(1.0, rel=0.05)
