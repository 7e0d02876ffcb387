"""From the meta device to memory: every value there, ties and buffers included, or a refusal that names what is missing."""

import pytest
import torch
from materialized import assert_as_if_built_in_memory, assert_same_tensors, on_meta, plan_of, tensors_of
from torch import nn

from gainstage.apply import apply, materialize, param_init_fn
from gainstage.apply.buffers import known_buffers
from gainstage.cli.huggingface import cpu_torchvision_if_installed
from gainstage.errors import InputError, PlanMismatchError, UnknownNameError

# Modules that know their buffers


class Rotary(nn.Module):
    """Keeps its arguments; a table that is saved, and one that is not."""

    def __init__(self, dim, base=10000.0, *, device=None):
        super().__init__()
        self.dim, self.base = dim, base
        frequencies = base ** -(torch.arange(0, dim, 2, device=device) / dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("table", torch.outer(torch.arange(5, device=device), frequencies).cos())


class Config:
    def __init__(self, length):
        self.length = length


class Masked(nn.Module):
    """Its configuration is kept by the model around it; the mask is a plain attribute."""

    def __init__(self, config):
        super().__init__()
        self.length = config.length
        self.mask = torch.full((config.length, config.length), -torch.inf).triu(1)
        self.project = nn.Linear(config.length, config.length)


class Configured(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Masked(config) for _ in range(2))


class Inside(nn.Module):
    def __init__(self, doubled):
        super().__init__()
        self.register_buffer("multiples", doubled * torch.arange(3.0))


class Around(nn.Module):
    """Can be built again, where the module in it cannot be alone."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.inside = Inside(2 * base)


class Resetting(nn.Module):
    """Keeps nothing by the name of its argument, but can be reset."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.register_buffer("scale", torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        self.scale.copy_(torch.arange(len(self.scale)))


class Decoder(nn.Module):
    """As torchtitan's models: everything is computed by init_weights, of children too."""

    def __init__(self, width, length):
        super().__init__()
        self.rows = length
        self.output = nn.Linear(width, width)
        self.register_buffer("angles", self._angles(), persistent=False)

    def _angles(self):
        return torch.outer(torch.arange(self.rows), torch.arange(4.0))

    def init_weights(self):
        nn.init.trunc_normal_(self.output.weight, std=0.02)
        with torch.device(self.angles.device):
            self.angles = self._angles()


class Rope(nn.Module):
    """As torchtitan's newer modules: one method for the buffers of a module alone, which may be told a device."""

    def __init__(self, options):
        super().__init__()
        self.angle = options["angle"]
        self.register_buffer("cache", self._cache(), persistent=False)

    def _cache(self):
        return torch.arange(6.0) * self.angle

    def _init_self_buffers(self, *, buffer_device=None):
        with torch.device(buffer_device or self.cache.device):
            self.cache = self._cache()


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(Rope({"angle": 0.5})),
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)),
        lambda: nn.InstanceNorm2d(3, track_running_stats=True),
        lambda: nn.Sequential(Rotary(8), nn.Linear(2, 2), Rotary(6, base=5e5)),
        lambda: Configured(Config(5)),
        lambda: Around(3.0),
        lambda: nn.Sequential(Resetting(3), Resetting(4)),
        lambda: Decoder(4, 6),
        lambda: nn.Sequential(nn.Linear(3, 4), Rotary(8)).double(),
        lambda: nn.LSTM(3, 4, 2),
    ],
)
def test_buffers_are_what_their_modules_make_of_them(build):
    assert_as_if_built_in_memory(build)


def test_a_table_is_rounded_as_the_model_was():
    """bfloat16 frequencies are the rounded ones, not those computed in bfloat16."""
    assert_as_if_built_in_memory(lambda: Rotary(64).bfloat16())


