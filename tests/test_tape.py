"""The second rung: a run on tape must be the graph that torch.export finds, and go on where that stops."""

from __future__ import annotations

import copy
import gc
import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from captured import CASES, Scripted, assert_reaches_parameters, assert_reproduces, run_graph, square, x
from torch import nn
from torch.utils.checkpoint import checkpoint

import gainstage as gs
from gainstage import errors
from gainstage.capture import capture
from gainstage.capture.capture import RUNGS
from gainstage.graph import Graph, NodeKind
from gainstage.verify.measure import run_forward

STAGE = importlib.import_module("gainstage.capture.capture")
RUN = importlib.import_module("gainstage.capture.run")


def on_tape(monkeypatch) -> None:
    monkeypatch.setattr(STAGE, "RUNGS", {"tape": STAGE.by_tape})


def shape_of(graph: Graph) -> list[tuple]:
    """Everything of the nodes but their names."""
    place = {node.name: position for position, node in enumerate(graph.nodes)}
    return [
        (node.kind, node.op_name, [place[name] for name in node.operands()], node.meta, node.parameter, node.provenance)
        for node in graph.nodes
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_tape_reproduces_the_model(name, monkeypatch):
    on_tape(monkeypatch)
    build, args, kwargs = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    graph = capture(model, args, kwargs)
    assert graph.rung == "tape"
    assert_reproduces(graph, model, args, kwargs)
    assert_reaches_parameters(graph, model, args, kwargs)


# A region without gradients is detached where it ends by torch.export, where its result is used on a tape.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"out", "regions"}))
def test_a_run_on_tape_is_the_graph_that_export_finds(name, monkeypatch):
    build, args, kwargs = CASES[name]
    model = build().train()
    exported = capture(model, args, kwargs)
    on_tape(monkeypatch)
    recorded = capture(model, args, kwargs)
    assert shape_of(recorded) == shape_of(exported)
    assert [(call.path, call.call, call.positions) for call in recorded.calls] == [
        (call.path, call.call, call.positions) for call in exported.calls
    ]


def branch(s, x):
    h = s.m[0](x)
    return h * 2 if h.sum() > -1e9 else s.m[1](h)


def to_numpy(s, x):
    h = s.m[0](x)
    return h * float(h.detach().numpy().max())


def packed(s, x, lengths):
    sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(s.m[0](sequence)[0], batch_first=True)[0]


def differentiate(s, x):
    x.requires_grad_(True)
    return torch.autograd.grad(s.m[1](s.m[0](x).tanh()).sum(), x, create_graph=True)[0]


def positive_entries(s, x):
    h = s.m[0](x)
    h[h < -1] = 0.0
    return h[x > 0].mean() + h.masked_select(x[..., :1] < 0).mean()


def dropped_layers(s, x):
    for layer in s.m:
        if torch.rand([]) >= 0.3:
            x = layer(x)
    return x


def experts(s, x):
    x = x.reshape(-1, 8)
    result, chosen = torch.zeros_like(x), s.m[2](x)[:, :2].argmax(-1)
    for number in range(2):
        rows = (chosen == number).nonzero().squeeze(-1)
        if len(rows):
            result[rows] = s.m[number](x[rows])
    return result


def weighted_experts(s, x):
    """The best two of three, weighted, and the rows of each found by a condition."""
    x = x.reshape(-1, 8)
    weights, chosen = s.m[3](x).softmax(-1).topk(2, -1)
    result = torch.zeros_like(x)
    for number in range(3):
        rows, ranks = torch.where(chosen == number)
        result.index_add_(0, rows, s.m[number](x[rows]) * weights[rows, ranks, None])
    return x + result


def conditional(s, x):
    return torch.cond(x.sum() > -1e9, s.m[0], s.m[1], (x,))


def fixed_point(s, x):
    z = torch.zeros_like(x)
    for _ in range(30):
        after = torch.tanh(0.1 * s.m[0](z) + x)
        if (after - z).norm() < 1e-4:
            break
        z = after
    return z


AWAY = {  # name -> model, arguments, a word of the reason why a lower rung was needed
    "branch": (lambda: Scripted(branch, square(), square()), (x(),), "branches on the value"),
    "numpy": (lambda: Scripted(to_numpy, square()), (x(),), "NumPy"),
    "packed": (lambda: Scripted(packed, nn.LSTM(8, 4, batch_first=True)), (x(), torch.tensor([3, 5])), "packed sequences"),
    "autograd": (lambda: Scripted(differentiate, square(), nn.Linear(8, 1)), (x(),), "differentiates inside"),
    "entries": (lambda: Scripted(positive_entries, square()), (x(),), "depends on values"),
    "layer drop": (lambda: Scripted(dropped_layers, *(square() for _ in range(4))), (x(),), "branches on the value"),
    "experts": (lambda: Scripted(experts, square(), square(), square()), (x(),), "depends on values"),
    "rows of experts": (
        lambda: Scripted(weighted_experts, square(), square(), square(), nn.Linear(8, 3)),
        (x(),),
        "depends on values",
    ),
    "condition": (lambda: Scripted(conditional, square(), square()), (x(),), "higher order"),
    "fixed point": (lambda: Scripted(fixed_point, square()), (x(),), "branches on the value"),
    "vmap": (lambda: Scripted(lambda s, x: torch.func.vmap(s.m[0])(x), square()), (x(),), "torch.func"),
    "scripted": (
        lambda: Scripted(lambda s, x: s.m[0](x), torch.jit.script(nn.Sequential(square(), nn.ReLU()))),
        (x(),),
        "Sequential.forward",
    ),
}


@pytest.mark.parametrize("name", sorted(AWAY))
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_export_refuses_is_recorded_from_one_run(name):
    build, args, reason = AWAY[name]
    torch.manual_seed(0)
    model = build()
    graph = capture(model, args)
    assert graph.rung == "tape"
    assert any(reason in assumption for assumption in graph.assumptions), graph.assumptions
    if name != "layer drop":  # the model draws anew each time
        torch.testing.assert_close(run_graph(graph, model, args)[graph.outputs[0]], model(*args).detach(), rtol=1e-5, atol=1e-5)
    if name not in {"layer drop", "condition"}:  # torch.cond gives zeros to the branch that is not taken
        assert_reaches_parameters(graph, model, args, {})


class Forces(nn.Module):
    """The gradient of an energy with respect to positions."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, positions):
        positions = positions.requires_grad_()
        return torch.autograd.grad(self.energy(positions).sum(), positions, create_graph=True)[0]


def scripted_inside():
    return nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 4))


@pytest.mark.parametrize("build", [Forces, scripted_inside])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_whole_way_with_what_only_a_run_shows(build):
    """Plan, draw, verify: the graph is the same after the model has run, gradients and all."""
    torch.manual_seed(0)
    model, args = build(), (torch.randn(64, 6),)
    plan = gs.initialize(model, args)
    for _ in range(3):
        model(*args)
    assert gs.plan(model, args) == plan
    check = gs.verify(model, args, plan=plan)
    assert check.ok, check


def test_one_path_seen_names_the_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    graph = capture(Scripted(branch, square(), square()), (x(),))
    (sentence,) = [text for text in graph.assumptions if text.startswith("One path seen")]
    monkeypatch.chdir(Path(__file__).parent)
    assert sentence in capture(Scripted(branch, square(), square()), (x(),)).assumptions  # from wherever it is run
    assert "return h * 2 if h.sum() > -1e9 else" in sentence
    trace = gs.inspect(Scripted(branch, square(), square()), (x(),), gradients=False)
    assert trace.to_dict()["rung"] == "tape"
    assert sentence in trace.to_dict()["assumptions"]


def test_of_the_ways_that_random_numbers_choose_the_one_through_most_parameters_is_taken():
    graph = capture(Scripted(dropped_layers, *(square() for _ in range(4))), (x(),))
    assert sum(node.kind is NodeKind.PARAMETER for node in graph.nodes) == 8


def test_a_second_look_takes_the_draw_that_the_first_found(monkeypatch):
    """The first draws drop layers; the one that does not is known by then."""
    seeds = []
    monkeypatch.setattr(RUN, "_record", lambda request, seed, record=RUN._record: seeds.append(seed) or record(request, seed))
    model = Scripted(dropped_layers, *(square() for _ in range(4)))
    first = capture(model, (x(),))
    tried = [*seeds]
    assert first.draw > 0
    assert tried == list(range(first.draw + 1))
    again = capture(model, (x(),), like=first)
    assert seeds == [*tried, first.draw]
    assert shape_of(again) == shape_of(first)


def test_what_dropout_left_of_data_is_looked_at_once(monkeypatch):
    """There is a parameter that no run reaches; that a draw was mixed into the value that is looked at changes nothing."""

    def guarded(s, x):
        h = nn.functional.dropout(s.m[0](x))
        return h.clamp(-1e4, 1e4) if (h > 1e9).any() else h

    runs = []
    monkeypatch.setattr(RUN, "_run", lambda *args, run=RUN._run: runs.append(args) or run(*args))
    capture(Scripted(guarded, square(), square()), (x(),))
    assert len(runs) == 1


class Restless(nn.Module):
    """Changes whatever a module can change when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.linear = square()
        self.count = 0

    def forward(self, x, scale):
        if x.sum() > 1e9:
            return x
        x.mul_(2.0)
        self.count += int(random.random() + np.random.rand() + 1)  # noqa: NPY002, S311
        self.cache = self.linear(self.norm(x)) * torch.rand([])
        with torch.no_grad():
            self.linear.weight.add_(1.0)
        self.eval()
        return self.cache * scale


def test_nothing_of_the_model_its_inputs_or_the_generators_changes():
    model = Restless().train()
    given = torch.randn(4, 8)
    before = ({name: value.clone() for name, value in model.state_dict().items()}, given.clone())
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    assert capture(model, (given,), {"scale": 2.0}).rung == "tape"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    assert torch.equal(given, before[1])
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1] == generators[1]).all()  # noqa: NPY002
    assert random.getstate() == generators[2]
    assert model.training
    assert (model.count, hasattr(model, "cache")) == (0, False)


