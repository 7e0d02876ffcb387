"""Plans as JSON: exact both ways, and nothing but PlanFormatError for any other text."""

import json
import subprocess
import sys
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gainstage.errors import InputError, PlanFormatError
from gainstage.plan import SCHEMA_VERSION, Block, Distribution, Family, ParameterPlan, Passage, Plan

numbers = st.floats(-60, 60)
deviations = st.floats(0, 60)
texts = st.text(max_size=12)
entrywise = st.one_of(
    st.just(Distribution(family=Family.KEEP)),
    st.builds(lambda mean: Distribution(family=Family.CONSTANT, mean=mean), numbers),
    st.builds(
        Distribution,
        family=st.sampled_from([Family.NORMAL, Family.TRUNCATED_NORMAL, Family.UNIFORM]),
        mean=numbers,
        std=deviations,
    ),
)
orthogonal = st.builds(lambda std: Distribution(family=Family.ORTHOGONAL, std=std), deviations)


@st.composite
def parameter_plans(draw, name):
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    families = st.one_of(entrywise, orthogonal) if len(shape) > 1 else entrywise
    blocks = ()
    if shape:
        dim = draw(st.integers(0, len(shape) - 1))
        edges = sorted(draw(st.sets(st.integers(0, shape[dim]), max_size=6)))
        blocks = tuple(Block(dim, *span, draw(families)) for span in zip(edges[::2], edges[1::2], strict=False))
    return ParameterPlan(
        name=name,
        aliases=tuple(f"{name}{index}'" for index in range(draw(st.integers(0, 2)))),
        shape=shape,
        dtype=draw(st.sampled_from(["float64", "float32", "bfloat16", "float16"])),
        role=draw(texts),
        distribution=draw(families),
        blocks=blocks,
        output_dims=(draw(st.integers(0, len(shape) - 1)),) if shape else (),
        derivation=tuple(draw(st.lists(texts, max_size=3))),
        passage=draw(st.none() | st.builds(Passage, origin=texts, forward=factors, backward=factors)),
    )


factors = st.floats(0, 1e300)
moments = st.lists(st.floats(0, 1e300), min_size=1, max_size=3).map(tuple)


@st.composite
def plans(draw):
    names = draw(st.lists(st.text(max_size=8).filter(lambda name: "'" not in name), unique=True, max_size=4))
    predictions = draw(st.dictionaries(texts, moments, max_size=3))
    return Plan(
        policy=draw(texts),
        parameters={name: draw(parameter_plans(name)) for name in names},
        fingerprint=draw(texts),
        training=draw(st.booleans()),
        predictions=predictions,
        spreads={call: tuple(reversed(values)) for call, values in predictions.items() if draw(st.booleans())},
        notes=tuple(draw(st.lists(texts, max_size=2))),
    )


@given(plans())
def test_a_plan_comes_back_to_the_last_bit(plan):
    text = plan.to_json()
    back = Plan.from_json(text)
    assert back == plan
    assert list(back.parameters) == list(plan.parameters)
    assert back.to_json() == text


WEIGHT = ParameterPlan(
    name="w",
    aliases=("tied",),
    shape=(6, 4),
    dtype="float32",
    role="weight",
    distribution=Distribution(family=Family.NORMAL, std=0.5),
    blocks=(Block(0, 0, 2, Distribution(family=Family.UNIFORM, std=0.25)),),
    derivation=("v = 1",),
    passage=Passage(origin="x", forward=1.0, backward=2.0),
)
PLAN = Plan(
    policy="unit",
    parameters={"w": WEIGHT},
    fingerprint="f",
    training=True,
    predictions={"fc@0": (1.5, 2.0)},
    spreads={"fc@0": (0.1, 0.2)},
    notes=("a note",),
)
TEXT = PLAN.to_json()
VERSION = f'"version": {SCHEMA_VERSION}'


