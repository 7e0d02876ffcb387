"""Seconds and memory of every stage on one model, in a process of its own: ``python -m benchmarks.stages NAME`` prints JSON.

Memory of a stage is how much it raised the peak of the resident set, so what an earlier stage had taken already is not counted
again. Forward passes end the run, as they would hide what came after them.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from benchmarks.zoo.reference import Example, reference_models

from gainstage.api import measured_input, moments_of, on_host
from gainstage.apply import apply
from gainstage.capture import capture
from gainstage.cli.huggingface import cpu_torchvision_if_installed
from gainstage.graph import ParameterInfo
from gainstage.policies import find_policy
from gainstage.propagate import parameter_moments, parameter_value, propagate
from gainstage.roles import infer_roles
from gainstage.signal import Value
from gainstage.solve import Present, find_family, solve

MODELS = ("torchvision:resnet50", "torchvision:vit_b_16", "gpt2", "llama")
REPETITIONS = 3

_GPT2 = {"use_cache": False}
_LLAMA = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "use_cache": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Best times of some calls, and by how much the first one raised the peak memory."""

    name: str
    seconds: float
    processor_seconds: float  # of all threads: what the call would take on a machine with nothing else to do, on one thread
    megabytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """All stages of one model, with what they are compared to."""

    model: str
    parameters: int
    nodes: int
    stages: tuple[Stage, ...]
    forward: Stage  # one pass without gradients, same batch
    build: Stage  # the model's constructor, with its own torch.nn.init


def measure(name: str) -> Timing:
    """Build the model and go through the stages."""
    example = build(name)
    stages: list[Stage] = []

    def stage(title: str, call: Callable[[], Any]) -> Any:
        timed, result = time_stage(title, call)
        stages.append(timed)
        return result

    model = example.model
    graph = stage("capture", lambda: capture(model, example.args, example.kwargs))
    moments = parameter_moments({key: tensor for key, tensor in model.named_parameters() if key in graph.parameters})
    order = {key: index for index, key in enumerate(graph.parameters)}

    def parameter(info: ParameterInfo) -> Value:
        return parameter_value(info, order[info.name], *moments[info.name])

    with on_host():  # as inspect and plan do
        stage("propagate", lambda: propagate(graph, parameter, measured_input))
        roles = stage("roles", lambda: infer_roles(graph, None))
        present = Present(moments=moments_of(model), kept={})
        unit, normal = find_policy("unit"), find_family("normal")
        plan = stage("solve", lambda: solve(graph, roles, unit, present=present, source=measured_input, family=normal))
    stage("apply", lambda: apply(model, plan))
    with torch.no_grad():
        forward, _ = time_stage("forward", lambda: model(*example.args, **(example.kwargs or {})))
    rebuilt, _ = time_stage("constructor", lambda: build(name))
    return Timing(
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        nodes=len(graph.nodes),
        stages=tuple(stages),
        forward=forward,
        build=rebuilt,
    )


def build(name: str) -> Example:
    """A reference model, or a Transformers model of the size of GPT-2 small."""
    models = reference_models()
    if name in models:
        return models[name](0)
    cpu_torchvision_if_installed()
    import transformers

    configuration = transformers.GPT2Config(**_GPT2) if name == "gpt2" else transformers.LlamaConfig(**_LLAMA)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration).train()
    return Example(model, (), {"input_ids": torch.randint(1000, (2, 128))})


def peak_megabytes() -> float:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def time_stage(name: str, call: Callable[[], Any], *, repetitions: int = REPETITIONS) -> tuple[Stage, Any]:
    """Times of a call, best of some, and its result."""
    before = peak_megabytes()
    wall, processor, megabytes, result = [], [], 0.0, None
    for repetition in range(repetitions):
        starts = time.perf_counter(), time.process_time()
        result = call()
        wall.append(time.perf_counter() - starts[0])
        processor.append(time.process_time() - starts[1])
        if repetition == 0:
            megabytes = peak_megabytes() - before
    return Stage(name=name, seconds=min(wall), processor_seconds=min(processor), megabytes=megabytes), result


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1]))))
