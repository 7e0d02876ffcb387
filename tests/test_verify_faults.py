"""Models that are broken on purpose are blamed at the right parameter, and each fault once."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from verified_models import WIDTH, apply, build, faults, plan_for

import gainstage as gs


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
    "one entry of eight deviations": Broken(
        "mlp", lambda m: set_(m[2].weight[3, 4], 8 * m[2].weight.std()), "not drawn as planned", "2.weight", True
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
