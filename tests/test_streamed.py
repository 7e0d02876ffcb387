"""Verification of a model on the meta device: what it would be, drawn piece by piece, must measure as the model in memory."""

import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.apply import drawn
from gainstage.verify import FindingKind


class Decoder(nn.Module):
    """Tied embedding and head, attention, a norm with a buffer that the constructor computes, and a layer that is used twice."""

    def __init__(self, width=32, words=50):
        super().__init__()
        self.words, self.width = words, width
        self.embedding = nn.Embedding(words, width)
        self.position = nn.Embedding(16, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("slope", torch.linspace(0.5, 1.5, width), persistent=False)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position(torch.arange(16, device=tokens.device))
        x = self.layer(self.layer(x)) * self.slope
        return self.head(self.norm(x))


TOKENS = torch.arange(64).reshape(4, 16) % 50


def on_meta(build=Decoder):
    with torch.device("meta"):
        return build()


def measured(check):
    return {(row.path, row.call, row.output): row.measured for row in check.rows}


def test_a_model_on_meta_measures_like_the_model_in_memory():
    model = Decoder()
    plan = gs.plan(model, (TOKENS,))
    gs.apply(model, plan, seed=5)
    torch.manual_seed(0)
    expected = gs.verify(model, (TOKENS,), plan=plan)
    torch.manual_seed(0)
    check = gs.verify(on_meta(), (TOKENS,), plan=plan, seed=5)
    assert measured(check) == pytest.approx(measured(expected), rel=1e-5)
    assert {row.path for row in check.rows} >= {"embedding", "position", "layer", "norm", "head"}
    assert check.ok == expected.ok
    assert measured(gs.verify(on_meta(), (TOKENS,), plan=plan, seed=6)) != pytest.approx(measured(expected), rel=1e-5)


def test_inputs_unlike_those_of_the_plan_are_blamed():
    def build():
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))

    plan = gs.plan(build(), (torch.randn(64, 32),))
    check = gs.verify(on_meta(build), (4.0 * torch.randn(64, 32),), plan=plan)
    assert [finding.kind for finding in check.findings] == [FindingKind.OTHER_INPUTS]


def test_no_more_is_kept_than_the_bound_and_one_parameter(monkeypatch):
    def build():
        return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))

    monkeypatch.setattr(drawn, "_KEPT", 2 * 64 * 64 * 4)
    model = on_meta(build)
    x = torch.randn(8, 64)
    plan = gs.plan(model, (x,))
    parameters = drawn.DrawnParameters(plan, 0)
    for name in parameters:
        parameters[name]
        assert len(parameters._recent) <= 2
    assert gs.verify(model, (x,), plan=plan).ok


def test_the_operations_done_are_counted():
    model = on_meta()
    plan = gs.plan(model, (TOKENS,))
    calls = []
    gs.verify(model, (TOKENS,), plan=plan, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] <= calls[-1][1]


def test_what_has_no_values_is_refused_by_name():
    model = on_meta()
    plan = gs.plan(model, (TOKENS,), keep=["position.*"])
    with pytest.raises(gs.InputError, match=r"keeps position\.weight"):
        gs.verify(model, (TOKENS,), plan=plan)
    with pytest.raises(gs.InputError, match="meta device"):
        gs.verify(model, (TOKENS,))

    class Forgetful(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("table", torch.full((8,), float(width)))

        def forward(self, x):
            return self.linear(x * self.table)

    forgetful = on_meta(lambda: Forgetful(3))
    x = torch.randn(4, 8)
    with pytest.raises(gs.InputError, match="table is on the meta device"):
        gs.verify(forgetful, (x,), plan=gs.plan(forgetful, (x,)))
