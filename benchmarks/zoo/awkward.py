"""34 models that are hard to read: code that looks at values, autograd inside forward, index-based experts, complex numbers.

Widths are such that one draw stays near the average over draws; what is awkward about each does not depend on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.zoo.reference import Example, seeded
from torch import nn
from torch.utils.checkpoint import checkpoint

from gainstage.cli.models import cpu_torchvision

WIDTH = 64


class _Scripted(nn.Module):
    """A module whose forward is a function of itself and the inputs; ``m`` are its submodules."""

    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.m = nn.ModuleList(modules)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def _square() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def _rows() -> torch.Tensor:
    return torch.randn(64, WIDTH)


def _sequences(length: int = 12) -> torch.Tensor:
    return torch.randn(8, length, WIDTH)


def _branch_on_a_sum(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    return s.m[0](x) if x.sum() > 0 else s.m[1](x)


def _count_as_factor(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    h = s.m[0](x)
    count = (h > 0).sum().item()
    return h * count


def _fixed_point(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    z = torch.zeros_like(x)
    for _ in range(30):
        after = torch.tanh(0.5 * s.m[0](z) + x)
        if (after - z).norm() < 1e-4:
            break
        z = after
    return z


def _dropped_layers(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    for layer in s.m:
        if s.training and torch.rand([]) < 0.3:
            continue
        x = layer(x)
    return x


def _scale_by_numpy(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    h = s.m[0](x)
    return h * float(abs(h.detach().numpy()).max())


def _top1_experts(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    gate, *experts = s.m
    chosen = gate(x).argmax(-1)
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        j = (chosen == number).nonzero().squeeze(-1)
        if len(j) > 0:
            out[j] = expert(x[j])
    return out


def _packed_sequence(s: _Scripted, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(s.m[0](packed)[0], batch_first=True)[0]


def _constant_on_cpu(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    return s.m[0](x) + torch.arange(WIDTH, device="cpu")


def _derivative(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    x.requires_grad_(True)
    return torch.autograd.grad(s.m[0](x).sum(), x, create_graph=True)[0]


class _Square(torch.autograd.Function):
    """x^2, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2.0 * x * g


