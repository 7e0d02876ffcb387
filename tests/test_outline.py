"""An outline is the graph that torch.export finds, node for node and name for name, and says where it cannot tell."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from benchmarks.zoo.awkward import awkward_models
from test_awkward import LIBRARIES, ON_TAPE, pytestmark  # noqa: F401
from test_capture import CASES, Scripted, square, x
from torch import nn

from gainstage.capture import capture
from gainstage.capture.outline import outline
from gainstage.capture.parameters import parameter_table
from gainstage.capture.shapes import Unclear
from gainstage.capture.surroundings import Request
from gainstage.cli.huggingface import cpu_torchvision_if_installed
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


UNCLEAR = {
    "a branch on values": lambda s, x: s.m[0](x) if x.sum() > 0 else s.m[1](x),
    "data": lambda s, x: s.m[0](x) + s.m[1].weight.data.sum(),
    "NumPy": lambda s, x: s.m[0](x) + float(s.m[1].bias.detach().numpy().sum()),
    "a mask": lambda s, x: s.m[0](x)[x > 0],
    "autocast": lambda s, x: torch.autocast("cpu")(lambda: s.m[0](x))().float(),
    "inference mode": lambda s, x: s.m[0](x) + torch.inference_mode()(lambda: x * 2)(),
    "vmap": lambda s, x: torch.vmap(s.m[0])(x),
    "no gradient": lambda s, x: s.m[0](x) + torch.no_grad()(lambda: s.m[1](x))(),
    "a flag of an input": lambda s, x: s.m[0](x.requires_grad_()),
    "a hook": lambda s, x: (h := s.m[0](x), h.register_hook(lambda g: g), h)[-1],
    "a failure": lambda s, x: s.m[0](x).reshape(3),
}


@pytest.mark.parametrize("way", ["told", *UNCLEAR])
def test_a_model_its_inputs_and_the_generators_stay_as_they_are(way):
    """Also where an outline is given up, on the way."""

    def forward(s, x):
        h = keep_and_write(s, x)
        return h if way == "told" else UNCLEAR[way](s, h) if way != "a flag of an input" else UNCLEAR[way](s, x)

    model, given = Scripted(forward, square(), square()), x()
    model.log = []
    model.register_buffer("count", torch.zeros(()))
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    attributes, fed = set(vars(model)), given.clone()
    _, names = parameter_table(model)
    request = Request(model=model, args=(given,), kwargs={}, loss=None, buffers={}, names=names)
    with nullcontext() if way == "told" else pytest.raises(Unclear):
        outline(request)
    assert (set(vars(model)), model.log) == (attributes, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(given, fed)
    assert not given.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.backends.cudnn.enabled
