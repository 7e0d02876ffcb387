"""The zoo benchmark: what it loads, what it writes for each model, and that a failure is a row and no end."""

import json
from dataclasses import asdict

import pytest
import torch
from benchmarks.zoo.__main__ import apart
from benchmarks.zoo.load import Loaded, zoo_models
from benchmarks.zoo.row import examine
from benchmarks.zoo.summary import failures, read_rows, totals
from torch import nn


class Unreadable(nn.Module):
    def forward(self, x):
        raise RuntimeError("no such thing\nand more")


def small(model):
    def arguments(seed):
        return (torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)),), {}

    return lambda: Loaded(model.train(), arguments)


@pytest.mark.parametrize(("zoo", "count"), [("transformers", 254), ("timm", 98), ("torchvision", 86), ("awkward", 34)])
def test_a_zoo_is_listed_whole(zoo, count):
    assert len(zoo_models(zoo)) == count


def test_inputs_depend_on_the_seed_alone():
    loaded = zoo_models("awkward")["mha"]()
    (first,), _ = loaded.arguments(1)
    (again,), _ = loaded.arguments(1)
    (other,), _ = loaded.arguments(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert loaded.model.training


def test_a_row_tells_what_was_found_and_is_read_back(tmp_path):
    row = examine("awkward", "plain", small(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))), draws=3)
    assert (row.failure, row.rung, row.draws, row.sampled) == ("", "export", 3, 0)
    assert row.ruled == 3
    assert len(row.errors) + row.apart == 4  # three layers and the whole
    assert max(row.errors) < 0.2
    path = tmp_path / "zoo.jsonl"
    path.write_text(json.dumps(asdict(row)) + "\n", encoding="utf-8")
    assert read_rows(path)["awkward", "plain"].errors == row.errors
    assert [line[:4] for line in totals([row])] == [("awkward", "34", "1", "1"), ("all", "472", "1", "1")]


def test_a_row_without_draws_keeps_those_of_the_one_before():
    build = small(nn.Linear(32, 64))
    drawn, planned = (examine("awkward", "plain", build, draws=draws) for draws in (2, 0))
    assert (planned.draws, planned.errors) == (0, [])
    assert planned.plan_seconds > 0.0
    assert planned.forward_seconds > 0.0
    kept = planned.with_draws_of(drawn)
    assert (kept.draws, kept.errors, kept.apart, kept.worst) == (2, drawn.errors, drawn.apart, drawn.worst)
    assert kept.plan_seconds == planned.plan_seconds


def test_a_model_that_cannot_be_read_is_a_row_with_the_reason():
    row = examine("awkward", "unreadable", small(Unreadable()))
    assert row.failure.startswith("capture: ")
    assert "\n" not in row.failure
    assert failures([row]) == [("awkward:unreadable", row.failure)]


def test_a_model_that_takes_too_long_is_ended():
    def build():
        while True:
            torch.ones(1)

    row = apart("awkward", "endless", build, 2, 0.2)
    assert row.failure.startswith("limit: ")
