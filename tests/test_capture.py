"""Capture: an interpreter of the graph must reproduce the model, and every refusal must say where and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import (
    CASES,
    IDS,
    Scripted,
    assert_reaches_parameters,
    assert_reproduces,
    block,
    call_twice,
    regions,
    square,
    tied,
    x,
)
from torch import nn

import gainstage as gs
from gainstage import errors
from gainstage.capture import capture
from gainstage.cli.huggingface import cpu_torchvision_if_installed
from gainstage.graph import NodeKind, fingerprint


@pytest.mark.parametrize("name", CASES)
def test_interpreted_graph_reproduces_every_module_output(name):
    build, args, kwargs = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    # A mask is kept as a constant, so it is not among the inputs of the graph.
    graph = capture(model, args, kwargs)
    assert not any(isinstance(node.op, torch._ops.OpOverload) and node.op._schema.is_mutable for node in graph.nodes)
    assert_reproduces(graph, model, args, kwargs)


@pytest.mark.parametrize("name", CASES)
def test_parameters_with_gradients_are_those_that_reach_the_outputs(name):
    build, args, kwargs = CASES[name]
    model = build().train()
    graph = capture(model, args, kwargs)
    assert graph.training
    assert_reaches_parameters(graph, model, args, kwargs)


def test_ties_are_one_parameter_and_unused_ones_are_listed():
    model = tied()
    model.spare = square()
    graph = capture(Scripted(lambda s, ids: s.m[0][2](s.m[0][1](s.m[0][0](ids))), model), (IDS,))
    assert graph.parameters["m.0.0.weight"].aliases == ("m.0.2.weight",)
    assert graph.parameters["m.0.0.weight"].module_type == "torch.nn.modules.sparse.Embedding"
    assert [n.parameter for n in graph.nodes if n.kind is NodeKind.PARAMETER].count("m.0.0.weight") == 1
    assert list(graph.parameters)[-2:] == ["m.0.spare.weight", "m.0.spare.bias"]


def test_what_is_known_is_computed_and_what_is_random_is_not():
    def forward(s, x, ids):
        mask = torch.arange(5)[None, :] < torch.tensor([[3], [5]])
        keep = x.new_empty((2, 1, 1)).bernoulli_(0.9).div_(0.9)
        return s.m[0](x) * keep * mask[..., None] + s.m[1](ids).sum() + torch.zeros_like(x)

    graph = capture(Scripted(forward, square(), nn.Embedding(8, 1)), (x(), IDS))
    ops = [node.op_name for node in graph.nodes if node.kind is NodeKind.OP]
    assert "aten.bernoulli.p" in ops
    assert not {"aten.arange.default", "aten.lt.Tensor", "aten.zeros_like.default"} & set(ops)
    values = [node.value for node in graph.nodes if node.kind is NodeKind.CONSTANT]
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)[..., None]
    assert any(torch.equal(value, expected) for value in values if value.dtype is torch.bool)
    assert any(torch.equal(value, IDS) for value in values if value.dtype is torch.int64)


def test_provenance_names_the_call_and_the_users_line():
    graph = capture(Scripted(call_twice, square(), nn.ReLU(inplace=True)), (x(),))
    linear = [node for node in graph.nodes if node.op is torch.ops.aten.linear.default]
    assert [(n.provenance.module_path, n.provenance.call) for n in linear] == [("m.0", 0), ("m.0", 1)]
    assert linear[0].provenance.module_type == "torch.nn.modules.linear.Linear"
    assert linear[1].provenance.source.endswith(": return s.m[1](s.m[0](h)) + h")
    assert "captured.py:" in linear[1].provenance.source
    assert [(call.path, call.call) for call in graph.calls] == [("m.0", 0), ("m.1", 0), ("m.0", 1), ("m.1", 1), ("", 0)]


def test_identity_is_no_call_and_positions_count_what_is_left_out():
    def forward(s, x):
        y, (_, cell) = s.m[1](s.m[0](x))
        return cell + y.sum()

    graph = capture(Scripted(forward, nn.Identity(), nn.LSTM(8, 4, batch_first=True)), (x(),))
    calls = {call.path: call for call in graph.calls}
    assert "m.0" not in calls
    assert calls["m.1"].positions == (0, 1, 2)

    def returns_mask(s, x):
        return torch.arange(5) > 2, s.m[0](x)

    graph = capture(Scripted(returns_mask, square()), (x(),))
    assert graph.calls[-1].positions == (1,)


class Neighbours(nn.Module):
    """Averages over the neighbours of a node, by a sparse matrix."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x, matrix):
        return self.second(torch.relu(torch.sparse.mm(matrix, self.first(x))))


