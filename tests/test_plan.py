"""Plans: what they refuse to be, that they do not change, how they explain themselves and compare with a model."""

import copy
import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch

from gainstage.errors import InputError, PlanMismatchError, UnknownNameError
from gainstage.plan import Block, Distribution, Family, ParameterPlan, Plan

NORMAL = Distribution(family=Family.NORMAL, std=0.5)
ZERO = Distribution(family=Family.CONSTANT)


def parameter(**fields):
    return ParameterPlan(
        **{"name": "fc.weight", "shape": (6, 4), "dtype": "float32", "role": "weight", "distribution": NORMAL, **fields}
    )


def plan(*parameters, **fields):
    named = {each.name: each for each in parameters or (parameter(),)}
    return Plan(**{"policy": "unit", "parameters": named, "fingerprint": "f", "training": True, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"std": float("nan")}, "std of a distribution is nan; it must be finite"),
        ({"mean": float("inf")}, "mean of a distribution is inf"),
        ({"std": -1.0}, "cannot be negative"),
        ({"family": Family.CONSTANT, "std": 1.0}, "a constant has std 0"),
        ({"family": Family.ORTHOGONAL, "mean": 1.0}, "an orthogonal matrix have mean 0"),
        ({"family": Family.DELTA_ORTHOGONAL, "mean": 1.0}, "mean 0"),
    ],
)
def test_a_distribution_that_cannot_be_drawn(fields, message):
    with pytest.raises(InputError, match=message):
        Distribution(**{"family": Family.NORMAL, **fields})


ORTHOGONAL = Distribution(family=Family.ORTHOGONAL, std=1.0)
DELTA = Distribution(family=Family.DELTA_ORTHOGONAL, std=1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int64"}, "'int64' is not a floating-point type"),
        ({"dtype": "float"}, "'float' is not a floating-point type"),  # torch's other name for float32 would never match
        ({"dtype": "onnx"}, "'onnx' is not a floating-point type"),  # a module of torch, loaded by being asked for
        ({"dtype": "float4_e2m1fn_x2"}, "not a floating-point type"),  # two numbers in one entry
        ({"shape": (6, -1)}, r"a dimension of shape \[6, -1\] is negative"),
        ({"output_dims": (0, 0)}, "not different dimensions"),
        ({"output_dims": (-1,)}, "counted from 0"),
        ({"output_dims": (2,), "distribution": ORTHOGONAL}, r"with output_dims \[2\] is no matrix"),
        ({"blocks": (Block(0, 0, 3, NORMAL), Block(1, 0, 3, NORMAL))}, r"block \[:, 0:3\] is not along"),
        ({"blocks": (Block(2, 0, 3, NORMAL),)}, "is not along"),
        ({"blocks": (Block(0, 0, 3, NORMAL), Block(0, 2, 4, NORMAL))}, r"block \[2:4\] overlaps"),
        ({"blocks": (Block(0, 3, 3, NORMAL),)}, "overlaps another, or lies outside"),
        ({"blocks": (Block(0, 3, 7, NORMAL),)}, r"lies outside of shape \[6, 4\]"),
        ({"shape": (), "blocks": (Block(0, 0, 1, NORMAL),), "output_dims": ()}, "is not along"),
        ({"dtype": "float16", "distribution": Distribution(family=Family.NORMAL, std=1e4)}, "does not fit into float16"),
        ({"distribution": Distribution(family=Family.CONSTANT, mean=1e39)}, "does not fit into float32"),
        ({"shape": (6,), "distribution": ORTHOGONAL}, "is no matrix"),
        ({"output_dims": (), "distribution": ORTHOGONAL}, "is no matrix"),
        ({"output_dims": (0, 1), "distribution": DELTA}, "a delta-orthogonal kernel has the shape"),
        ({"shape": (6, 4, 3), "blocks": (Block(2, 0, 1, DELTA),)}, "a delta-orthogonal kernel has the shape"),
    ],
)
def test_a_parameter_plan_that_cannot_be_drawn(fields, message):
    with pytest.raises(InputError, match=message) as refusal:
        parameter(**fields)
    assert "fc.weight" in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": {"other": parameter()}}, "the plan of 'fc.weight' stands under the name 'other'"),
        ({"parameters": {"fc.weight": parameter(aliases=("fc.weight",))}}, "'fc.weight' names two parameters"),
        ({"predictions": {"fc@0": (-1.0,)}}, "predictions of fc@0"),
        ({"predictions": {"fc@0": (float("nan"),)}}, "must be finite"),
        ({"predictions": {"fc@0": (1.0,)}, "spreads": {"fc@0": (1.0, 2.0)}}, "fc@0 has 2 spreads for 1 predictions"),
        ({"spreads": {"fc@0": (1.0,)}}, "fc@0 has 1 spreads for 0 predictions"),
    ],
)
def test_a_plan_that_contradicts_itself(fields, message):
    with pytest.raises(InputError, match=message):
        plan(**fields)


