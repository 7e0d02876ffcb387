"""Plan.to_python: a script that runs without Gainstage, draws what was planned, and with its stream the very same bits."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from gainstage.apply import apply
from gainstage.cli.huggingface import cpu_torchvision_if_installed
from gainstage.plan import Block, Distribution, Family, Mixing, ParameterPlan, Plan

NORMAL = Distribution(family=Family.NORMAL, mean=0.25, std=0.5)
TRUNCATED = Distribution(family=Family.TRUNCATED_NORMAL, std=0.1)
UNIFORM = Distribution(family=Family.UNIFORM, mean=-1.0, std=0.3)
ORTHOGONAL = Distribution(family=Family.ORTHOGONAL, std=0.2)
DELTA = Distribution(family=Family.DELTA_ORTHOGONAL, std=0.2)
CONSTANT = Distribution(family=Family.CONSTANT, mean=1.5)
KEEP = Distribution(family=Family.KEEP)
_MATRIX = np.linspace(-1.0, 2.0, 60).reshape(2, 30) ** 2


def mixed(matrix):
    mixing, std = Mixing.by("mixed.weight", matrix)
    return Distribution(family=Family.MIXED, std=std, mixing=mixing)


class Block2(nn.Module):
    def __init__(self):
        super().__init__()
        self.fused = nn.Linear(40, 120)
        self.kernel = nn.Conv1d(40, 40, 3, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(3.0))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 40)
        self.layers = nn.ModuleList(Block2() for _ in range(3))
        self.mixed = nn.Conv1d(10, 7, 3)
        self.head = nn.Linear(40, 100).bfloat16()
        self.head.weight = self.embedding.weight


def plan():
    def planned(name, *shape, **fields):
        return ParameterPlan(name=name, shape=shape, role="test", **{"dtype": "float32", **fields})

    thirds = tuple(Block(0, 40 * i, 40 * i + 40, d) for i, d in enumerate((ORTHOGONAL, UNIFORM, KEEP)))
    parameters = [planned("embedding.weight", 100, 40, aliases=("head.weight",), distribution=NORMAL)]
    for i in range(3):
        parameters += [
            planned(f"layers.{i}.scale", distribution=CONSTANT),
            planned(f"layers.{i}.fused.weight", 120, 40, distribution=KEEP, blocks=thirds, derivation=('v = "1/d"', "= 1\\40")),
            planned(f"layers.{i}.fused.bias", 120, distribution=TRUNCATED if i == 1 else CONSTANT),
            planned(f"layers.{i}.kernel.weight", 40, 40, 3, dtype="float64", distribution=DELTA),
            planned(f"layers.{i}.kernel.bias", 40, dtype="float64", distribution=UNIFORM),
        ]
    parameters.append(planned("mixed.weight", 7, 10, 3, distribution=mixed(_MATRIX)))
    parameters.append(planned("mixed.bias", 7, distribution=mixed(-_MATRIX @ np.ones((30, 1)))))
    parameters.append(planned("head.bias", 100, dtype="bfloat16", distribution=NORMAL))
    return Plan(
        policy="unit", fingerprint="", training=True, parameters={p.name: p for p in parameters}, notes=('He said """no""" \\ ',)
    )


def namespace(made):
    found = {"__name__": "script"}
    exec(compile(made.to_python(), "script.py", "exec"), found)  # noqa: S102  (it is our own)
    return found


def filled():
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    return model


@pytest.mark.parametrize("seed", [0, -12])
def test_with_its_own_stream_the_script_gives_the_same_bits(seed):
    ours, theirs = filled(), filled()
    apply(ours, plan(), seed=seed)
    namespace(plan())["initialize_exactly"](theirs, seed=seed)
    for (name, first), second in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("family", [Family.NORMAL, Family.TRUNCATED_NORMAL, Family.UNIFORM])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_stream_of_the_script_over_a_million_values(family, dtype):
    """Tails included: 45,000 of these lie there."""
    parameter = ParameterPlan(
        name="w", shape=(1000, 1000), dtype=dtype, role="test", distribution=Distribution(family=family, mean=0.1, std=0.3)
    )
    made = Plan(policy="unit", fingerprint="", training=True, parameters={"w": parameter})
    models = []
    for write in (lambda model: apply(model, made), namespace(made)["initialize_exactly"]):
        model = nn.Module()
        model.register_parameter("w", nn.Parameter(torch.empty(1000, 1000, dtype=getattr(torch, dtype))))
        write(model)
        models.append(model)
    assert torch.equal(models[0].w, models[1].w)


def assert_drawn_as_planned(model):
    """Means and deviations within five standard errors; structures exactly."""
    for parameter in plan().parameters.values():
        tensor = model.get_parameter(parameter.name).detach().double()
        parts = [(tensor.narrow(b.dim, b.start, b.stop - b.start), b.distribution) for b in parameter.blocks]
        for part, distribution in parts or [(tensor, parameter.distribution)]:
            if distribution.family is Family.KEEP:
                assert (part == 7).all()
            elif distribution.family.is_matrix:
                assert part.square().mean().item() == pytest.approx(distribution.std**2, rel=1e-5)
            elif distribution.family is Family.CONSTANT:
                assert (part == distribution.mean).all()
            elif distribution.mixing is not None:
                weight, bias = model.mixed.weight.detach().double(), model.mixed.bias.detach().double()
                torch.testing.assert_close(bias, -weight.sum((1, 2)), atol=1e-5, rtol=1e-5)  # both of the same rows
                directions = np.linalg.pinv(_MATRIX)
                rows = torch.from_numpy(weight.flatten(1).numpy() @ directions)
                torch.testing.assert_close(rows.square().sum(1), torch.full((7,), 2.0, dtype=torch.float64), atol=1e-5, rtol=1e-5)
            else:
                error = 5 * distribution.std / math.sqrt(part.numel())
                assert part.mean().item() == pytest.approx(distribution.mean, abs=error)
                assert part.std().item() == pytest.approx(distribution.std, abs=error)


def test_with_the_generator_of_torch_the_script_draws_what_was_planned():
    torch.manual_seed(0)
    model = filled()
    namespace(plan())["initialize"](model)
    assert_drawn_as_planned(model)
    assert model.layers[1].fused.bias.detach().abs().max() <= 0.2 / math.sqrt(0.773)
    query = model.layers[0].fused.weight.detach()[:40]
    torch.testing.assert_close(query @ query.T, 40 * 0.04 * torch.eye(40), atol=1e-5, rtol=1e-5)
    assert (model.layers[0].kernel.weight[:, :, [0, 2]] == 0).all()


def test_layers_that_are_alike_share_a_rule():
    rules = namespace(plan())["RULES"]
    assert [rule.pattern for rule in rules] == [
        r"embedding\.weight",
        r"layers\.(?:0|1|2)\.scale",
        r"layers\.(?:0|1|2)\.fused\.weight",
        r"layers\.(?:0|2)\.fused\.bias",
        r"layers\.(?:0|1|2)\.kernel\.weight",
        r"layers\.(?:0|1|2)\.kernel\.bias",
        r"layers\.1\.fused\.bias",
        r"mixed\.weight",
        r"mixed\.bias",
        r"head\.bias",
    ]
    with pytest.raises(KeyError, match=r"no rule for layers\.3\.scale"):
        namespace(plan())["rule_of"]("layers.3.scale")


def test_the_script_says_why():
    text = plan().to_python()
    assert '    # layers.0.fused.weight and 2 more: test\n    # v = "1/d"\n    # = 1\\40\n    Rule(' in text


def test_the_script_runs_where_gainstage_is_not(tmp_path):
    (tmp_path / "script.py").write_text(plan().to_python(), encoding="utf-8")
    code = "import sys; sys.modules['gainstage'] = None; import script, torch; print(len(script.RULES))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["10"]


def test_torchtitan_takes_the_mapping():
    """As its modules do it: each draws its own parameters by name from ``_param_init``."""
    torch.manual_seed(0)
    model = filled()
    namespace(plan())["set_param_init"](model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._param_init[name](parameter)
    assert_drawn_as_planned(model)


def test_transformers_takes_the_function(monkeypatch):
    cpu_torchvision_if_installed()
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    built = transformers.LlamaForCausalLM(config)
    names = [name for name, _ in built.named_parameters()]
    stds = {name: 0.01 * (1 + index) for index, name in enumerate(names)}
    made = Plan(
        policy="unit",
        fingerprint="",
        training=True,
        parameters={
            name: ParameterPlan(
                name=name,
                aliases=("lm_head.weight",) if "embed" in name else (),
                shape=tuple(parameter.shape),
                dtype="float32",
                role="test",
                distribution=Distribution(family=Family.NORMAL, std=stds[name]),
            )
            for name, parameter in built.named_parameters()
        },
    )

    base = transformers.models.llama.modeling_llama.LlamaPreTrainedModel
    monkeypatch.setattr(base, "_init_weights", base._init_weights)  # to be put back
    namespace(made)["set_init_weights"](base)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    assert torch.equal(model.model.rotary_emb.inv_freq, built.model.rotary_emb.inv_freq)
    for name, parameter in model.named_parameters():
        deviation = parameter.detach().square().mean().sqrt().item()
        # Five standard errors; the mean is zero.
        assert deviation == pytest.approx(stds[name], rel=5 / math.sqrt(2 * parameter.numel())), name
