"""Calibration: levels measured with hooks on the real model are those planned, after one pass; and nothing else has changed."""

import copy
import dataclasses
import math
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

import gainstage as gs
from gainstage.api import measured_input, moments_of
from gainstage.capture import capture
from gainstage.solve import planned_values

WIDTH = 48
ROUNDING = 1e-4  # of second moments in float32, through fifty layers


class Attention(nn.Module):
    """A pre-norm block with queries, keys and values from one weight."""

    def __init__(self, bias):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.drop(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.down(self.drop(F.gelu(self.up(self.norm2(x)))))


class Repeated(nn.Module):
    """One layer, called eight times."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x):
        for _ in range(8):
            x = F.relu(self.layer(x))
        return self.head(x)


class Shifted(nn.Module):
    """A norm that multiplies by ``1 + w``, and ends a residual branch."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.w = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        x = self.first(x)
        y = torch.tanh(self.layer(x))
        return self.head(x + y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 0.1) * (1 + self.w))


class Language(nn.Module):
    """An embedding with padding, and a head that is tied to it."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(97, WIDTH, padding_idx=0), nn.LayerNorm(WIDTH)
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 97, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + torch.tanh(self.layer(x))))


def plain(depth=50):
    layers = [layer for _ in range(depth - 1) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip


def transformer(bias=True):  # noqa: FBT002
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Attention(bias) for _ in range(3)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))


def drawn(build, shape, **options):
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape)
    return model, x, gs.initialize(model, (x,), seed=1, **options)


def measured_levels(model, x):
    """Second moments of what contractions return, in the mode that the model is in, with the coins that come next."""
    found = []
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: found.append((name, output.detach())))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    state, buffers = torch.get_rng_state(), copy.deepcopy(dict(model.named_buffers()))
    with torch.no_grad():
        model(x)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    torch.set_rng_state(state)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("build", "shape", "options"),
    [
        (plain, (64, WIDTH), {}),
        (lambda: plain(4), (64, WIDTH), {"policy": "torch"}),  # with biases that are drawn; deeper, they drown the weights
        (convolutional, (8, 3, 12, 12), {}),
        (transformer, (4, 12, WIDTH), {}),
        (lambda: transformer(bias=False).eval(), (4, 12, WIDTH), {"distribution": "orthogonal"}),
    ],
    ids=["plain", "plain-biased", "convolutional", "transformer-train", "transformer-orthogonal"],
)
def test_levels_of_the_real_model_are_those_planned(build, shape, options):
    model, x, plan = drawn(build, shape, **options)
    before = max(
        abs(float(y.double().square().mean()) / plan.predictions[f"{name}@0"][0] - 1) for name, y in measured_levels(model, x)
    )
    calibration = gs.calibrate(model, plan, (x,))
    assert before > 0.05  # otherwise nothing is shown
    assert not calibration.missed, calibration
    for name, y in measured_levels(model, x):
        (planned,) = plan.predictions[f"{name}@0"]
        rows = [row for row in calibration.rows if row.module == name]
        assert float(y.double().square().mean()) == pytest.approx(planned, rel=ROUNDING)
        for row in rows:
            parts = [y[..., start:stop] for start, stop in row.rows] or [y]
            assert float(torch.cat(parts, -1).double().square().mean()) == pytest.approx(row.planned, rel=ROUNDING)
    assert gs.verify(model, (x,), plan=calibration.plan).ok


def test_fused_projections_are_scaled_row_by_row():
    model, x, plan = drawn(transformer, (4, 12, WIDTH))
    rows = [row for row in gs.calibrate(model, plan, (x,)).rows if row.parameter == "1.qkv.weight"]
    assert [row.rows for row in rows] == [((0, 48),), ((48, 96),), ((96, 144),)]
    assert len({row.factor for row in rows}) == 3


class Products(TorchDispatchMode):
    """Counts matrix products of real tensors."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not (isinstance(result, FakeTensor) or getattr(result, "is_meta", False)):
            self.counts[func] += 1
        return result


def test_one_pass_is_enough():
    model, x, plan = drawn(plain, (64, WIDTH))
    with Products() as products:
        gs.calibrate(model, plan, (x,))
    assert products.counts[torch.ops.aten.addmm.default] + products.counts[torch.ops.aten.mm.default] == 50


