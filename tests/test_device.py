"""Drawing in torch's operations, as on a CUDA device: the bits are those of NumPy. Where there is a device, on it too."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import plan_that_fits
from torch import nn

from gainstage.apply import apply, device, materialize
from gainstage.apply.draw import draw_runs
from gainstage.apply.law import Law
from gainstage.apply.normal import normal_32
from gainstage.apply.stream import Stream
from gainstage.plan import Block, Distribution, Family

FAMILIES = (Family.NORMAL, Family.TRUNCATED_NORMAL, Family.UNIFORM, Family.CONSTANT)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    key=st.integers(0, 2**128 - 1),
    gaps=st.lists(st.integers(0, 2**50), min_size=1, max_size=4),
    length=st.sampled_from((0, 1, 2, 7, 8, 9, 511, 3001)),
    moments=st.tuples(st.sampled_from([0.0, -0.1]), st.floats(1e-20, 1e15)),
)
def test_runs_are_those_of_numpy(family, key, gaps, length, moments):
    """Wherever a run begins and ends: in the middle of a counter's words, far out in the stream."""
    distribution = Distribution(family=family, mean=moments[0], std=0.0 if family is Family.CONSTANT else moments[1])
    starts = np.cumsum([gap + length for gap in gaps])
    expected, found = np.full((starts.size, length), np.nan, np.float32), torch.full((starts.size, length), torch.nan)
    draw_runs(distribution, Stream(key), starts, torch.from_numpy(expected))
    device.draw_runs(distribution, Stream(key), starts, found)
    assert found.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("width", [1.0, 0.9544997361036416])
def test_the_rarest_words_too(width):
    """Ends, middle, and words on both sides of every change of formula, which a stream shows too seldom."""
    ends = [2**31 - 1 - int(2.0**power) for power in np.arange(0, 31, 0.01)]
    at = [int(2.0**32 * 0.4953) + step for step in range(-200, 200)]
    positive = sorted({0, 1, 2**31 - 1, *ends, *at})
    words = np.array([*positive, *(-1 - word for word in positive)], np.int32)
    expected = np.empty(words.size, np.float32)
    normal_32(words, 0.7, expected, width)
    found = device._values(Law(dtype=torch.float32, normal=True, scale=0.7, mean=0.0, width=width), torch.from_numpy(words))
    assert found.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_into_any_strides(dtype):
    distribution, starts = Distribution(family=Family.NORMAL, std=0.5), np.array([4, 90])
    expected, found = np.empty((2, 33), np.float32), torch.zeros(33, 4, dtype=dtype).T
    draw_runs(distribution, Stream(1), starts, torch.from_numpy(expected))
    device.draw_runs(distribution, Stream(1), starts, found[::2])
    assert torch.equal(found[::2], torch.from_numpy(expected).to(dtype))
    assert not found[1::2].any()


def plan_of(model, family):
    """Two families in each matrix."""
    matrix = {
        "distribution": Distribution(family=family, std=0.3, mean=0.0 if family.is_matrix else 0.1),
        "blocks": (Block(0, 0, 30, Distribution(family=Family.UNIFORM, std=1.0)),),
    }
    vector = {"distribution": Distribution(family=Family.NORMAL, std=0.1)}
    return plan_that_fits(model, lambda _, parameter: matrix if parameter.dim() > 1 else vector)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_cuda_device_the_values_are_the_same():
    families = (Family.NORMAL, Family.TRUNCATED_NORMAL, Family.UNIFORM, Family.ORTHOGONAL)
    for family, dtype in itertools.product(families, (torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        with torch.device("meta"):
            absent = nn.Sequential(nn.Linear(3000, 2000), nn.Linear(100, 70)).to(dtype)
        real, present = (copy.deepcopy(absent).to_empty(device=where) for where in ("cpu", "cuda"))
        plan = plan_of(real, family)
        apply(real, plan, seed=5)
        apply(present, plan, seed=5)
        materialize(absent, plan, seed=5, device="cuda")
        for name, parameter in real.named_parameters():
            for model in (present, absent):
                drawn = model.get_parameter(name)
                assert drawn.is_cuda
                assert torch.equal(drawn.cpu(), parameter), (name, family, dtype)
