"""Grouping, numbers and layout of the tables."""

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from gainstage.report.grouping import group_names
from gainstage.report.numbers import cosine_span, number, shape, span
from gainstage.report.tables import Column, Report


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for, by reading its braces: independent of how they were written."""
    choices = []
    for part in re.split(r"(\{[^}]*\})", pattern):
        if not part.startswith("{"):
            choices.append([part])
            continue
        numbers: list[int] = []
        for run in part[1:-1].split(","):
            first, *rest = (int(bound) for bound in run.split(".."))
            last, step = {0: (first, 1), 1: (*rest, 1), 2: tuple(rest)}[len(rest)]
            numbers.extend(range(first, last + 1, step))
        choices.append([str(value) for value in numbers])
    return ["".join(parts) for parts in itertools.product(*choices)]


names = st.lists(
    st.lists(
        st.one_of(st.sampled_from(["layers", "fc", "conv1", "07", ""]), st.integers(0, 6).map(str)), min_size=1, max_size=4
    ).map(".".join),
    unique=True,
    max_size=40,
)


@given(names, st.data())
def test_a_pattern_stands_for_exactly_its_members(listed, data):
    keys = data.draw(st.lists(st.sampled_from("ab"), min_size=len(listed), max_size=len(listed)))
    groups = group_names(listed, keys)
    assert sorted(member for group in groups for member in group.members) == list(range(len(listed)))
    for group in groups:
        assert sorted(expand(group.pattern)) == sorted(listed[member] for member in group.members)
        assert len({keys[member] for member in group.members}) == 1
    assert [group.members[0] for group in groups] == sorted(group.members[0] for group in groups)


@given(st.integers(2, 60), st.integers(1, 5))
def test_a_deep_model_has_one_row_for_each_kind_of_module(depth, kinds):
    listed = [f"layers.{layer}.kind{kind}" for layer in range(depth) for kind in range(kinds)]
    assert len(group_names(listed, [0] * len(listed))) == kinds


@pytest.mark.parametrize(
    ("listed", "patterns"),
    [
        ([f"layers.{i}.attn.q_proj" for i in range(48)], ["layers.{0..47}.attn.q_proj"]),
        ([f"net.{i}" for i in range(0, 48, 3)], ["net.{0..45..3}"]),
        (["net.0", "net.1", "net.2", "net.7"], ["net.{0..2,7}"]),
        (["net.3", "net.4"], ["net.{3,4}"]),
        (["net.5.conv1", "net.5.conv2"], ["net.5.conv1", "net.5.conv2"]),
        ([f"stages.{i}.blocks.{j}" for i in range(2) for j in range(3)], ["stages.{0,1}.blocks.{0..2}"]),
        ([f"s.{i}.b.{j}" for i, n in enumerate((2, 2, 4)) for j in range(n)], ["s.{0,1}.b.{0,1}", "s.2.b.{0..3}"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_patterns(listed, patterns):
    assert [group.pattern for group in group_names(listed, [None] * len(listed))] == patterns


def test_rows_of_different_kind_stay_apart():
    groups = group_names(["a.0", "a.1", "a.2"], ["conv", "linear", "conv"])
    assert [group.pattern for group in groups] == ["a.{0,2}", "a.1"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1.00"),
        (0.9996, "1.00"),
        (-0.02, "-0.0200"),
        (123.4, "123"),
        (99_949.0, "99949"),
        (1e6, "1.00e6"),
        (3.21e-7, "3.21e-7"),
        (0.0, "0"),
        (-0.0, "0"),
        (math.nan, "-"),
        (math.inf, "∞"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@given(st.floats(1e-12, 1e12))
def test_a_number_is_right_to_three_digits(value):
    assert float(number(value)) == pytest.approx(value, rel=0.00501)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 1.01], "1.00"),
        ([1.26, 1.34], "1.3"),
        ([1.0, 2.0], "1.0..2.0"),
        ([0.5, math.nan], "0.500"),
        ([math.nan], "-"),
        ([], "-"),
        ([-0.3, 0.3], "-0.30..0.30"),
        ([1.0, math.inf], "1.0..∞"),
    ],
)
def test_span(values, text):
    assert span(values) == text


def test_shape():
    assert (shape((2, 3)), shape(())) == ("2x3", "scalar")


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.321, 0.324], "0.32"), ([0.3, 0.7, math.nan], "0.30..0.70"), ([-1e-6], "0.00"), ([-0.004, 0.004], "0.00"), ([], "-")],
)
def test_cosine_span(values, text):
    assert cosine_span(values) == text


def lines_of(report, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(report)
    return capture.get().splitlines()


def test_the_least_important_columns_give_way_and_brackets_are_no_markup():
    report = Report(
        title="Title",
        columns=[
            Column(heading="name", cell=lambda row: row[0]),
            Column(heading="extra", cell=lambda row: row[1], importance=2),
            Column(heading="least", cell=lambda row: row[1], importance=1),
            Column(heading="stays", cell=lambda row: row[1]),
        ],
        rows=[("qkv.weight[0:8]", "123456")],
        remarks=[Text("[remark]")],
    )
    # The name needs 13 (its longest line and the indent), every other column 6 and a gap of 2: 37, 29 and 21 in all.
    headings = {width: lines_of(report, width)[2].split() for width in (37, 36, 29, 28, 21)}
    assert headings == {
        37: ["name", "extra", "least", "stays"],
        36: ["name", "extra", "stays"],
        29: ["name", "extra", "stays"],
        28: ["name", "stays"],
        21: ["name", "stays"],
    }
    assert "[remark]" in lines_of(report, 39)
    assert "".join(line[:13].strip() for line in lines_of(report, 21)[4:6]) == "qkv.weight[0:8]"


def test_long_names_break_after_dots_and_lose_nothing():
    name = "decoder.layers.{0..11}.attention.output.LayerNorm"
    report = Report(
        title="Title",
        columns=[Column(heading="name", cell=lambda row: row), Column(heading="n", cell=lambda _: "1.2..3.4", is_number=True)],
        rows=[name],
    )
    cells = [line[:31].strip() for line in lines_of(report, 40)[4:]]
    assert "".join(cells) == name
    assert all(cell.endswith(".") for cell in cells[:-1])
    assert len(cells) == 2
    assert any(name in line for line in lines_of(report, 80))