class Universal(nn.Module):
    """One block of a transformer, called four times."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Attention(bias=True), nn.Linear(WIDTH, 10)

    def forward(self, x):
        for _ in range(4):
            x = self.block(x)
        return self.head(x)


class Shared(nn.Module):
    """One branch for two inputs of different levels."""

    def __init__(self):
        super().__init__()
        self.branch, self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.head((self.branch(x) - self.branch(2.0 * x.cos())).abs())


@pytest.mark.parametrize(
    ("build", "shape"),
    [(Repeated, (64, WIDTH)), (Universal, (4, 12, WIDTH)), (Shared, (64, WIDTH))],
    ids=["layer", "block", "branch"],
)
def test_what_is_called_again_meets_the_plan_at_all_calls(build, shape):
    model, x, plan = drawn(build, shape)
    drawn_values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    calibration = gs.calibrate(model, plan, (x,))
    calls = Counter(row.parameter for row in calibration.rows if row.call)
    assert calls
    assert not calibration.missed
    planned = {(row.module, row.call): row for row in calibration.rows if not row.rows and row.call is not None}
    seen = Counter()
    for name, output in measured_levels(model, x):
        row = planned.get((name, seen[name]))
        seen[name] += 1
        if row is not None:
            assert float(output.double().square().mean()) == pytest.approx(row.planned, rel=0.02)
    assert sum(seen.values()) > len(seen)
    for row in calibration.scaled:  # rows differ as those of a draw do, not more
        assert row.spread < 2.0 / math.sqrt(2.0 * drawn_values[row.parameter].shape[1])
    again = build()
    gs.apply(again, calibration.plan, seed=1)
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, dict(model.named_parameters())[name], rtol=1e-4, atol=1e-6)
    assert gs.verify(model, (x,), plan=calibration.plan).ok


def test_a_matrix_that_is_called_again_and_has_to_stay_orthogonal_gets_one_scale():
    model, x, plan = drawn(Repeated, (64, WIDTH), distribution="orthogonal")
    calibration = gs.calibrate(model, plan, (x,))
    weight = model.layer.weight.detach().double()
    torch.testing.assert_close(
        weight @ weight.T, torch.eye(WIDTH, dtype=torch.float64) * float(weight[0] @ weight[0]), rtol=1e-4, atol=1e-5
    )
    assert calibration.missed
    assert all("cannot bring all of its calls" in row.note for row in calibration.missed)
    planned = [row.planned for row in calibration.rows if row.parameter == "layer.weight"]

    def error():
        levels = [float(y.double().square().mean()) for name, y in measured_levels(model, x) if name == "layer"]
        return sum(math.log(level / goal) ** 2 for level, goal in zip(levels, planned, strict=True))

    best = error()
    for other in (0.95, 1.05):
        with torch.no_grad():
            model.layer.weight.mul_(other)
            assert error() > best
            model.layer.weight.div_(other)


def test_a_norm_that_multiplies_by_one_plus_its_weight():
    model, x, plan = drawn(Shifted, (64, WIDTH))
    with torch.no_grad():
        model.w.add_(0.2)  # as another draw, or data, would have it
    before = plan.parameters["w"].distribution.mean + 0.2
    (row,) = [row for row in gs.calibrate(model, plan, (x,)).rows if row.parameter == "w"]
    assert row.factor != pytest.approx(1.0, rel=0.1)
    assert torch.allclose(model.w, torch.full((WIDTH,), row.factor * (1 + before) - 1))
    y = torch.tanh(model.layer(model.first(x)))
    branch = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 0.1) * (1 + model.w)
    assert float(branch.detach().double().square().mean()) == pytest.approx(row.planned, rel=ROUNDING)


def test_a_tied_table_is_made_as_planned_as_a_whole():
    torch.manual_seed(0)
    model, ids = Language(), torch.randint(0, 97, (8, 12))
    plan = gs.initialize(model, (ids,), seed=1)
    calibration = gs.calibrate(model, plan, (ids,))
    rows = [row for row in calibration.rows if row.parameter == "embed.weight"]
    std = max(distribution.std for distribution in plan.parameters["embed.weight"].distributions)
    assert float(model.embed.weight[1:].detach().double().square().mean()) == pytest.approx(std**2, rel=ROUNDING)
    assert float(model.embed.weight[0].detach().abs().sum()) == 0.0
    assert "tied" in rows[0].note
    assert float(model(ids).detach().double().square().mean()) == pytest.approx(rows[-1].after, rel=ROUNDING)


def test_rows_of_padding_do_not_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(97, WIDTH, padding_idx=0), nn.Linear(WIDTH, 10))
    ids = torch.randint(1, 97, (8, 12))
    ids[:, 6:] = 0
    plan = gs.initialize(model, (ids,), seed=1)
    gs.calibrate(model, plan, (ids,))
    assert float(model[0](ids[:, :6]).detach().double().square().mean()) == pytest.approx(1.0, rel=ROUNDING)


def test_other_data_than_the_plan_was_made_with_meet_the_plan():
    model, x, plan = drawn(plain, (64, WIDTH))
    calibration = gs.calibrate(model, plan, (3.0 * x,))
    assert not calibration.missed, calibration
    assert float(model[0](3.0 * x).detach().double().square().mean()) == pytest.approx(plan.predictions["0@0"][0], rel=ROUNDING)


def test_the_amended_plan_draws_the_calibrated_values_again():
    model, x, plan = drawn(transformer, (4, 12, WIDTH))
    calibration = gs.calibrate(model, plan, (x,))
    again = transformer()
    gs.apply(again, gs.Plan.from_json(calibration.plan.to_json()), seed=1)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=0.0)


def test_only_parameters_change_and_none_that_is_kept():
    model, x, plan = drawn(convolutional, (8, 3, 12, 12), keep=["2.weight"])
    model[0].weight.grad = gradient = torch.ones_like(model[0].weight)
    kept, buffers = model[2].weight.detach().clone(), copy.deepcopy(dict(model.named_buffers()))
    state, versions = torch.get_rng_state(), {name: id(parameter) for name, parameter in model.named_parameters()}
    calibration = gs.calibrate(model, plan, (x,))
    assert torch.equal(model[2].weight, kept)
    assert [row.note for row in calibration.rows if row.parameter == "2.weight"] == ["kept by the plan"]
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert model[0].weight.grad is gradient
    assert versions == {name: id(parameter) for name, parameter in model.named_parameters()}


class Exploding(nn.Module):
    """Two healthy layers, and one that is fed infinity."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.is_broken = False

    def forward(self, x):
        x = self.first(x)
        return self.second(torch.exp(x * 1e6) if self.is_broken else x)


