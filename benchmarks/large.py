"""Planning a model that no memory here could hold, on the meta device: ``python -m benchmarks.large NAME`` prints JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

import torch
from benchmarks.stages import peak_megabytes, time_stage

import gainstage as gs
from gainstage.cli.huggingface import cpu_torchvision_if_installed

TOKENS = 128

# The shapes of Llama 3 (A. Grattafiori et al. 2024, arXiv:2407.21783, table 3).
_SHAPES = {
    "llama-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "llama-405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
MODELS = tuple(_SHAPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Large:
    """One plan without weights. The peak is that of the whole process, libraries included."""

    model: str
    parameters: int
    seconds: float
    processor_seconds: float
    peak_megabytes: float
    libraries_megabytes: float  # the peak before the model was built


def measure(name: str) -> Large:
    """Build on the meta device, and plan."""
    cpu_torchvision_if_installed()
    import transformers

    configuration = transformers.LlamaConfig(
        **_SHAPES[name], num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, use_cache=False
    )
    libraries = peak_megabytes()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(configuration)
        tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
    stage, plan = time_stage("plan", lambda: gs.plan(model, (), {"input_ids": tokens}), repetitions=1)
    assert len(plan.parameters) == len(list(model.parameters()))
    return Large(
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=stage.seconds,
        processor_seconds=stage.processor_seconds,
        peak_megabytes=peak_megabytes(),
        libraries_megabytes=libraries,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1]))))
