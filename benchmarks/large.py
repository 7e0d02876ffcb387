"""Models that no memory here could hold, on the meta device: ``python -m benchmarks.large NAME`` prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from benchmarks.stages import peak_megabytes, time_stage

import gainstage as gs
from gainstage.cli.huggingface import cpu_torchvision_if_installed
from gainstage.report.progress import progress_bar

TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Large:
    """One piece of work without weights. The peak is that of the whole process, libraries included."""

    model: str
    work: str
    parameters: int
    seconds: float
    processor_seconds: float
    peak_megabytes: float
    libraries_megabytes: float  # the peak before the model was built
    outcome: str = ""


def _llama(**shape: int) -> Any:
    """Shapes of Llama 2 (H. Touvron et al. 2023, arXiv:2307.09288) and 3 (A. Grattafiori et al. 2024, arXiv:2407.21783)."""
    import transformers

    sizes = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192} | shape
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, use_cache=False))


def _deepseek() -> Any:
    """DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437, section 4.2), which Transformers has as its default shape."""
    import transformers

    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(use_cache=False))


_PLANNED: dict[str, Callable[[], Any]] = {
    "llama-70b": lambda: _llama(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "llama-405b": lambda: _llama(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128),
    "deepseek-v3": _deepseek,
}
_VERIFIED: dict[str, Callable[[], Any]] = {
    "llama-7b": lambda: _llama(num_key_value_heads=32, vocab_size=32000),
}
MODELS = (*_PLANNED, *_VERIFIED)


def measure(name: str) -> Large:
    """Build on the meta device, and plan, or draw and verify."""
    cpu_torchvision_if_installed()
    import transformers  # noqa: F401  (counts as a library)

    libraries = peak_megabytes()
    with torch.device("meta"):
        model = {**_PLANNED, **_VERIFIED}[name]()
    if name in _PLANNED:
        tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
        stage, plan = time_stage("plan", lambda: gs.plan(model, (), {"input_ids": tokens}), repetitions=1)
        assert len(plan.parameters) == len(list(model.parameters()))
        outcome = ""
    else:
        inputs = {"input_ids": torch.randint(32000, (4, 16), generator=torch.Generator().manual_seed(0))}
        plan = gs.plan(model, (), inputs)
        with progress_bar("operations") as advance:
            stage, check = time_stage("verify", lambda: gs.verify(model, (), inputs, plan=plan, progress=advance), repetitions=1)
        outcome = f"{sum(row.ok for row in check.rows)} of {len(check.rows)} module outputs as predicted"
    return Large(
        model=name,
        work="plan" if name in _PLANNED else "draw and verify",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=stage.seconds,
        processor_seconds=stage.processor_seconds,
        peak_megabytes=peak_megabytes(),
        libraries_megabytes=libraries,
        outcome=outcome,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1]))))
