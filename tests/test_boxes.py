"""Boxes of a parameter against NumPy's indexing: which entries they are, in which order, and where they lie."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gainstage.apply import Stream, draw_range, stream_of
from gainstage.apply.box import Box, grid_boxes, run_boxes, whole_box
from gainstage.apply.draw import draw_runs
from gainstage.apply.stage import drawing_tasks
from gainstage.plan import Block, Distribution, Family, ParameterPlan

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def shapes_with_ranges(draw):
    """A shape, and for each dimension some ranges in any order, possibly none."""
    shape = draw(SHAPES)
    ranges = []
    for size in shape:
        cuts = sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=6, unique=True)))
        pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
        ranges.append(draw(st.permutations(pairs)))
    return shape, ranges


def memory_of(shape, ranges):
    """The index in the whole of every entry that a memory with these ranges holds."""
    chosen = [[index for start, stop in along for index in range(start, stop)] for along in ranges]
    return np.arange(math.prod(shape)).reshape(shape)[np.ix_(*chosen)]


def indices_by_boxes(boxes, shape, count):
    """The same, as the boxes say it."""
    memory = torch.full((count,), -1)
    for box in boxes:
        starts, length = box.runs(shape)
        indices = torch.from_numpy((starts[:, None] + np.arange(length)).reshape(box.sizes))
        assert (box.view(memory) == -1).all()  # no entry twice
        box.view(memory).copy_(indices)
    return memory.numpy()


@given(shapes_with_ranges())
def test_a_grid_of_ranges(case):
    shape, ranges = case
    expected = memory_of(shape, ranges)
    assert np.array_equal(indices_by_boxes(grid_boxes(ranges), shape, expected.size), expected.ravel())


@given(SHAPES, st.data())
def test_a_run_of_the_flattened_parameter(shape, data):
    size = math.prod(shape)
    start, stop = sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))
    found = indices_by_boxes(run_boxes(shape, start, stop), shape, stop - start)
    assert found.tolist() == list(range(start, stop))


@given(shapes_with_ranges(), st.data())
def test_a_part_of_a_box(case, data):
    shape, _ = case
    dim = data.draw(st.integers(0, len(shape) - 1))
    start, stop = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 7))
    part = whole_box(shape).part(dim, start, stop)
    expected = np.arange(math.prod(shape)).reshape(shape).take(range(start, min(stop, shape[dim])), dim)
    if part is None:
        assert expected.size == 0
        return
    assert np.array_equal(part.view(torch.arange(math.prod(shape))).numpy(), expected)
    starts, length = part.runs(shape)
    assert np.array_equal((starts[:, None] + np.arange(length)).ravel(), expected.ravel())


@pytest.mark.parametrize("bits", [32, 64])
@given(
    gaps=st.lists(st.sampled_from([0, 1, 7, 100, 4095, 4096, 4097, 10**5, 2**19]), max_size=6),
    length=st.sampled_from([1, 2, 5, 300]),
)
def test_runs_of_bits_are_slices_of_the_stream(gaps, length, bits):
    """Gaps that are drawn and dropped, and gaps that are jumped over, on both sides of where that changes."""
    stream = Stream(12345)
    starts = np.cumsum([3, *(length + gap for gap in gaps)])
    whole = stream.uniform_bits(0, int(starts[-1]) + length, bits)
    found = stream.runs_of_bits(starts, length, bits)
    assert np.array_equal(found, [whole[start : start + length] for start in starts])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("length", [1, 3, 2**18 - 1, 2**18 + 1])
def test_runs_of_values_are_slices_of_the_values(length, dtype):
    distribution, stream = Distribution(family=Family.NORMAL, std=0.3, mean=0.5), stream_of(0, "w")
    starts = np.array([5, 2**18 + 50, 2**19 + 100])
    out = np.empty((3, length), dtype)
    draw_runs(distribution, stream, starts, torch.from_numpy(out))
    for start, row in zip(starts, out, strict=True):
        expected = draw_range(distribution, stream, int(start), int(start) + length, np.empty(length, dtype))
        assert np.array_equal(row, expected)


FAMILIES = (Family.NORMAL, Family.TRUNCATED_NORMAL, Family.UNIFORM, Family.CONSTANT, Family.ORTHOGONAL)


@given(
    shapes_with_ranges(), st.sampled_from(FAMILIES), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.data()
)
def test_a_shard_is_drawn_as_the_same_part_of_the_whole(case, family, dtype, data):
    """Any shape, shard, family, element type and block: what a process draws is what it would cut from the whole."""
    shape, ranges = case
    if family is Family.ORTHOGONAL and len(shape) < 2:
        return
    distribution = Distribution(family=family, std=0.0 if family is Family.CONSTANT else 0.3)
    dim = data.draw(st.integers(0, len(shape) - 1))
    blocks = (Block(dim, 1, shape[dim], Distribution(family=Family.UNIFORM, std=0.1)),) if shape[dim] > 1 else ()
    planned = ParameterPlan(name="w", shape=shape, dtype=str(dtype)[6:], role="weight", distribution=distribution, blocks=blocks)
    whole = torch.full(shape, torch.nan, dtype=dtype)
    shard = torch.full(memory_of(shape, ranges).shape, torch.nan, dtype=dtype)
    for boxes, memory in (([whole_box(shape)], whole), (grid_boxes(ranges), shard)):
        for task in itertools.chain(*drawing_tasks(planned, 7, boxes, memory)):
            task.draw()
    assert not whole.isnan().any()
    expected = whole.flatten()[torch.from_numpy(memory_of(shape, ranges))]
    assert torch.equal(shard, expected)


def test_a_part_of_several_dimensions_whose_first_has_one_entry():
    """Splitting goes along a dimension that can be split."""
    shape, ranges = (4, 4, 6, 6), ((2, 3), (0, 2), (1, 4), (5, 6))
    planned = ParameterPlan(
        name="w", shape=shape, dtype="float32", role="weight", distribution=Distribution(family=Family.UNIFORM, std=0.1)
    )
    whole, wide = torch.empty(shape), torch.full((48,), torch.nan)
    for task in itertools.chain(*drawing_tasks(planned, 7, [whole_box(shape)], whole)):
        task.draw()
    part = tuple(slice(low, high) for low, high in ranges)
    box = Box(bounds=ranges, offset=3, strides=(24, 12, 3, 1))
    for task in itertools.chain(*drawing_tasks(planned, 7, [box], wide)):
        task.draw()
    drawn = box.view(wide)
    assert torch.equal(drawn, whole[part])