def places(value, path=()):
    """The path of every value inside plain data."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


PLACES = list(places(json.loads(TEXT)))


def assert_refused_or_read(text):
    """Nothing but our exception; and what is read is a plan, which writes itself."""
    try:
        plan = Plan.from_json(text)
    except PlanFormatError as error:
        refusal = str(error)
    else:
        assert Plan.from_json(plan.to_json()) == plan
        return True
    assert 10 < len(refusal) < 1000
    return False


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**70, -1, 0, 1e308, -1e308, 10**400, "float8_e5m2", "onnx", "__doc__", "\ud800", "keep", "orthogonal"]),
    st.floats(),
    st.text(max_size=5),
)
data = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4))
)


@given(st.sampled_from(PLACES), data)
@example(("version",), True)
@example(("parameters", "w", "shape"), [10**400, 1])
@example(("parameters", "w", "shape", 0), 10**4000)
@example(("parameters", "w", "blocks", 0, "stop"), 10**4000)
@example(("parameters", "w", "distribution", "std"), 10**4000)
@example(("parameters", "w", "dtype"), "float4_e2m1fn_x2")
@example(("parameters", "w", "dtype"), "float8_e8m0fnu")
@example(("parameters", "w", "dtype"), "x" * 10**6)
@example(("parameters", "w", "role"), "x" * 10**6)
@example(("parameters", "w", "distribution", "family"), "x" * 10**6)
@example(("parameters",), {"x" * 10**5: 0})
@example(("predictions",), {"x" * 10**5: {"second_moments": [-1], "spreads": []}})
@example(("predictions", "fc@0", "second_moments"), [-1] * 10**5)
@example(("parameters", "w", "shape"), [0] * 10**5)
@example(("parameters", "w", "output_dims"), [0] * 10**5)
@example(("parameters", "w", "aliases"), ["x" * 10**5] * 2)
def test_any_value_in_any_place(path, value):
    assert_refused_or_read(json.dumps(replaced(json.loads(TEXT), path, value)))


@given(st.data())
def test_every_key_is_needed_and_no_other_is_known(choices):
    tree = json.loads(TEXT)
    weight = ("parameters", "w")
    records = [(), weight, (*weight, "distribution"), (*weight, "blocks", 0), ("predictions", "fc@0")]
    path = choices.draw(st.sampled_from(records))
    record = tree
    for key in path:
        record = record[key]
    key = choices.draw(st.sampled_from(sorted(record)))
    shorter = {name: value for name, value in record.items() if name != key}
    for changed in (shorter, {**record, key + "s": 0}):
        with pytest.raises(PlanFormatError):
            Plan.from_json(json.dumps(replaced(tree, path, changed)))


def test_every_truncation_is_refused():
    for length in range(len(TEXT)):
        with pytest.raises(PlanFormatError):
            Plan.from_json(TEXT[:length])


@given(st.integers(0, len(TEXT) - 1), st.integers(0, 40), st.text(max_size=10))
def test_damaged_text(start, length, inserted):
    assert_refused_or_read(TEXT[:start] + inserted + TEXT[start + length :])


@given(st.text())
@example("")
@example("[" * 10**6)
@example('{"a":' * 10**6)
@example("null")
@example("\x00")
@example("\ufeff" + TEXT)
@example('{"version": ' + "9" * 10**5 + "}")
@example('{"version": NaN}')
@example('{"version": -Infinity}')
def test_any_text_but_a_plan_is_refused(text):
    assert not assert_refused_or_read(text)


@pytest.mark.parametrize("value", [None, b"{}", 3, {}, PLAN], ids=str)
def test_what_is_no_text_is_refused(value):
    with pytest.raises(PlanFormatError, match="read from text"):
        Plan.from_json(value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (VERSION, f"{VERSION}0", f"schema version {SCHEMA_VERSION}0, this release reads version {SCHEMA_VERSION}"),
        (VERSION, '"version": true', "version: expected an integer, found True"),
        ('"policy": "unit"', '"policy": "unit", "policy": "unit"', "'policy' stands twice in one object"),
        ('"policy"', '"polcy"', r"unknown key 'polcy' \(nearest: policy\)"),
        ('"std": 0.5', '"std": "0.5"', r"parameters\['w'\].distribution.std: expected a number, found '0.5'"),
        ('"std": 0.5', '"std": 1e999', r"parameters\['w'\].distribution.std: the number is too large"),
        ('"std": 0.5', '"std": NaN', "NaN stands in the text"),
        ('"std": 0.5', '"std": -0.5', r"parameters\['w'\].distribution: std of a distribution is -0.5"),
        ('"normal"', '"norml"', r"unknown family 'norml'; known are keep, constant, normal"),
        ('"float32"', '"int8"', "'int8' is not a floating-point type"),
        ('"training": true', '"training": 1', "training: expected true or false, found 1"),
        ('"backward": 2.0', '"backward": -2.0', r"parameters\['w'\].passage: a passage multiplies by -2.0 backward"),
        ('"start": 0', '"start": 0.0', r"blocks\[0\].start: expected an integer, found 0.0"),
        ('"stop": 2', '"stop": 20', r"parameters\['w'\]: w: block \[0:20\] overlaps"),
    ],
)
def test_a_message_says_where(old, new, message):
    assert old in TEXT
    with pytest.raises(PlanFormatError, match=message):
        Plan.from_json(TEXT.replace(old, new, 1))


def test_a_large_hostile_text_is_refused_in_time_that_grows_with_its_length():
    many = ",".join(f'"{index}": 0' for index in range(100_000))
    start = time.perf_counter()
    with pytest.raises(PlanFormatError, match="stands twice"):
        Plan.from_json("{" + many + ',"99999": 1}')
    assert time.perf_counter() - start < 5  # 0.1; comparing every name with every other takes a minute


def test_reading_runs_nothing():
    """A name in the text is not looked up in torch, whose attributes may import and run code."""
    text = TEXT.replace('"float32"', '"onnx"')
    seen = "print('torch.onnx' in sys.modules)"
    code = f"import sys\nfrom gainstage.plan import Plan\n{seen}\ntry: Plan.from_json({text!r})\nexcept Exception: {seen}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.split() == [b"False", b"False"]


def test_a_plan_that_would_not_come_back_is_not_made():
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError):
            Plan(policy="p", parameters={}, fingerprint="", training=True, predictions={"a@0": (value,)})


def test_a_path_in_the_place_of_the_text_is_told():
    with pytest.raises(PlanFormatError, match="reads like a path"):
        Plan.from_json("runs/plan.json")
