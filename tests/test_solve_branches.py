"""Streams, siblings and what is shared by them: each branch adds its part."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plain_roles import as_role, nodes_of, solved, variance
from torch import nn

import gainstage as gs
from gainstage.roles import Branch, Merge, Role, Setter, Stream


class Stack(nn.Module):
    def __init__(self, branch, depth=4, width=64):
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.branches = nn.ModuleList(branch(width) for _ in range(depth))

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return x


def stream_roles(ending):
    def add(graph, uses):
        adds = nodes_of(graph, "add")
        ends = [as_role(uses, f"branches.{i}.{ending}", Role.RESIDUAL_END) for i in range(len(adds))]
        branches = tuple(Branch(operand=list(a.operands())[1], setters=(Setter(end),)) for a, end in zip(adds, ends, strict=True))
        return {"streams": (Stream(first="linear", adds=tuple(a.name for a in adds), branches=branches),)}

    return add


BRANCHES = {
    "linear": (lambda d: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d)), "3.weight"),
    "dropout": (lambda d: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.Dropout(0.3)), "1.weight"),
    "norm": (lambda d: nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.BatchNorm1d(d)), "3.weight"),
    "gelu": (lambda d: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU()), "1.weight"),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_each_branch_adds_one_part_in_n_of_the_stream(kind):
    branch, ending = BRANCHES[kind]
    model, x = Stack(branch, depth=5), torch.randn(32, 64)
    plan = solved(model, (x,), add=stream_roles(ending))
    shares = [plan.predictions[f"branches.{i}@0"][0] for i in range(5)]
    assert shares == pytest.approx([0.2] * 5, rel=1.2e-3)
    assert "N = 5 branches" in plan.explain(f"branches.2.{ending}")
    if kind == "norm":
        assert plan.parameters["branches.2.3.weight"].distribution.mean == pytest.approx(0.2**0.5, rel=1e-3)
    if kind == "dropout":
        norm = 1 / (1 + 1e-5)
        assert variance(plan, "branches.0.1.weight") == pytest.approx(0.2 * (1 - 0.3) / (64 * norm), rel=1e-3)


class Silent(nn.Module):
    """A stream that starts from zeros, as the queries of a DETR decoder do."""

    def __init__(self):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x):
        stream = self.norm(0.0 * x)
        return stream + self.branch(x)


def test_a_silent_stream_is_filled_to_one():
    def add(graph, uses):
        (merge,) = nodes_of(graph, "add")
        end = as_role(uses, "branch.weight", Role.RESIDUAL_END)
        branches = (Branch(operand="linear", setters=(Setter(end),)),)
        return {"streams": (Stream(first="layer_norm", adds=(merge.name,), branches=branches),)}

    plan = solved(Silent(), (torch.randn(4, 64),), add=add)
    assert plan.predictions["branch@0"] == pytest.approx((1.0,), rel=1e-3)
    assert "silent" in plan.explain("branch.weight")


def test_a_weight_shared_by_all_branches_is_decided_once():
    branch = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    model = Stack(lambda d: branch, depth=3)

    def add(graph, uses):
        adds = nodes_of(graph, "add")
        ends = [replace(use, role=Role.RESIDUAL_END) for use in uses["branches.0.1.weight"]]
        uses["branches.0.1.weight"] = tuple(ends)
        branches = tuple(Branch(operand=list(a.operands())[1], setters=(Setter(end),)) for a, end in zip(adds, ends, strict=True))
        return {"streams": (Stream(first="linear", adds=tuple(a.name for a in adds), branches=branches),)}

    plan = solved(model, (torch.randn(8, 64),), add=add)
    assert variance(plan, "branches.0.1.weight") == pytest.approx(1 / (3 * 64), rel=1e-3)
    assert "used 3 times; the first use decides" in plan.explain("branches.0.1.weight")


class Inception(nn.Module):
    def __init__(self, widths=(8, 24, 32)):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(16, width, 1) for width in widths)

    def forward(self, x):
        return torch.cat([F.relu(branch(x)) for branch in self.branches], 1)


def merge_roles(op, names, *, is_sum, inner=()):
    def add(graph, uses):
        (merge,) = nodes_of(graph, op)
        operands = list(merge.operands())
        branches = tuple(
            Branch(operand=operand, setters=(Setter(as_role(uses, name, Role.MERGE_END)),))
            for operand, name in zip(operands, names, strict=True)
        )
        return {"merges": (Merge(node=merge.name, is_sum=is_sum, branches=branches),)}

    return add


def test_concatenated_branches_contribute_equally():
    """``n_b sigma_b^2`` constant: ``sigma_b^2 ~ 1 / n_b`` after ReLU, and one on average."""
    names = [f"branches.{i}.weight" for i in range(3)]
    plan = solved(Inception(), (torch.randn(2, 16, 8, 8),), add=merge_roles("cat", names, is_sum=False))
    for name, width in zip(names, (8, 24, 32), strict=True):
        assert variance(plan, name) == pytest.approx(2 * 64 / (3 * width) / 16, rel=1e-3)
    assert plan.predictions["@0"] == pytest.approx((1.0,), rel=1e-3)
    assert "n_b = 24 of the concatenated channels" in plan.explain("branches.1.weight")


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(32, 64)

    def forward(self, x):
        return F.dropout(self.a(x), 0.5) + self.b(x).relu()


def test_siblings_that_are_added_share_one_second_moment():
    plan = solved(Sum(), (torch.randn(4, 32),), add=merge_roles("add", ["a.weight", "b.weight"], is_sum=True))
    assert variance(plan, "a.weight") == pytest.approx(0.5 * 0.5 / 32, rel=1e-3)
    assert variance(plan, "b.weight") == pytest.approx(0.5 * 2 / 32, rel=1e-3)


class Pooled(nn.Module):
    """A sibling without parameters: the other one follows it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 32)

    def forward(self, x):
        return self.a(x) + 2.0 * x


def test_a_sibling_that_nothing_sets_is_followed():
    def add(graph, uses):
        (merge,) = nodes_of(graph, "add")
        linear, other = merge.operands()
        setter = Setter(as_role(uses, "a.weight", Role.MERGE_END))
        branches = (Branch(operand=linear, setters=(setter,)), Branch(operand=other, setters=()))
        return {"merges": (Merge(node=merge.name, is_sum=True, branches=branches),)}

    plan = solved(Pooled(), (torch.randn(4, 32),), add=add)
    assert plan.predictions["a@0"] == pytest.approx((4.0,), rel=1e-3)


class Exchange(nn.Module):
    """Two streams side by side that are added to each other after each pair of blocks, as in HRNet."""

    def __init__(self, exchanges, width=64):
        super().__init__()
        self.starts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(exchanges))
        self.across = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(exchanges))

    def forward(self, x):
        streams = [start(x) for start in self.starts]
        for blocks, across in zip(self.blocks, self.across, strict=True):
            first, second = (torch.relu(stream + block(stream)) for stream, block in zip(streams, blocks, strict=True))
            streams = [torch.relu(first + across[0](second)), torch.relu(second + across[1](first))]
        return streams[0] + 0.0


def test_streams_that_are_added_to_each_other_again_and_again_do_not_double_each_time():
    """As siblings they would: 2^12 and more."""
    plan = gs.plan(Exchange(12), (torch.randn(16, 64),))
    assert plan.predictions["blocks.11.0@0"][0] < 2.0
    levels = [plan.predictions[f"across.{i}.0@0"][0] for i in range(1, 12)]
    assert max(levels) < 1.1 * min(levels)
