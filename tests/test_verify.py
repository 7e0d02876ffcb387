"""Verification: healthy models pass, models broken on purpose are blamed at the right parameter, and nothing is left behind."""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gainstage as gs
from gainstage.capture import capture
from gainstage.errors import InputError, NonFiniteError, PlanMismatchError
from gainstage.graph import fingerprint
from gainstage.plan import Block, Distribution, Family, ParameterPlan, Plan
from gainstage.verify.measure import measure

WIDTH = 48


class Block2(nn.Module):
    """A pre-norm transformer block with attention written out, as models do."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    """Embedding, two blocks, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(97, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.blocks = nn.ModuleList(Block2() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 97, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mlp(depth=4):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 10),
    )  # fmt: skip


def features():
    return (torch.randn(32, WIDTH),)


def images():
    return (torch.randn(16, 3, 12, 12),)


def tokens():
    return (torch.randint(97, (8, 24)),)


MODELS = {"mlp": (mlp, features), "convolutional": (convolutional, images), "language": (Language, tokens)}


def build(name, seed=0):
    torch.manual_seed(seed)
    make, inputs = MODELS[name]
    return make(), inputs()


def plan_for(model, args):
    """A plan made by hand: matrices normal with He's deviation, the fused projection in two blocks, vectors constant."""
    graph = capture(model, args)
    parameters = {}
    for name, info in graph.parameters.items():
        std = 0.1 if "embed" in name else math.sqrt(1.5 / math.prod(info.shape[1:]))
        is_scale = ("norm" in name and name.endswith("weight")) or (len(info.shape) == 1 and name.endswith("weight"))
        drawn = Distribution(family=Family.NORMAL, std=std)
        constant = Distribution(family=Family.CONSTANT, mean=float(is_scale))
        parameters[name] = ParameterPlan(
            name=name,
            aliases=info.aliases,
            shape=info.shape,
            dtype=str(info.dtype).removeprefix("torch."),
            role="hidden",
            distribution=drawn if len(info.shape) > 1 else constant,
            blocks=(Block(0, 0, WIDTH, Distribution(family=Family.UNIFORM, std=0.05)),) if name.endswith("qkv.weight") else (),
        )
    made = {"policy": "by hand", "fingerprint": fingerprint(graph), "training": graph.training}
    probe = copy.deepcopy(model)
    apply(probe, Plan(parameters=parameters, **made), seed=12345)
    calls = [call for call in gs.inspect(probe, args, gradients=False).calls if call.outputs]
    return Plan(
        parameters=parameters,
        predictions={f"{call.path}@{call.call}": tuple(s.second_moment for s in call.outputs) for call in calls},
        spreads={f"{call.path}@{call.call}": tuple(s.spread for s in call.outputs) for call in calls},
        **made,
    )


def apply(model, plan, seed):
    from gainstage.apply import apply as write

    write(model, plan, seed=seed)


def faults(check):
    return [(str(finding.kind), finding.where) for finding in check.findings if finding.kind.is_fault]


# Healthy models


@pytest.mark.parametrize("name", MODELS)
def test_healthy_models_pass_with_and_without_a_plan(name):
    model, args = build(name)
    plan = plan_for(model, args)
    for seed in range(5):
        model, args = build(name, seed)
        check = gs.verify(model, args)
        assert (check.ok, check.findings) == (True, ())
        apply(model, plan, seed)
        check = gs.verify(model, args, plan=plan)
        assert (check.ok, check.findings) == (True, ())
        assert {(row.path, row.call) for row in check.rows} >= {(path, 0) for path, module in model.named_modules() if not path}


# Broken models


@dataclass
class Broken:
    """A fault, and what is to be found: the first finding."""

    model: str
    do: Callable
    kind: str
    where: str
    planned: bool


@torch.no_grad()
def set_(parameter, values):
    parameter.copy_(values)


def scaled(path, factor):
    return lambda model: set_(model.get_parameter(path), factor * model.get_parameter(path))


def scaled_rows(path, start, stop, factor):
    def do(model):
        values = model.get_parameter(path).detach().clone()
        values[start:stop] *= factor
        set_(model.get_parameter(path), values)

    return do


def untied(model):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def cloned(model):
    model.blocks[1].load_state_dict(model.blocks[0].state_dict())


def rank_one(path):
    """Entries with the right mean and deviation that are anything but independent."""

    def do(model):
        w = model.get_parameter(path)
        set_(w, w.std() * torch.randn(w.shape[0], 1).sign() * torch.ones(1, w.shape[1]) + 1e-3 * w)

    return do


class Halved(nn.ReLU):
    def forward(self, x):
        return super().forward(x) / 2


