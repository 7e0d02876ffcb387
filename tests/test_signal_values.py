"""Values themselves: copies with changes, and normal distributions that need no sums."""

import dataclasses

import numpy as np
import pytest
import torch

from gainstage.rules import Call, rules
from gainstage.signal import apply, independent, join, known, normalise
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


def test_what_a_part_of_a_concatenation_meets_again_is_made_once():
    """As in a dense block, where each layer normalises all that came before it."""
    first, second, third = (independent((2, n, 5), 0.3, std) for n, std in ((8, 1.0), (3, 2.0), (3, 0.5)))
    relu, elu = torch.ops.aten.relu.default, torch.ops.aten.elu.default

    def made(op, *arguments):
        whole = [join(parts, 1) for parts in ((first, second), (first, second, third))]
        normal = [normalise(x, [axis for dim in (x.dims[0], x.dims[2]) for axis in dim], 1e-5) for x in whole]
        return [rules()[op](Call(op, (x.shape,)), x, *arguments) for x in normal]

    short, long = made(relu)
    assert all(again is part for again, part in zip(long.joined.parts[:2], short.joined.parts, strict=True))
    assert long.joined.parts[2].second_moment > 0.4
    alone = made(relu)[1]
    np.testing.assert_array_equal(alone.table, long.table)
    ones, twos = made(elu, 1.0)[0], made(elu, 2.0)[0]
    assert ones.second_moment < 0.9 * twos.second_moment