def test_a_failure_leaves_the_model_as_it_was():
    model, x, plan = drawn(Exploding, (64, WIDTH))
    before = copy.deepcopy(model.state_dict())
    model.is_broken = True
    with pytest.raises(gs.NonFiniteError, match=r"linear.*second"):
        gs.calibrate(model, plan, (x,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_failure_while_writing_leaves_the_model_as_it_was():
    model, x, plan = drawn(plain, (64, WIDTH))
    before = copy.deepcopy(model.state_dict())

    class Failing(TorchDispatchMode):
        """Lets two parameters be written, then fails once."""

        def __init__(self):
            super().__init__()
            self.addresses = {parameter.data_ptr() for parameter in model.parameters()}
            self.left = 2

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default and args[0].data_ptr() in self.addresses:
                self.left -= 1
                if self.left == -1:
                    raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    with Failing() as failing, pytest.raises(KeyboardInterrupt):
        gs.calibrate(model, plan, (x,))
    assert failing.left < 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["mode", "model"])
def test_a_plan_of_another_model_is_refused(how):
    model, x, plan = drawn(plain, (64, WIDTH))
    other = model.eval() if how == "mode" else plain(3)
    with pytest.raises(gs.PlanMismatchError):
        gs.calibrate(other, plan, (x,))


def test_verify_recommends_it_where_draws_differ_much():
    model, x, plan = drawn(lambda: plain(80), (64, WIDTH))
    notes = [finding for finding in gs.verify(model, (x,), plan=plan).findings if "gs.calibrate" in finding.remedy]
    assert len(notes) == 1
    assert not notes[0].kind.is_fault
    calibration = gs.calibrate(model, plan, (x,))
    assert not [finding for finding in gs.verify(model, (x,), plan=calibration.plan).findings if "gs.calibrate" in finding.remedy]


def test_the_report_is_readable_and_plain_data():
    model, x, plan = drawn(Repeated, (64, WIDTH), distribution="orthogonal")
    calibration = gs.calibrate(model, plan, (x,))
    assert re.match(r"Calibration\(\d of 9 levels as planned, 2 scaled\)\n", repr(calibration))
    assert "layer.weight (call 3): x 1," in repr(calibration)
    data = calibration.to_dict()
    assert data["rows"][0]["parameter"] == "layer.weight"
    assert gs.Plan.from_json(calibration.plan.to_json()) == calibration.plan
    assert data["plan"] == calibration.plan.to_dict()


@pytest.mark.parametrize("build", [plain, transformer, convolutional, Language, Shifted])
def test_signals_of_a_plan_are_those_that_it_was_solved_for(build):
    torch.manual_seed(0)
    x = {convolutional: torch.randn(8, 3, 12, 12), Language: torch.randint(0, 97, (8, 12))}.get(build, torch.randn(4, 12, WIDTH))
    model = build()
    plan = gs.plan(model, (x,))
    graph = capture(model, (x,))
    silent = dataclasses.replace(plan, predictions={}, spreads={})  # nothing to be read off
    values = planned_values(
        graph, silent, moments=moments_of(model), tables=dict(model.named_parameters()), source=measured_input
    )
    for call in graph.calls:
        found = [values[name].second_moment for name in call.outputs]
        assert found == pytest.approx(plan.predictions[f"{call.path}@{call.call}"], rel=1e-3)  # the solver's tolerance
