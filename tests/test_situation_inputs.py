"""The benchmark of correlated inputs: correlations of the population, apart from the error of a few rows."""

import pytest
import torch
from benchmarks.situations.inputs import Correlations

ROWS, COLUMNS, DRAWS = 120, 30, 20


def over_draws(power, correlation=0.0):
    """Columns that are powers of normal ones, of which any two have a part in common."""
    random = torch.Generator().manual_seed(0)
    found = []
    for _ in range(DRAWS):
        own, common = torch.randn(ROWS, COLUMNS, generator=random), torch.randn(ROWS, 1, generator=random)
        found.append(Correlations.of((1.0 - correlation) ** 0.5 * own**power + correlation**0.5 * common))
    return Correlations.mean(found)


@pytest.mark.parametrize("power", [1, 3])
def test_all_that_independent_columns_show_is_sampling_error(power):
    """Over 8,700 pairs: known to 3 %. By their own fourth moments that of cubes would be told a quarter too small."""
    found = over_draws(power)
    assert found.squares == pytest.approx(1.0 / ROWS, rel=0.06)
    assert found.variance == pytest.approx(found.squares, rel=0.06)


def test_what_columns_have_in_common_is_left():
    """One part is common to all pairs of a draw: known to a hundredth over 20 draws."""
    found = over_draws(1, correlation=0.3)
    assert found.root_mean_square == pytest.approx(0.3, abs=0.03)