class Logarithm(nn.ReLU):
    def forward(self, x):
        return torch.log(x)


def replaced(place, module):
    return lambda model: model.__setitem__(place, module)


def set_attribute(path, name, value):
    return lambda model: setattr(model.get_submodule(path), name, value)


def hidden_scale(path, factor):
    """A hook that multiplies what a module returns: nothing in the parameters or in the plan knows of it."""
    return lambda model: model.get_submodule(path).register_forward_hook(lambda _m, _a, output: factor * output)


BROKEN = {
    # with a plan
    "not applied": Broken("mlp", lambda m: m[4].reset_parameters(), "not drawn as planned", "4.weight", True),
    "applied twice": Broken("mlp", scaled("2.weight", 0.1), "not drawn as planned", "2.weight", True),
    "a bit too large": Broken("language", scaled("blocks.1.up.weight", 1.1), "not drawn as planned", "blocks.1.up.weight", True),
    "one block of a fused projection": Broken(
        "language", scaled_rows("blocks.0.qkv.weight", 0, WIDTH, 2), "not drawn as planned", "blocks.0.qkv.weight", True
    ),
    "the other block": Broken(
        "language", scaled_rows("blocks.0.qkv.weight", WIDTH, 2 * WIDTH, 2), "not drawn as planned", "blocks.0.qkv.weight", True
    ),
    "a bias left at its default": Broken(
        "mlp", lambda m: set_(m[2].bias, 0.1 * torch.randn(WIDTH)), "not drawn as planned", "2.bias", True
    ),
    "a norm at zero": Broken("convolutional", scaled("4.weight", 0.0), "not drawn as planned", "4.weight", True),
    "shifted": Broken("mlp", lambda m: set_(m[0].weight, m[0].weight + 0.05), "not drawn as planned", "0.weight", True),
    "left as zeros by to_empty": Broken("mlp", scaled("6.weight", 0.0), "not drawn as planned", "6.weight", True),
    "dependent entries": Broken("mlp", rank_one("2.weight"), "not drawn as planned", "2.weight", True),
    "two shards alike": Broken(
        "language",
        lambda m: set_(m.blocks[0].up.weight[WIDTH:], m.blocks[0].up.weight[:WIDTH]),
        "not drawn as planned",
        "blocks.0.up.weight",
        True,
    ),
    "tie lost": Broken("language", untied, "tie lost", "head.weight", True),
    # without
    "dependent entries, no plan": Broken("language", rank_one("blocks.0.up.weight"), "level off", "blocks.0.up.weight", False),
    "tie lost, no plan": Broken("language", untied, "tie lost", "head.weight", False),
    "clones": Broken("language", cloned, "identical clones", "blocks.1.qkv.weight", False),
    "saturated": Broken(
        "language", scaled_rows("blocks.1.qkv.weight", 0, 2 * WIDTH, 8), "saturated attention", "blocks.1.qkv.weight", False
    ),
    "exploding": Broken("mlp", scaled("4.weight", 3e3), "exploding signal", "4.weight", False),
    "exploding norm": Broken(
        "language", scaled("blocks.0.norm2.weight", 1e5), "exploding signal", "blocks.0.norm2.weight", False
    ),
    "loud head": Broken("mlp", scaled("8.weight", 300), "loud head", "8.weight", False),
    "logarithm of a negative number": Broken("mlp", replaced(3, Logarithm()), "not finite", "3", False),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_blamed_at_the_right_parameter(name):
    case = BROKEN[name]
    model, args = build(case.model, seed=3)
    plan = None
    if case.planned:
        plan = plan_for(model, args)
        apply(model, plan, 3)
    assert faults(gs.verify(model, args, plan=plan)) == []
    case.do(model)
    check = gs.verify(model, args, plan=plan)
    assert not check.ok
    found = faults(check)
    assert found[0] == (case.kind, case.where)
    assert len(found) <= 4, found  # the root, not all that follows from it
    assert all(finding.evidence and finding.remedy for finding in check.findings)
    assert "NOT ok" in repr(check)


def test_what_follows_from_a_fault_is_not_listed_again():
    model, args = build("mlp", 1)
    plan = plan_for(model, args)
    apply(model, plan, 1)
    scaled("2.weight", 30.0)(model)
    check = gs.verify(model, args, plan=plan)
    assert [row.path for row in check.rows if not row.ok] == ["2", "3", "4", "5", "6", "7", "8", ""]
    assert [finding.where for finding in check.findings if finding.kind in ("not drawn as planned", "level off")] == ["2.weight"]


def test_two_faults_in_parallel_branches_are_two_findings():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x):
            return self.left(x) + self.right(x)

    torch.manual_seed(0)
    model, x = Branches(), torch.randn(32, WIDTH) + 1.0
    rank_one("left.weight")(model)
    rank_one("right.weight")(model)
    assert faults(gs.verify(model, (x,))) == [("level off", "left.weight"), ("level off", "right.weight")]