class ThroughNumPy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(np.array(x.detach()) * 2)

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize("is_frozen", [False, True])
def test_what_was_there_is_left_out_of_collections_on_the_way_only(is_frozen, monkeypatch):
    """Unless the caller left it out before: then it stays so."""
    seen, frozen, export = [], gc.get_freeze_count, torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **named: (seen.append(frozen()), export(*args, **named))[1])
    model = Scripted(lambda s, x: (seen.append(frozen()), s.m[0](x.view(-1, 8).new_tensor([1.0]) * x))[1], square())
    if is_frozen:
        gc.freeze()
    try:
        before = frozen()
        gs.plan(model, (x(),))
        assert (before > 0) == is_frozen
        assert [count > 0 for count in seen] == [True] * 3  # an outline that is given up, export, and its run
        assert (frozen() > 0) == is_frozen
    finally:
        gc.unfreeze()


def test_a_tape_that_lost_parameters_is_refused_with_the_reasons_of_all_rungs():
    model = Scripted(lambda s, x: ThroughNumPy.apply(s.m[0](x)), square())
    with pytest.raises(errors.CaptureError, match=r"By export: .*By tape: the outputs depend on m.0.bias, m.0.weight") as refused:
        capture(model, (x(),))
    assert "test_tape.py" in str(refused.value)


