"""Every rule agrees with its op, run on draws of its operands; a rule without a case fails."""

from collections import Counter

import pytest
import torch
from rule_cases import contraction, movement, pointwise, statistics

from gainstage.rules import rules
from gainstage.testing import RuleCase, assert_rule

aten = torch.ops.aten
CASES: list[RuleCase] = [*pointwise.CASES, *movement.CASES, *contraction.CASES, *statistics.CASES]
UNSAMPLED = {  # ops whose result is not random numbers that could be compared, and why
    aten.empty.memory_format: "memory that something else is written into",
    aten.empty_like.default: "memory that something else is written into",
    aten.item.default: "a number, not a tensor",
    aten.new_empty.default: "memory that something else is written into",
}


def named(cases: list[RuleCase]) -> list[object]:
    """Cases with the op's name, numbered where there are several."""
    seen: Counter[str] = Counter()
    found = []
    for case in cases:
        name = str(case.op).removeprefix("aten.")
        seen[name] += 1
        found.append(pytest.param(case, id=name if seen[name] == 1 else f"{name}#{seen[name]}"))
    return found


def test_every_rule_has_a_case():
    others = ("mine.", "gainstage_tests.")  # what other tests and the documentation register
    shipped = {op for op, rule in rules().items() if rule.__module__.startswith("gainstage.") and not str(op).startswith(others)}
    assert shipped - set(UNSAMPLED) - {case.op for case in CASES} == set()


@pytest.mark.parametrize("case", named(CASES))
def test_the_rule_agrees_with_the_op(case):
    assert_rule(case)