def test_a_dead_signal_is_found_where_it_dies():
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers)  # torch's default: each layer leaves 1/6 of the second moment
    check = gs.verify(model, (torch.randn(64, WIDTH),))
    assert [str(finding.kind) for finding in check.findings] == ["dead signal"]
    measured = {row.path: row.measured for row in check.rows}
    layer = int(check.findings[0].where.partition(".")[0])
    assert measured[str(layer + 1)] < 1e-4 <= measured[str(layer - 1)]
    scaled("4.weight", 0.0)(model)
    assert faults(gs.verify(model, (torch.randn(64, WIDTH),))) == [("dead signal", "4.weight")]


def test_a_row_out_of_bounds_without_a_parameter_names_the_module():
    model, args = build("mlp", 2)
    plan = plan_for(model, args)
    apply(model, plan, 2)
    model[3] = Halved()  # the same parameters, read by the same operations
    assert faults(gs.verify(model, args, plan=plan))[0] == ("level off", "3")


@pytest.mark.parametrize(("name", "scale"), [("mlp", 4.0), ("mlp", 0.3), ("convolutional", 40.0)])
def test_inputs_unlike_those_of_the_plan_are_blamed(name, scale):
    model, args = build(name, 1)
    plan = gs.initialize(model, args)
    other = (scale * args[0] + 0.5,)
    found = faults(gs.verify(model, other, plan=plan))
    assert found[0][0] == "other inputs"
    assert found[0][1] in {node.name for node in capture(model, args).nodes}
    assert len([kind for kind, _ in found if kind in ("other inputs", "level off")]) == 1
    assert faults(gs.verify(model, args, plan=plan)) == []


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_a_model_that_returns_states_is_verified(recurrent):
    torch.manual_seed(0)
    check = gs.verify(recurrent(16, 32, 2, batch_first=True), (torch.randn(8, 12, 16),))
    assert check.ok, check


def test_unused_parameters_are_a_note():
    model, args = build("mlp")
    model[1].spare = nn.Linear(3, 3)
    check = gs.verify(model, args)
    assert check.ok
    (finding,) = check.findings
    assert (str(finding.kind), finding.where) == ("unused parameters", "1.spare.weight")
    assert "never called" in finding.evidence


# Rows


class Nested(nn.Module):
    """Called twice, returns integers, constants and tensors in containers; one module is never called."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            y = self.linear(x)
            return {"index": y.argmax(-1), "table": torch.arange(4.0), "pair": (y, [y.relu()])}

    def __init__(self):
        super().__init__()
        self.inner, self.never = self.Inner(), nn.Linear(2, 2)

    def forward(self, *, b, a):
        first, second = self.inner(a), self.inner(b)
        return [second["index"], first["pair"][1][0] + second["pair"][0]]


def test_every_row_is_the_second_moment_of_that_tensor():
    torch.manual_seed(0)
    model, a, b = Nested(), torch.randn(6, 8), torch.rand(6, 8)
    check = gs.verify(model, (), {"a": a, "b": b})
    with torch.no_grad():
        ya, yb = (model.inner(x)["pair"][0] for x in (a, b))
    expected = {
        ("inner.linear", 0, 0): ya, ("inner.linear", 1, 0): yb,
        ("inner", 0, 3): ya.relu(), ("inner", 1, 2): yb,
        ("", 0, 1): ya.relu() + yb,
    }  # fmt: skip
    rows = {(row.path, row.call, row.output): row for row in check.rows}
    for key, tensor in expected.items():
        assert rows[key].measured == pytest.approx(float(tensor.square().mean()), rel=1e-6)
        assert rows[key].shape == tuple(tensor.shape)
        assert rows[key].ratio == pytest.approx(rows[key].measured / rows[key].predicted)
    assert check.to_dict()["rows"][0]["ok"]


def test_inputs_are_taken_as_they_are():
    """Inputs of deviation 5 and mean 3 are no fault of the model's."""
    model, _ = build("mlp")
    check = gs.verify(model, (3.0 + 5.0 * torch.randn(64, WIDTH),))
    assert faults(check) == []
    assert check.rows[0].ratio == pytest.approx(1.0, abs=0.35)


