"""Values themselves: copies with changes, and normal distributions that need no sums."""

import dataclasses

import numpy as np
import pytest
import torch

from gainstage.signal import apply, independent, known
from gainstage.signal.copies import replace
from gainstage.signal.marginal import Marginal, normal_marginal
from gainstage.signal.quadrature import evaluate_series, nodes

OTHER = independent((2, 3, 4), 0.0, 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mean": 0.25},
        {"rho": None, "mean": 0.25},
        {"marginal": OTHER.marginal},
        {"dims": OTHER.dims, "table": OTHER.table, "rho": OTHER.rho},
    ],
)
def test_a_copy_with_changes_is_that_of_dataclasses_and_forgets_what_no_longer_holds(changes):
    x = dataclasses.replace(apply(torch.relu, independent((3, 4), 0.5, 2.0)), rho=None)
    x.square_covariance()  # found, and kept with the value
    copy, exact = replace(x, **changes), dataclasses.replace(x, **changes)
    assert all(getattr(copy, f.name) is getattr(exact, f.name) for f in dataclasses.fields(x) if f.init)
    assert copy.axes == exact.axes
    np.testing.assert_array_equal(copy.correlation(), exact.correlation())
    np.testing.assert_array_equal(copy.square_covariance(), exact.square_covariance())


@pytest.mark.parametrize(("mean", "slope"), [(0.0, 1.0), (0.7, -1.3), (2.0, 0.0)])
def test_what_is_known_of_a_normal_variable_is_what_sums_over_the_grid_find(mean, slope):
    known, summed = normal_marginal(object(), mean, slope), Marginal(object(), lambda: mean + slope * nodes())
    rho = np.linspace(-1.0, 1.0, 9)
    for short, long in ((known.series, summed.series), (known.square_series, summed.square_series)):
        np.testing.assert_allclose(evaluate_series(short, rho), evaluate_series(long, rho), rtol=1e-10, atol=1e-12)
    assert known.is_gaussian
    assert summed.is_gaussian


def test_a_known_tensor_without_entries_has_a_value():
    value = known(torch.zeros(0, 3))
    assert value.shape == (0, 3)
    assert value.mean == value.second_moment == 0.0