def _own_backward(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    return _Square.apply(s.m[0](x))


def _checkpointed(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(s.m[0], x, use_reentrant=False)


def _stored(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    s.cache = s.m[0](x)
    return s.cache * 2


def _messages(s: _Scripted, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    h = s.m[0](x)
    return torch.zeros_like(h).index_add_(0, edges[1], h[edges[0]])


class _Spectral(nn.Module):
    """A linear map of each frequency, complex."""

    def __init__(self, length: int) -> None:
        super().__init__()
        scale = (2 * WIDTH) ** -0.5
        self.W = nn.Parameter(scale * torch.randn(length // 2 + 1, WIDTH, WIDTH, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(x, dim=1)
        return torch.fft.irfft(torch.einsum("bfi,fio->bfo", spectrum, self.W), n=x.shape[1], dim=1)


def _recurrent_head(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    return s.m[1](s.m[0](x)[0])


def _self_attention(s: _Scripted, x: torch.Tensor) -> torch.Tensor:
    return s.m[0](x, x, x, need_weights=False)[0]


def _mlp(act: type[nn.Module], outputs: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(_square(), act(), nn.Linear(WIDTH, outputs))


def _scripted(function: Callable[..., Any], modules: Callable[[], tuple[nn.Module, ...]], *args: Callable[[], Any]) -> Any:
    return lambda: Example(_Scripted(function, *modules()), tuple(argument() for argument in args))


def _encoder() -> Example:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
    return Example(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (_sequences(),))


def _compiled() -> Example:
    return Example(nn.Sequential(_square(), torch.compile(nn.Sequential(_square(), nn.ReLU())), _square()), (_rows(),))


def _timm_model(name: str, size: int, **options: Any) -> Callable[[], Example]:
    def build() -> Example:
        cpu_torchvision()
        import timm

        return Example(timm.create_model(name, num_classes=10, **options), (torch.randn(2, 3, size, size),))

    return build


def _torchvision_resnet() -> Example:
    return Example(cpu_torchvision().models.resnet18(num_classes=10), (torch.randn(2, 3, 64, 64),))


def _transformer(name: str, config: dict[str, Any], inputs: Callable[[], dict[str, torch.Tensor]]) -> Callable[[], Example]:
    """A small Transformers model: class name, sizes, keyword inputs."""

    def build() -> Example:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        cpu_torchvision()  # before transformers, which imports it
        import transformers

        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**config))
        return Example(model, (), inputs())

    return build


def _tokens(**more: Callable[[], torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"input_ids": torch.randint(3, 100, (2, 16)), **{name: make() for name, make in more.items()}}


_DECODER = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_T5 = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "use_cache": False}
_WHISPER = {
    "vocab_size": 100, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 20, "max_source_positions": 32,
    "max_target_positions": 32, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip

_BUILDERS: dict[str, Callable[[], Example]] = {
    "ifdata": _scripted(_branch_on_a_sum, lambda: (_square(), _square()), _rows),
    "item": _scripted(_count_as_factor, lambda: (_square(),), _rows),
    "whilefix": _scripted(_fixed_point, lambda: (_square(),), _rows),
    "layerdrop": _scripted(_dropped_layers, lambda: (_square(), _square(), _square(), _square()), _rows),
    "numpy_": _scripted(_scale_by_numpy, lambda: (_square(),), _rows),
    "moe": _scripted(_top1_experts, lambda: (nn.Linear(WIDTH, 4), _square(), _square(), _square(), _square()), _rows),
    "packed": _scripted(
        _packed_sequence, lambda: (nn.LSTM(WIDTH, WIDTH, batch_first=True),), _sequences, lambda: torch.arange(12, 4, -1)
    ),
    "lazy": lambda: Example(nn.Sequential(nn.LazyLinear(WIDTH)), (_rows(),)),
    "hardcpu": _scripted(_constant_on_cpu, lambda: (_square(),), _rows),
    "compiled": _compiled,
    "pinn": _scripted(_derivative, lambda: (_mlp(nn.Tanh, 1),), _rows),
    "autof": _scripted(_own_backward, lambda: (_square(),), _rows),
    "ckpt": _scripted(_checkpointed, lambda: (_mlp(nn.ReLU),), _rows),
    "mutattr": _scripted(_stored, lambda: (_square(),), _rows),
    "gnn": _scripted(_messages, lambda: (_square(),), _rows, lambda: torch.randint(0, 64, (2, 120))),
    "fft": lambda: Example(_Spectral(16), (_sequences(16),)),
    "lstm": _scripted(
        _recurrent_head,
        lambda: (nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.2), nn.Linear(WIDTH, 10)),
        _sequences,
    ),
    "gru": _scripted(_recurrent_head, lambda: (nn.GRU(WIDTH, WIDTH, 2, batch_first=True), nn.Linear(WIDTH, 10)), _sequences),
    "mha": _scripted(_self_attention, lambda: (nn.MultiheadAttention(WIDTH, 4, batch_first=True),), _sequences),
    "tenc": _encoder,
    "tv_resnet": _torchvision_resnet,
    "timm_vit": _timm_model("vit_tiny_patch16_224", 64, img_size=64),
    "timm_convnext": _timm_model("convnext_atto", 64),
    "timm_swin": _timm_model("swin_tiny_patch4_window7_224", 56, img_size=56),
    "timm_effnet": _timm_model("efficientnet_b0", 64),
    "timm_nfnet": _timm_model("dm_nfnet_f0", 64),
    "llama": _transformer("LlamaForCausalLM", _DECODER, _tokens()),
    "gpt2": _transformer("GPT2LMHeadModel", _GPT2, _tokens()),
    "bert": _transformer(
        "BertForMaskedLM", {**_DECODER, "num_key_value_heads": 4}, _tokens(attention_mask=lambda: torch.ones(2, 16).long())
    ),
    "t5": _transformer(
        "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}, _tokens(labels=lambda: torch.randint(3, 100, (2, 8)))
    ),
    "mixtral": _transformer("MixtralForCausalLM", {**_DECODER, "num_local_experts": 4}, _tokens()),
    "mamba": _transformer(
        "MambaForCausalLM", {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "use_cache": False}, _tokens()
    ),
    "whisper": _transformer(
        "WhisperForConditionalGeneration",
        _WHISPER,
        lambda: {"input_features": torch.randn(2, 20, 64), "decoder_input_ids": torch.randint(3, 100, (2, 8))},
    ),
    "vit": _transformer(
        "ViTForImageClassification",
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
         "patch_size": 8},
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
}  # fmt: skip


def awkward_models() -> dict[str, Callable[[int], Example]]:
    """Name -> builder of a model in train mode; weights and inputs depend on the seed alone."""
    return {name: seeded(build) for name, build in _BUILDERS.items()}