def test_the_sampling_error_is_the_deviation_between_batches():
    """Entries of a sample share a random level, so that n entries are far fewer than n measurements."""
    generator = torch.Generator().manual_seed(0)

    def batch(samples):
        level = torch.exp(0.5 * torch.randn(samples, 1, 1, generator=generator))
        return level * torch.randn(samples, 5, 40, generator=generator)

    found = [measure(batch(16), 16) for _ in range(2000)]
    strayed = np.std([math.log(one.second_moment) for one in found])
    # The mean of the squared errors estimates the variance; both are known to a few per cent after 2000 batches, and the
    # widening for 16 samples is 7 %.
    reported = np.sqrt(np.mean([one.sampling_error**2 for one in found]))
    assert reported == pytest.approx(strayed, rel=0.2)
    assert measure(batch(1), 1).sampling_error == 0.0


# Left as it was


class Restless(nn.Module):
    """Does in forward all that a module should not do."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.history, self.table, self.calls = [], {"a": 1}, 0
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        if not torch.compiler.is_exporting():
            with torch.no_grad():
                self.scale.mul_(1.5)
                self.linear.weight.data.add_(1e-3)
                self.linear.bias.data = torch.zeros(WIDTH)
                self.seen.copy_(x.mean(0))
            self.steps = self.steps + 1
            self.history.append(x)
            self.table["b"] = x
            self.calls += 1
            self.cache = x
            self.linear.weight.requires_grad_(False)
            random.random()  # noqa: S311
            np.random.rand()  # noqa: NPY002
            torch.randn(3, generator=self.generator)
            x.add_(0.1)
        return F.dropout(self.norm(self.linear(x)) * self.scale, 0.3, self.training)


def test_the_model_and_all_around_it_are_left_as_they_were():
    torch.manual_seed(0)
    model = Restless()
    model(torch.randn(4, WIDTH)).sum().backward()
    model.scale.grad = torch.ones(WIDTH)
    calls = []
    model.linear.register_forward_hook(lambda *_: calls.append(1))
    model.norm.eval()
    model.linear.weight.requires_grad_(True)
    x = torch.randn(16, WIDTH)

    def facts():
        return {
            "state": {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()},
            "ids": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
            "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
            "trained": [p.requires_grad for p in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "attributes": [sorted(module.__dict__) for module in model.modules()],
            "plain": (len(model.history), dict(model.table).keys(), model.calls),
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            "torch": torch.get_rng_state(),
            "own": model.generator.get_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state()[1],  # noqa: NPY002
            "x": x.clone(),
            "grad enabled": torch.is_grad_enabled(),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
        }

    before = facts()
    count = len(calls)
    gs.verify(model, (x,))
    after = facts()
    assert len(calls) > count  # the user's own hook ran
    for key, value in before.items():
        assert same(value, after[key]), key


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_a_failing_forward_leaves_everything_too():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x = self.linear(self.norm(x))
            if not torch.compiler.is_exporting():
                raise ValueError("no such luck")
            return x

    model = Fails()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="ValueError: no such luck"):
        gs.verify(model, features())
    assert same(before, dict(model.state_dict()))
    assert not any(module._forward_hooks for module in model.modules())


# Refusals


def with_nan(path):
    def make():
        model, args = build("mlp")
        with torch.no_grad():
            model.get_parameter(path)[0] = math.nan
        return model, args

    return make


def on_meta():
    with torch.device("meta"):
        return mlp(), (torch.randn(2, WIDTH),)


def nan_input():
    return mlp(), (torch.full((2, WIDTH), math.nan),)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (with_nan("4.bias"), NonFiniteError, "parameter 4.bias"),
        (nan_input, NonFiniteError, "input 0"),
        (on_meta, InputError, r"0\.weight and 9 more lie on the meta device.*gs\.materialize"),
        (lambda: (mlp(), (torch.randn(2, 3),)), gs.GainstageError, "must have same reduction dim"),
        (lambda: (mlp(), ()), InputError, "does not take"),
    ],
)
def test_what_cannot_be_verified_is_refused(make, error, message):
    model, args = make()
    with pytest.raises(error, match=message):
        gs.verify(model, args)


def test_a_plan_for_another_model_or_mode_is_refused():
    model, args = build("mlp")
    plan = plan_for(model, args)
    for other, message in [
        (mlp(depth=3), "'8.weight'|shape|planned as"),
        (copy.deepcopy(model).eval(), r"made for train mode.*model\.train"),
        (nn.Sequential(*[nn.Tanh() if isinstance(m, nn.ReLU) else m for m in copy.deepcopy(model)], nn.Identity()), ""),
    ]:
        if message:
            with pytest.raises(PlanMismatchError, match=message):
                gs.verify(other, args, plan=plan)
