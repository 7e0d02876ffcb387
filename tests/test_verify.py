"""Verification: healthy models pass, models broken on purpose are blamed at the right parameter, and nothing is left behind."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from verified_models import MODELS, WIDTH, apply, build, faults, features, mlp, plan_for

import gainstage as gs
from gainstage.capture import capture
from gainstage.errors import InputError, NonFiniteError, PlanMismatchError
from gainstage.verify.measure import measure


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
        (nan_input, NonFiniteError, "input 0: give inputs that are finite"),
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


class Dropping(nn.Module):
    """Residual branches that are dropped sample by sample, as of stochastic depth."""

    def __init__(self, depth=12, drop=0.3):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), PathDrop(drop)) for _ in range(depth)
        )

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


class PathDrop(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        keep = 1.0 - self.drop
        return x * x.new_empty(x.shape[0], 1).bernoulli_(keep).div_(keep)


def test_a_branch_that_was_dropped_for_all_samples_is_no_fault():
    model, x = Dropping(), torch.randn(2, WIDTH)
    plan = gs.plan(model, (x,))
    dropped = 0
    for seed in range(6):
        gs.apply(model, plan, seed=seed)
        torch.manual_seed(seed)
        check = gs.verify(model, (x,), plan=plan)
        dropped += sum(row.measured == 0.0 for row in check.rows)
        assert check.ok, check
    assert dropped > 0


def test_a_branch_of_many_samples_that_is_nothing_is_a_fault():
    model, x = Dropping(), torch.randn(32, WIDTH)
    plan = gs.initialize(model, (x,), seed=0)
    model.branches[4][2].register_forward_hook(lambda _module, _args, output: 0.0 * output)
    assert faults(gs.verify(model, (x,), plan=plan))[0] == ("level off", "branches.4.2")