def test_without_values_a_run_computes_what_is_known_and_says_what_it_guessed():
    def look(s, x, lengths):
        if int(lengths.max()) == 5 and bool((s.m[0](x) < 1e9).all()):
            return s.m[0](x)
        return s.m[1](x)

    with torch.device("meta"):
        model = Scripted(look, square(), square())
    graph = capture(model, (x(), torch.tensor([5, 3])))
    assert {node.parameter for node in graph.nodes} == {"m.0.weight", "m.0.bias", None}
    (guess,) = [text for text in graph.assumptions if text.startswith("One path seen")]
    assert "1e9" in guess


def test_lazy_modules_get_their_shapes_on_a_copy():
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2))
    graph = capture(model, (x(),))
    assert graph.parameters["0.weight"].shape == (3, 8)
    assert graph.parameters["2.weight"].module_type.endswith(".Linear")
    assert nn.parameter.is_lazy(model[0].weight)
    assert "Lazy modules" in graph.assumptions[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_what_they_hold(reentrant, monkeypatch):
    model = Scripted(lambda s, x: checkpoint(s.m[0], x, use_reentrant=reentrant), nn.Sequential(square(), nn.Tanh(), square()))
    graphs = [capture(model, (x(),))]
    on_tape(monkeypatch)
    graphs.append(capture(model, (x(),)))
    for graph in graphs:
        names = [node.op_name for node in graph.nodes if node.kind is NodeKind.OP]
        assert names == ["aten.linear.default", "aten.tanh.default", "aten.linear.default"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_compiled_submodules_run_as_they_are(monkeypatch):
    on_tape(monkeypatch)
    model = nn.Sequential(square(), torch.compile(nn.Sequential(square(), nn.ReLU())))
    graph = capture(model, (x(),))
    assert graph.nodes[-1].provenance.module_path == "1._orig_mod.1"
    assert len(graph.parameters) == 4


@pytest.mark.parametrize(("name", "runs"), [("branch", 2), ("vmap", 1)])
def test_a_plan_looks_again_where_values_chose_the_way_and_exports_once(name, runs, monkeypatch):
    rungs = []
    climbs = {rung: lambda request, rung=rung: (rungs.append(rung), RUNGS[rung](request))[1] for rung in RUNGS}
    monkeypatch.setattr(sys.modules["gainstage.capture.capture"], "RUNGS", climbs)
    build, args, reason = AWAY[name]
    plan = gs.plan(build(), args)
    assert rungs == ["export"] + ["tape"] * runs
    assert any(reason in note for note in plan.notes)


@pytest.mark.parametrize(("way", "solves"), [(lambda h: h.isfinite().all(), 1), (lambda h: h.square().mean() < 10.0, 2)])
def test_what_a_second_look_finds_the_same_is_solved_once(way, solves, monkeypatch):
    """A check of values that holds before and after, and one that the planned weights answer otherwise."""
    planning = importlib.import_module("gainstage.api.planning")
    solved = []
    monkeypatch.setattr(planning, "solve", lambda *a, solve=planning.solve, **k: (solved.append(a), solve(*a, **k))[1])
    model = Scripted(lambda s, x: s.m[1](s.m[0](x)) if way(s.m[0](x)) else s.m[2](s.m[0](x)), square(), square(), square())
    with torch.no_grad():
        model.m[0].weight.mul_(100.0)
    plan = gs.plan(model, (x(),))
    assert len(solved) == solves
    assert {name: plan.parameters[f"m.{name}.weight"].role == "unused" for name in (1, 2)} == {1: False, 2: True}


def clamp_data(s, x):
    s.m[0].weight.data.clamp_(-0.1, 0.1)
    return s.m[0](x)


def move_module(s, x):
    s.m[0].to(torch.float32)
    return s.m[0](x)


@pytest.mark.parametrize("function", [clamp_data, move_module])
def test_a_parameter_that_is_touched_outside_of_autograd_takes_its_gradient_all_the_same(function, monkeypatch):
    on_tape(monkeypatch)
    model = Scripted(function, square())
    graph = capture(model, (x(),))
    torch.testing.assert_close(run_graph(graph, model, (x(),))[graph.outputs[0]], copy.deepcopy(model)(x()).detach())
    assert_reaches_parameters(graph, model, (x(),), {})


def test_a_pass_that_fails_is_not_tried_again():
    """With more than one process the others would wait for it."""
    seen = []

    def failing(_module, x):
        seen.append(x)
        raise ValueError("no")

    with pytest.raises(errors.InputError, match="ValueError: no"):
        run_forward(Scripted(failing), (x(),), {}, modules=(), look_at_output=lambda _: {})
    assert len(seen) == 1


class Affine(nn.Module):
    """``(x - shift) exp(-log_scale)``, both columns of zeros, as a flow has them; a branch that is not taken reads w."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(2, 1)), nn.Parameter(torch.zeros(2, 1))
        self.w, self.layer = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 1e6:
            x = (x - self.shift) * torch.exp(-self.log_scale) @ self.w
        return self.layer(x)


def test_what_a_run_does_not_come_by_and_is_one_number_is_no_weight() -> None:
    model = Affine()
    assert capture(model, (torch.randn(2, 4),)).rung == "tape"
    plan = gs.plan(model, (torch.randn(2, 4),))
    gs.apply(model, plan, seed=0)
    assert not bool(model.shift.any())
    assert not bool(model.log_scale.any())
    assert plan.parameters["w"].distribution.std == pytest.approx(0.5)