def test_a_plan_does_not_change():
    given = {"fc.weight": parameter()}
    predictions = {"fc@0": (1.0,)}
    made = plan(parameters=given, predictions=predictions)
    copied = copy.deepcopy(made)
    given.clear()
    predictions["fc@0"] = (2.0,)
    assert made == copied
    assert list(made.parameters) == ["fc.weight"]
    with pytest.raises(TypeError):
        made.parameters["x"] = parameter()
    with pytest.raises(TypeError):
        made.predictions["fc@0"] = (3.0,)
    frozen = {"policy": made, "shape": made.parameters["fc.weight"], "std": NORMAL, "dim": Block(0, 0, 1, NORMAL)}
    for name, target in frozen.items():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, name, None)


def test_a_plan_can_be_sent_to_other_processes():
    made = plan(parameter(), parameter(name="b", shape=(3,), distribution=ZERO), predictions={"fc@0": (0.1, 1 / 3)}, notes=("n",))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(made, protocol)) == made  # noqa: S301


def test_explain():
    made = plan(
        parameter(
            aliases=("head.weight",),
            blocks=(Block(0, 0, 2, NORMAL), Block(0, 2, 4, ZERO)),
            derivation=("fan_in · v · q = 1", "v = 1/(4 · 1) = 0.25"),
        ),
        parameter(name="norm.weight", shape=(4,), distribution=Distribution(family=Family.KEEP)),
        parameter(name="conv.weight", shape=(4, 4, 3), distribution=ORTHOGONAL),
    )
    assert made.explain("fc.weight").splitlines() == [
        "fc.weight  [6, 4] float32, weight",
        "tied to head.weight: one tensor, drawn once",
        "[0:2]  normal, mean 0, std 0.5",
        "[2:4]  constant 0",
        "elsewhere  normal, mean 0, std 0.5",
        "  fan_in · v · q = 1",
        "  v = 1/(4 · 1) = 0.25",
    ]
    assert made.explain("head.weight") == made.explain("fc.weight")
    assert made.explain("norm.weight").splitlines() == ["norm.weight  [4] float32, weight", "kept as it is"]
    assert made.explain("conv.weight").splitlines()[1] == "orthogonal, std 1"
    with pytest.raises(UnknownNameError, match=r"no parameter 'fc.wieght' \(nearest: fc.weight"):
        made.explain("fc.wieght")
    with pytest.raises(UnknownNameError, match=r"no parameter 'zzz'\."):
        made.explain("zzz")


def facts(**fields):
    return SimpleNamespace(**{"shape": (6, 4), "dtype": torch.float32, "aliases": (), **fields})


def test_a_plan_fits_its_own_model_whatever_the_order_of_ties():
    plan(parameter(aliases=("a", "b"))).check_fits({"fc.weight": facts(aliases=("b", "a"))})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, r"The plan has 'fc.weight', the model has not\."),
        ({"fd.weight": facts()}, r"the model has not \(nearest: fd.weight\)"),
        ({"fc.weight": facts(shape=(4, 6))}, r"fc.weight is planned as \[6, 4\], but is \[4, 6\]"),
        ({"fc.weight": facts(dtype=torch.float64)}, "planned as float32, but is float64"),
        ({"fc.weight": facts(aliases=("x",))}, "planned not tied, but is tied to x"),
        ({"fc.weight": facts(), "fc.bias": facts()}, "The model has 'fc.bias', the plan has not"),
    ],
)
def test_the_first_difference_is_named(found, message):
    with pytest.raises(PlanMismatchError, match=message):
        plan().check_fits(found)
