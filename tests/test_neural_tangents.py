"""Tables at infinite width are the kernels of neural-tangents (Novak et al. 2020, arXiv:1912.02803).

Their values were computed with the package itself: ``python -m benchmarks.neural_tangents --kernels``, in an environment with
benchmarks/neural_tangents.txt; they stand in benchmarks/results/neural_tangents.json.
"""

import json

import pytest
from benchmarks.infinite_width import predicted
from benchmarks.neural_tangents import DENSE, MAPS, RESULTS

KERNELS = json.loads(RESULTS.read_text(encoding="utf-8"))["kernels"]


@pytest.mark.parametrize("name", [*DENSE, *MAPS])
def test_second_moments_and_cosines_are_those_of_neural_tangents(name):
    is_map = name in MAPS
    second_moment, cosine = predicted((MAPS if is_map else DENSE)[name], is_map=is_map)
    assert second_moment == pytest.approx(KERNELS[name]["second_moment"], rel=1e-3)
    assert cosine == pytest.approx(KERNELS[name]["cosine"], abs=1e-3)


def test_a_narrow_network_is_not_that_of_infinite_width():
    """The terms in 1/n are there: the comparison above would see them."""
    name = "gelu, 10 layers"
    _, cosine = predicted(DENSE[name], is_map=False, width=16)
    assert abs(cosine - KERNELS[name]["cosine"]) > 1e-3
