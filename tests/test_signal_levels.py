"""Levels: slices of a tensor whose coordinates differ by design have the levels of their own."""

import numpy as np
import pytest
import torch

from gainstage.graph import ParameterInfo
from gainstage.propagate import parameter_value
from gainstage.rules import Call, rules
from gainstage.signal import (
    apply,
    combine,
    contract,
    expand,
    filter_dim,
    gathered,
    gaussian,
    independent,
    join,
    known,
    levels,
    lookup,
    permute,
    reshape,
    select,
    take,
)  # fmt: skip
from gainstage.signal.axes import new_dims
from gainstage.signal.quadrature import kurtosis

aten = torch.ops.aten
STDS = (1.0, 2.0, 3.0)


def fused(rows=24, columns=16):
    """A projection whose thirds have the deviations STDS, on standard normal input."""
    info = ParameterInfo(name="w", shape=(rows, columns), dtype=torch.float32, requires_grad=True)
    profile = [(0, i * rows // 3, (i + 1) * rows // 3, std) for i, std in enumerate(STDS)]
    weight = parameter_value(info, 0, 0.0, sum(std**2 for std in STDS) / 3, profile)
    linear = aten.linear.default
    return rules()[linear](Call(linear, ((5, 7, rows),)), independent((5, 7, columns), 0.0, columns**-0.5), weight)


def with_bias(x):
    add = aten.add.Tensor
    return rules()[add](Call(add, (x.shape,)), x, independent((x.shape[-1],), 0.0, 0.0))


WAYS = {
    "slices": lambda y: [take(y, 2, 8 * i, 8 * i + 8) for i in range(3)],
    "after a bias": lambda y: [take(with_bias(y), 2, 8 * i, 8 * i + 8) for i in range(3)],
    "heads, then unbind": lambda y: [select(permute(reshape(y, (5, 7, 3, 2, 4)), (2, 0, 3, 1, 4)), 0, i) for i in range(3)],
    "one channel": lambda y: [select(y, 2, 8 * i + 3) for i in range(3)],
    "negative index": lambda y: [select(reshape(y, (5, 7, 3, 8)), 2, i - 3) for i in range(3)],
    "flattened": lambda y: [take(reshape(permute(y, (2, 0, 1)), (24 * 35,)), 0, 280 * i, 280 * i + 280) for i in range(3)],
    "broadcast": lambda y: [take(expand(reshape(y, (5, 7, 1, 24)), (5, 7, 6, 24)), 3, 8 * i, 8 * i + 8) for i in range(3)],
    "joined again": lambda y: [
        take(join([take(y, 2, 16, 24), take(y, 2, 0, 16)], 2), 2, *s) for s in ((8, 16), (16, 24), (0, 8))
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_slice_has_its_own_level(way):
    found = [part.second_moment for part in WAYS[way](fused())]
    assert found == pytest.approx([std**2 for std in STDS])


def test_a_slice_across_levels_has_their_mean_square():
    y = fused()
    half = take(y, 2, 4, 12)
    assert half.second_moment == pytest.approx((1 + 4) / 2)
    assert take(half, 2, 4, 8).second_moment == pytest.approx(4.0)


def test_the_whole_is_the_average_and_a_contraction_over_the_levels_forgets_them():
    y = fused()
    assert y.second_moment == pytest.approx(np.mean(np.square(STDS)))
    linear = aten.linear.default
    z = rules()[linear](Call(linear, ((5, 7, 3),)), y, independent((3, 24), 0.0, 1.0, is_weight=True))
    assert z.second_moment == pytest.approx(24 * np.mean(np.square(STDS)))
    assert z.levels is None


def test_two_selections_of_one_tensor_are_independent_and_the_same_selection_is_one():
    x = independent((5, 3, 8), 0.0, 1.0)
    add = aten.add.Tensor
    different = rules()[add](Call(add, ((5, 8),)), select(x, 1, 0), select(x, 1, 1))
    same = rules()[add](Call(add, ((5, 8),)), select(x, 1, 2), select(x, 1, -1))
    assert different.second_moment == pytest.approx(2.0)
    assert same.second_moment == pytest.approx(4.0)


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_a_sum_of_few_terms_is_nearer_to_a_normal_than_one_term(scale):
    """The excess kurtosis of a sum of n independent terms is ``1/n`` of theirs, whatever they are multiplied by."""
    x = apply(torch.relu, independent((40,), 0.0, 1.0))
    summed = filter_dim(x, 0, scale * np.kron(np.eye(5), np.ones(8)))
    assert summed.marginal.kurtosis < 3.0 + (x.marginal.kurtosis - 3.0) / 4.0


def test_sums_of_different_levels_are_a_mixture_of_sums():
    """Of n terms of kurtosis 15 each: ``3 + 12/n`` at one level, and the mean fourth power of the levels times that over all."""
    profile = torch.tensor([1.0] * 12 + [3.0] * 12, dtype=torch.float64)
    x = combine(torch.mul, apply(lambda t: t**3, independent((24,), 0.0, 1.0)), known(profile))
    summed = filter_dim(x, 0, np.kron(np.eye(6), np.ones(4)))
    alike, spread = kurtosis(summed.marginal.even), (1.0 + 81.0) / 2.0 / 5.0**2
    assert alike < 3.0 + (kurtosis(x.marginal.even) - 3.0) / 3.0
    assert summed.marginal.kurtosis == pytest.approx(spread * alike, rel=0.15)


def test_a_mixture_of_levels_is_mixed_by_them_once():
    """Quiet entries beside loud ones are distributed as before in another order; among as many zeros, twice as flat.

    Of parts side by side no distribution at the average level is known: that of all entries has their levels in it.
    """
    x = join([apply(lambda t, std=std: std * t**3, independent((12,), 0.0, 1.0)) for std in (1.0, 3.0)], 0)
    assert x.levels is not None
    assert not x.marginal.has_even
    padded = filter_dim(x, 0, np.eye(48)[:, 12:36])
    for first, flatter in ((x, 1.0), (padded, 2.0)):
        y, size = first, first.shape[0]
        for _ in range(4):
            y = filter_dim(y, 0, np.eye(size)[np.roll(np.arange(size), 5)])
        assert y.second_moment == pytest.approx(x.second_moment / flatter)
        assert y.marginal.kurtosis == pytest.approx(flatter * x.marginal.kurtosis, rel=0.05)  # on a grid of probabilities


def test_what_is_loud_at_the_same_places_adds_up_there():
    """A stream and a branch on a map with a quiet border: as if each were quiet elsewhere, the mean was 4 % too large."""
    profile = np.array([0.2] * 8 + [1.0] * 8)
    dims, own = new_dims((16, 64)), np.array([[0.0, 0.0], [0.0, 1.0]])
    x, y = (gaussian(dims, 0.0, own, levels.normalised(profile[:, None])) for _ in range(2))
    total = combine(torch.add, apply(torch.relu, x), y)
    z, places = torch.randn(2, 16, 200_000, generator=torch.Generator().manual_seed(0)).double(), torch.tensor(profile)
    at = (places / places.square().mean().sqrt())[:, None]
    real = (at * z[0]).relu() + at * z[1]
    # The errors of sampling are .001 of the mean and .005 of the fourth moment.
    assert apply(torch.relu, total).mean == pytest.approx(float(real.relu().mean()), rel=0.004)
    apart = real - real.mean()
    assert total.marginal.kurtosis == pytest.approx(float(apart.pow(4).mean() / apart.square().mean() ** 2), rel=0.02)


def test_what_is_looked_up_has_the_levels_of_its_rows_and_of_all_other_dimensions():
    """Places of level 1, boxes of level 3, for 8 rows of which the last four are silent."""
    parts = [join([independent((4, 2), 0.0, std), independent((4, 2), 0.0, 0.0)], 0) for std in (1.0, 3.0)]
    x = join(parts, 1)
    rows = torch.tensor([0, 0, 1, 5])
    for found in (lookup(x, 0, rows), gathered(x, 0, rows[:, None].expand(4, 4))):
        squares = [take(found, 1, start, start + 2).second_moment for start in (0, 2)]
        assert squares == pytest.approx([0.75, 0.75 * 9.0])
    assert select(lookup(x, 0, rows), 0, 3).second_moment == 0.0


def test_places_that_are_shuffled_sample_by_sample_are_loud_where_they_come_to_lie():
    """What is masked is zero, in other places of each sample, before and beside a class token, and in products over channels."""
    order = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    loud, places = (order < 2).double().numpy(), order[..., None].expand(3, 8, 5)
    parts = [[independent((3, n, 5), 0.0, std) for n, std in ((2, 1.0), (6, 0.0))] for _ in range(2)]
    q, k = (gathered(join(pair, 1), 1, places) for pair in parts)
    beside = join([independent((3, 1, 5), 0.0, 2.0), q], 1)
    logits = contract(q, k, "btc", "bsc", "bts")
    for found, squares in (
        (q, loud[:, :, None]),
        (beside, np.concatenate([np.full((3, 1), 4.0), loud], axis=1)[..., None]),
        (logits, 5.0 * loud[:, :, None] * loud[:, None]),
    ):
        assert found.levels is not None
        assert np.broadcast_to(found.levels**2 * found.second_moment, squares.shape) == pytest.approx(squares)
