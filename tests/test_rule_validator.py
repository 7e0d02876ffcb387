"""The validator sees a wrong rule, whatever is wrong with it, and lets a right one pass."""

import doctest
from dataclasses import replace

import numpy as np
import pytest
import torch

from gainstage import testing
from gainstage.errors import InputError, RuleError
from gainstage.signal import apply, independent, measured, reshape
from gainstage.signal.marginal import Marginal
from gainstage.signal.sampling import draw

aten = torch.ops.aten
X = testing.correlated((4, 6, 5), mean=0.3, shares={(0, 1): 0.2, (2,): 0.1})
GELU = testing.RuleCase(op=aten.gelu.default, args=(X,))


def test_a_right_rule_passes_and_the_report_is_deterministic():
    report = testing.assert_rule(GELU)
    assert report == testing.validate_rule(GELU)
    assert len(report.entries) == 1 + 2**3 + 1


def scaled_table(x, index, factor):
    table = x.table.copy()
    table[index] *= factor
    return replace(x, table=table)


WRONG = {
    "mean": lambda call, x: replace(apply(torch.nn.functional.gelu, x), mean=0.3),
    "second moment": lambda call, x: scaled_table(apply(torch.nn.functional.gelu, x), (1, 1, 1), 1.05),
    "dimensions (0, 1) only": lambda call, x: scaled_table(apply(torch.nn.functional.gelu, x), (1, 1, 0), 1.15),
    "mean distance of the quantiles": lambda call, x: replace(
        apply(torch.nn.functional.gelu, x), marginal=Marginal(object(), lambda: 0.3 + 0.4 * np.linspace(-9, 9, 1025))
    ),
}


@pytest.mark.parametrize("entry", WRONG)
def test_a_wrong_entry_is_caught_by_its_name(entry):
    with pytest.raises(AssertionError, match=r"aten\.gelu\.default") as caught:
        testing.assert_rule(GELU, WRONG[entry])
    assert entry in str(caught.value)


def test_operands_have_the_tables_that_they_are_described_by():
    generator = np.random.default_rng(0)
    draws = [draw([X], generator)[0] for _ in range(2000)]
    found = np.mean([measured(sample).table for sample in draws], axis=0)
    assert found == pytest.approx(X.table, abs=0.03)  # 2,000 draws of what 24 positions share: 0.02 of 1.09, three times over


def test_one_value_given_twice_is_one_tensor():
    same = testing.RuleCase(op=aten.sub.Tensor, args=(X, X))
    assert testing.assert_rule(same).worst.measured == 0.0
    with pytest.raises(AssertionError):
        testing.assert_rule(same, lambda call, x, y: independent(x.shape, 0.0, 1.0))


def test_what_cannot_be_a_rule_is_refused():
    with pytest.raises(RuleError, match="returned shape"):
        testing.validate_rule(GELU, lambda call, x: reshape(x, (24, 5)))
    with pytest.raises(RuleError, match="2 results"):
        testing.validate_rule(GELU, lambda call, x: (x, x))
    with pytest.raises(RuleError, match="no statistics"):
        testing.validate_rule(GELU, lambda call, x: None)
    with pytest.raises(RuleError, match="no rule"):
        testing.validate_rule(testing.RuleCase(op=aten.digamma.default, args=(X,)))


def test_an_approximation_states_its_reason():
    with pytest.raises(InputError, match="reason"):
        testing.RuleCase(op=aten.gelu.default, args=(X,), model_error=0.1)
    with pytest.raises(InputError, match="shares"):
        testing.correlated((2, 3), shares={(0,): 0.7, (1,): 0.4})


def test_the_example_of_the_documentation_runs():
    assert doctest.testmod(testing).failed == 0
