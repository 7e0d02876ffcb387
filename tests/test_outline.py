"""An outline is the graph that torch.export finds, node for node and name for name, and says where it cannot tell."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from benchmarks.zoo.awkward import awkward_models
from captured import CASES, Scripted, square, x
from test_awkward import LIBRARIES, ON_TAPE, pytestmark  # noqa: F401
from torch import nn

from gainstage.capture import capture
from gainstage.capture.outline import outline
from gainstage.capture.parameters import parameter_table
from gainstage.capture.shapes import Unclear
from gainstage.capture.surroundings import Request
from gainstage.cli.huggingface import cpu_torchvision_if_installed
from gainstage.errors import CaptureError
from gainstage.graph import Graph, NodeKind

STAGE = importlib.import_module("gainstage.capture.capture")


class Pair(NamedTuple):
    outlined: Graph
    exported: Graph
    told: bool  # whether there was an outline, or torch.export in its place


def pair(monkeypatch, model, args=(), kwargs=None) -> Pair:
    """The graph as it is found, and that of torch.export."""
    told, outline = [], STAGE.outline

    def watched(request):
        try:
            found = outline(request)
        except Unclear:
            told.append(False)
            raise
        told.append(True)
        return found

    def none(_request):
        raise Unclear

    monkeypatch.setattr(STAGE, "outline", watched)
    outlined = capture(model, args, kwargs)
    monkeypatch.setattr(STAGE, "outline", none)
    exported = capture(model, args, kwargs)
    monkeypatch.setattr(STAGE, "outline", outline)
    return Pair(outlined, exported, told == [True])


def assert_equal(found: Pair) -> None:
    """Everything, also names and lines."""
    for ours, theirs in zip(found.outlined.nodes, found.exported.nodes, strict=True):
        assert (ours.value is None) == (theirs.value is None)
        assert ours.value is None or torch.equal(ours.value, theirs.value), ours.name
        assert repr(ours) == repr(theirs)
    assert found.outlined.outputs == found.exported.outputs
    assert found.outlined.calls == found.exported.calls
    assert found.outlined.assumptions == found.exported.assumptions


# Regions without gradients are those of torch.export: their nodes have names of their own.
CUT = {"out", "pieces", "regions"}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_an_outline_is_the_graph_of_export(name, mode, monkeypatch):
    build, args, kwargs = CASES[name]
    found = pair(monkeypatch, getattr(build(), mode)(), args, kwargs)
    assert_equal(found)
    assert found.told == (name not in CUT)


LARGE = {"timm_nfnet", "timm_swin", "timm_effnet", "timm_vit", "tv_resnet", "mixtral"}
AWKWARD = sorted(awkward_models().keys() - {"lazy"} - LARGE - ON_TAPE)
LEFT = {"compiled", "item"}


@pytest.mark.parametrize("name", AWKWARD)
def test_an_outline_of_an_awkward_model_is_the_graph_of_export(name, monkeypatch):
    if name in LIBRARIES:
        cpu_torchvision_if_installed()
        pytest.importorskip(LIBRARIES[name])
    example = awkward_models()[name](0)
    found = pair(monkeypatch, example.model, example.args, example.kwargs)
    assert_equal(found)
    assert found.told == (name not in LEFT), name


def test_an_outline_on_the_meta_device_is_the_graph_of_export(monkeypatch):
    with torch.device("meta"):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)
        ids = torch.zeros(2, 5, dtype=torch.int64)
    model = nn.Sequential(nn.Embedding(7, 16, device="meta"), model)
    found = pair(monkeypatch, model, (ids,))
    assert_equal(found)
    assert found.told


def test_inputs_keep_the_names_that_export_gives_them(monkeypatch):
    class Named(nn.Module):
        def forward(self, input, *rest, add):  # noqa: A002
            return input + rest[0] + add["a b"][1]

    found = pair(monkeypatch, Named(), (x(), x()), {"add": {"a b": [x(), x()]}})
    assert_equal(found)
    assert found.told
    names = [node.name for node in found.outlined.nodes if node.kind is NodeKind.INPUT]
    assert names == ["input", "rest_0", "add_a_b_1"]


def keep_and_write(s, x):
    s.kept = x
    s.log.append(x)
    s.count.add_(1)
    return s.m[1](s.m[0](x) + torch.rand(8))


TOLD = {
    "nothing": lambda s, x: x,
    "data": lambda s, x: s.m[0](x) + s.m[1].weight.data.sum(),
    "a write to data": lambda s, x: (s.m[1].weight.data.clamp_(-1, 1), s.m[1](x))[1],
    "a flag": lambda s, x: s.m[0](x.requires_grad_()),
    "a check": lambda s, x: s.m[0](x) if x.isfinite().all() else s.m[0](x.clamp(-1, 1)),
    "a value that is known": lambda s, x: s.m[0](x) if s.count > 0 else s.m[1](x),
}
UNCLEAR = {
    "NumPy": lambda s, x: s.m[0](x) + float(s.m[1].bias.detach().numpy().sum()),
    "autocast": lambda s, x: torch.autocast("cpu")(lambda: s.m[0](x))().float(),
    "inference mode": lambda s, x: s.m[0](x) + torch.inference_mode()(lambda: x * 2)(),
    "vmap": lambda s, x: torch.vmap(s.m[0])(x),
    "no gradient": lambda s, x: s.m[0](x) + torch.no_grad()(lambda: s.m[1](x))(),
    "a hook": lambda s, x: (h := s.m[0](x), h.register_hook(lambda g: g), h)[-1],
    "a failure": lambda s, x: s.m[0](x).reshape(3),
}
REFUSED = {
    "a branch on values": lambda s, x: s.m[0](x) if x.sum() > 0 else s.m[1](x),
    "a mask": lambda s, x: s.m[0](x)[x > 0],
    "places": lambda s, x: s.m[0](x)[torch.where(x > 0)],
}


@pytest.mark.parametrize("way", [*TOLD, *UNCLEAR, *REFUSED])
def test_a_model_its_inputs_and_the_generators_stay_as_they_are(way):
    """Also where an outline is given up, on the way."""

    def forward(s, x):
        return {**TOLD, **UNCLEAR, **REFUSED}[way](s, x + keep_and_write(s, x))

    model, given = Scripted(forward, square(), square()), x()
    model.log = []
    model.register_buffer("count", torch.zeros(()))
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    attributes, fed = set(vars(model)), given.clone()
    _, names = parameter_table(model)
    request = Request(model=model, args=(given,), kwargs={}, loss=None, buffers={}, names=names)
    with nullcontext() if way in TOLD else pytest.raises(Unclear if way in UNCLEAR else CaptureError):
        outline(request)
    assert (set(vars(model)), model.log) == (attributes, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(given, fed)
    assert not given.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.backends.cudnn.enabled


def test_data_of_a_parameter_take_no_gradient_but_what_is_written_to_them_does():
    for way, expected in (("data", ["linear", "detach", "sum", "add"]), ("a write to data", ["clamp", "linear"])):
        graph = capture(Scripted(TOLD[way], square(), square()), (x(),))
        assert graph.rung == "export"
        assert [node.short_name for node in graph.nodes if node.kind is NodeKind.OP] == expected


def test_a_flag_of_an_input_leaves_it_alone():
    given = x()
    graph = capture(Scripted(TOLD["a flag"], square()), (given,))
    assert graph.rung == "export"
    assert not given.requires_grad


def ops(graph):
    return [node.op_name for node in graph.nodes if node.kind is NodeKind.OP]


def test_a_value_that_is_known_shows_the_way():
    """As in a run: what the buffer holds by then, after a write."""
    model = Scripted(lambda s, x: (s.count.add_(1), s.m[0](x).sin() if s.count > 1 else s.m[1](x).cos())[1], square(), square())
    for start, way in ((0.0, "aten.cos.default"), (1.0, "aten.sin.default")):
        model.register_buffer("count", torch.tensor(start))
        graph = capture(model, (x(),))
        assert (graph.rung, graph.has_choices) == ("export", False)
        assert ops(graph) == ["aten.linear.default", way]
        assert model.count == start


def test_signals_are_finite_to_an_outline():
    """Where one overflows the model would clamp it; a run says the same, and that it looked."""
    model = Scripted(TOLD["a check"], square())
    graph = capture(model, (x(),))
    assert (graph.rung, graph.has_choices) == ("export", False)
    assert ops(graph) == ["aten.linear.default"]
    assert any("find all well" in assumption and "isfinite" in assumption for assumption in graph.assumptions)


def test_a_signal_that_infinities_are_written_into_need_not_be_finite():
    model = Scripted(lambda s, x: TOLD["a check"](s, x.masked_fill(torch.eye(8, dtype=torch.bool)[:4], -torch.inf)), square())
    graph = capture(model, (torch.randn(4, 8),))
    assert graph.rung == "tape"
    assert "aten.clamp.default" in ops(graph)
