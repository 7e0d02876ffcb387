"""Wrappers of torch add parts to names; the values are those of the model inside."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gainstage.apply import apply
from gainstage.plan import Distribution, Family, ParameterPlan, Plan

# torch.compile imports a part of torch that still uses what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def build():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3, bias=False))
    model[2].weight = nn.Parameter(model[2].weight.detach())
    return model


def plan_under(names, shapes):
    normal = Distribution(family=Family.NORMAL, std=0.5)
    parameters = [
        ParameterPlan(name=name, shape=tuple(shape), dtype="float32", role="weight", distribution=normal)
        for name, shape in zip(names, shapes, strict=True)
    ]
    return Plan(policy="test", fingerprint="", training=True, parameters={p.name: p for p in parameters})


def checkpointed():
    model = build()
    model[1] = checkpoint_wrapper(model[1])
    return model


def compiled_inside():
    model = build()
    model[0] = torch.compile(model[0])
    return model


WRAPPERS = {
    "torch.compile": lambda: torch.compile(build()),
    "compiled part": compiled_inside,
    "checkpoint_wrapper": checkpointed,
    "DataParallel": lambda: nn.DataParallel(build()),
    "compiled and parallel": lambda: torch.compile(nn.DataParallel(checkpointed())),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_gets_the_values_of_the_model_inside(wrap):
    expected, wrapped = build(), wrap()
    plan = plan_under(*zip(*((name, p.shape) for name, p in expected.named_parameters()), strict=True))
    apply(expected, plan, seed=5)
    apply(wrapped, plan, seed=5)
    for first, second in zip(expected.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_plan_of_the_wrapped_model_fits_it_too():
    """Its names have the wrapper's part, and so have its streams."""
    wrapped, inner = torch.compile(build()), build()
    plan = plan_under(*zip(*((f"_orig_mod.{name}", p.shape) for name, p in inner.named_parameters()), strict=True))
    apply(wrapped, plan, seed=5)
    assert all(name.startswith("_orig_mod.") for name, _ in wrapped.named_parameters())
    assert (next(iter(wrapped.parameters())) != 0).all()


def test_a_module_that_is_only_named_like_a_wrapped_one_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2, bias=False)})
    apply(model, plan_under(["module.weight"], [(2, 2)]))