def test_what_has_memory_stays_where_it_is():
    model = on_meta(lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    model[1].running_mean = torch.tensor([1.0, 2.0])
    model[0].bias = nn.Parameter(torch.ones(2))
    bias = model[0].bias
    materialize(model, plan_of(model, keep=["0.bias"]))
    assert model[0].bias is bias
    assert bias.tolist() == [1, 1]
    assert model[1].running_mean.tolist() == [1, 2]
    assert model[1].running_var.tolist() == [1, 1]


def test_ties_and_marks_are_kept():
    def build():
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
        model[2].weight = model[0].weight
        model[1].weight.requires_grad_(False)
        model[1].weight.no_decay = True
        model[1].register_buffer("shared", torch.zeros(2))
        model[0].register_buffer("shared", model[1].shared)
        return model

    model = on_meta(build)
    materialize(model, plan_of(model), buffers={"0.shared": torch.ones(2)})
    assert model[2].weight is model[0].weight
    assert model[0].shared is model[1].shared
    assert not model[1].weight.requires_grad
    assert model[1].weight.no_decay


# Parameters that nobody fills


def test_a_parameter_to_be_kept_has_to_be_there():
    model = on_meta(lambda: nn.Linear(2, 2))
    with pytest.raises(InputError, match="bias would have no values"):
        materialize(model, plan_of(model, keep=["bias"]))
    assert model.weight.is_meta


def test_a_plan_for_another_model_is_refused():
    model = on_meta(lambda: nn.Linear(2, 2))
    with pytest.raises(PlanMismatchError):
        materialize(model, plan_of(nn.Linear(3, 2)))


def test_only_what_is_new_is_drawn():
    """A checkpoint is loaded; the head was added, the embedding has new rows."""
    model = on_meta(lambda: nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2), "norm": nn.BatchNorm1d(3)}))
    state = {"body.weight": torch.ones(3, 3), "body.bias": torch.ones(3)}
    model.load_state_dict(state, strict=False, assign=True)
    plan = plan_of(model)
    with pytest.raises(InputError, match=r"head\.bias, norm\.weight, norm\.bias would have no values"):
        materialize(model, plan, only="head.w*")
    materialize(model, plan, only=["head.*", "norm.*"], seed=2)
    assert (model["body"].weight == 1).all()
    expected = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2), "norm": nn.BatchNorm1d(3)})
    apply(expected, plan, seed=2)
    assert torch.equal(model["head"].weight, expected["head"].weight)
    materialize(model, plan, only="body.bias", seed=2)  # in memory already, and drawn again
    assert torch.equal(model["body"].bias, expected["body"].bias)
    assert (model["body"].weight == 1).all()


def test_a_pattern_without_a_parameter_is_refused():
    model = on_meta(lambda: nn.Linear(2, 2))
    with pytest.raises(UnknownNameError, match=r"no parameter like 'wieght\*' \(nearest: weight\)"):
        materialize(model, plan_of(model), only="wieght*")


@pytest.mark.parametrize("after", [1, 2])
def test_a_failure_while_drawing_leaves_the_model_on_meta(after):
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Masked(Config(2))))
    model[0].bias = nn.Parameter(torch.ones(4))
    before = {name: id(tensor) for name, tensor in tensors_of(model).items()}
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) == after:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        materialize(model, plan_of(model), progress=progress, buffers=lambda name: torch.zeros(2, 2) if "mask" in name else None)
    assert {name: id(tensor) for name, tensor in tensors_of(model).items()} == before
    assert model[0].bias.tolist() == [1] * 4


def test_an_initializer_of_single_modules_gives_the_same_model():
    def build():
        model = nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4), Rotary(4), nn.Linear(4, 5))
        model[3].weight = model[0].weight
        return model

    real, model = build(), on_meta(build)
    apply(real, plan_of(real), seed=4)
    initialize = param_init_fn(model, plan_of(model), seed=4)
    for module in reversed(list(model.modules())):
        initialize(module)
    assert_same_tensors(model, real)
    assert model[3].weight is model[0].weight
    with pytest.raises(InputError, match="Linear is no module of the model"):
        initialize(nn.Linear(2, 2, device="meta"))


# Other people's models


def imported_transformers():
    cpu_torchvision_if_installed()
    return pytest.importorskip("transformers")


def test_transformers_keeps_what_was_drawn():
    transformers = imported_transformers()
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=20, rope_theta=500.0
    )
    model = assert_as_if_built_in_memory(lambda: transformers.LlamaForCausalLM(config))
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    model.initialize_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": (2, 2)}),
        ("vit_base_patch16_rope_224", {"depth": 1, "embed_dim": 96, "num_heads": 2}),
    ],
)
def test_masks_indices_and_tables_of_timm(name, options):
    cpu_torchvision_if_installed()
    timm = pytest.importorskip("timm")
    assert_as_if_built_in_memory(lambda: timm.create_model(name, **options))


def test_parameters_are_not_drawn_to_find_a_buffer(monkeypatch):
    with torch.device("meta"):
        model = Resetting(7)

    def draw(*_):
        raise AssertionError("drawn")

    monkeypatch.setattr(nn.init, "_no_grad_normal_", draw)
    assert known_buffers(model)["scale"].tolist() == list(range(7))