@pytest.mark.parametrize("layout", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_inputs_are_known_like_what_they_stand_for(layout):
    torch.manual_seed(0)
    matrix = (torch.rand(50, 50) < 0.1).float()
    model, x = Neighbours(), torch.randn(50, 16)
    trace = gs.inspect(model, (x, layout(matrix)))
    assert not trace.sampled
    assert not trace.sampled_backward
    measured = []
    for seed in range(16):
        torch.manual_seed(seed)
        measured.append(Neighbours()(torch.randn(50, 16), layout(matrix)).detach().square().mean().item())
    assert trace.modules["second"][0].second_moment == pytest.approx(sum(measured) / 16, rel=0.1)
    plan = gs.initialize(model, (x, layout(matrix)))
    assert gs.verify(model, (x, layout(matrix)), plan=plan).ok


def test_what_forward_keeps_is_kept_no_longer():
    """A trace would leave tensors without values in a log and a cache of the model."""

    def forward(s, x):
        y = s.m[0](x)
        s.log.append(y)
        s.cache["y"] = s.last = y
        s.cache["all"].append(y)
        return y

    model = Scripted(forward, square())
    first = torch.zeros(1)
    model.log, model.cache, model.last = [first], {"all": []}, None
    log, cache = model.log, model.cache
    capture(model, (x(),))
    assert model.log is log
    assert len(log) == 1
    assert log[0] is first
    assert model.cache is cache
    assert cache == {"all": []}
    assert model.last is None


@pytest.mark.parametrize("mode", [True, False])
def test_model_generator_and_switches_are_left_alone(mode):
    model = nn.Sequential(Scripted(regions, square(), square()), Scripted(lambda s, d: s.m[0](d["h"][0]), nn.BatchNorm1d(8)))
    model.train(mode)
    model[0].register_forward_hook(lambda *_: None)
    hooks = {path: list(module._forward_hooks) for path, module in model.named_modules()}
    attributes = {path: set(module.__dict__) for path, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator, fastpath = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        capture(model, (x(),))
        assert not torch.is_grad_enabled()
    assert {path: list(module._forward_hooks) for path, module in model.named_modules()} == hooks
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert model.training is mode


def test_meta_build_gives_the_same_graph_and_says_what_it_guessed():
    real = nn.Sequential(nn.Embedding(5, 8), nn.Flatten(), nn.Linear(24, 8), nn.BatchNorm1d(8)).eval()
    with torch.device("meta"):
        meta = nn.Sequential(nn.Embedding(5, 8), nn.Flatten(), nn.Linear(24, 8), nn.BatchNorm1d(8)).eval()
    guessed = capture(meta, (IDS.to("meta"),))
    given = capture(meta, (IDS.clamp(max=4),))
    assert fingerprint(guessed) == fingerprint(given) == fingerprint(capture(real, (IDS.clamp(max=4),)))
    assert torch.equal(guessed.by_name["input"].value, torch.tensor([[0, 1, 2], [3, 4, 0]]))
    assert torch.equal(given.by_name["input"].value, IDS.clamp(max=4))
    assert any("5 rows" in sentence for sentence in guessed.assumptions)
    assert len(given.assumptions) == len(guessed.assumptions) - 1 == 2  # the running statistics
    assert torch.equal(given.by_name["b_3_running_mean"].value, torch.zeros(8))
    assert torch.equal(given.by_name["b_3_running_var"].value, torch.ones(8))


def test_fingerprint_sees_parameters_ties_and_their_use_but_no_values():
    def of(model, *inputs):
        return fingerprint(capture(model, inputs))

    pair = nn.Sequential(square(), square())
    base = of(pair, x())
    assert base == of(nn.Sequential(square(), square()), x()[:1]) == of(pair.eval(), x())
    others = [nn.Sequential(square(), nn.Linear(8, 4)), nn.Sequential(square(), nn.Linear(8, 8, bias=False)), pair.double()]
    assert len({base, *(of(model, x().to(next(model.parameters()).dtype)) for model in others)}) == 4
    swapped = Scripted(lambda s, x: s.m[1](s.m[0](x)), square(), square())
    assert of(swapped, x()) != of(Scripted(lambda s, x: s.m[0](s.m[1](x)), square(), square()), x())
    untied = of(swapped, x())
    swapped.m[1].weight = swapped.m[0].weight
    assert of(swapped, x()) != untied


@pytest.mark.parametrize(
    ("build", "inputs", "error", "message"),
    [
        (lambda: square(4), (x(),), errors.CaptureError, "Check that the model runs on these inputs"),
        (square, (x(), x()), errors.InputError, "Linear.forward does not take these arguments"),
        (square, (x()[:0],), errors.InputError, r"size zero, shape \(0, 5, 8\)"),
        (lambda: Scripted(lambda s, x: s.m[0](x).argmax(-1), square()), (x(),), errors.NoSignalError, "No floating-point output"),
        (lambda: Scripted(lambda s, x: x * 2, square()), (torch.ones(2, dtype=torch.long),), errors.NoSignalError, "nothing to"),
    ],
    ids=["mismatch", "arguments", "empty", "integer", "no signal"],
)
def test_refusals_name_the_place_and_the_way_out(build, inputs, error, message, capfd):
    with pytest.raises(error, match=message):
        capture(build(), inputs)
    assert "def forward" not in capfd.readouterr().err  # torch prints the graph that it failed on


def test_parameters_that_cannot_be_drawn_are_all_named():
    model = nn.Sequential(nn.LazyLinear(8), square())
    model.sparse = nn.Parameter(torch.zeros(2, 3).to_sparse())
    model.table = nn.Parameter(torch.zeros(2, 3, dtype=torch.long), requires_grad=False)
    with pytest.raises(errors.UnsupportedParameterError) as refusal:
        capture(model, (x(),))
    for part in ("sparse (not dense", "table (not floating-point, torch.int64"):
        assert part in str(refusal.value)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_quantized_model_is_refused_and_not_taken_for_one_without_parameters():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(errors.UnsupportedParameterError, match=r"^0, 2: quantized"):
        capture(quantized, (x(),))


def test_conversion_costs_little_beside_the_export():
    model = nn.Sequential(*(block(4, 4) for _ in range(12)))
    inputs = (torch.randn(2, 4, 8, 8),)

    def seconds(function: Callable[[], Any]) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    def export() -> None:
        torch.export.export(model, inputs, strict=False)

    ratio = min(seconds(lambda: capture(model, inputs)) for _ in range(3)) / min(seconds(export) for _ in range(3))
    assert ratio < 1.5  # measured: 0.9 to 1.0; functionalising with torch (run_decompositions) would double it


def test_key_value_caches_in_the_output_are_no_obstacle():
    cpu_torchvision_if_installed()
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, use_cache=True, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    graph = capture(model, (), {"input_ids": IDS})
    assert_reproduces(graph, model, (), {"input_ids": IDS})
    assert graph.parameters["transformer.wte.weight"].aliases == ("lm_head.weight",)
