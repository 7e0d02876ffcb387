"""Several rules in a row: what two results of one tensor have in common is kept, or seen to be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gainstage.rules import Call, rules
from gainstage.rules.reduction import total
from gainstage.signal import affine, apply, combine, contract, independent, join, known, max_over, mixture, reshape, take
from gainstage.testing import RuleCase, assert_rule, correlated

X = correlated((4, 6, 8), mean=0.3, shares={(0, 1): 0.3, (2,): 0.15})
CENTRES, FREQUENCIES = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
KNOTS = torch.linspace(-2.0, 2.0, 6, dtype=torch.float64).expand(8, -1)


def hats(t):
    """B-splines of first order, by the recursion over orders (C. de Boor 1978); each channel has knots, the same for all."""
    t, width = t[..., None], KNOTS[:, 1:-1] - KNOTS[:, :-2]
    inside = ((t >= KNOTS[:, :-1]) & (t < KNOTS[:, 1:])).double()
    return (t - KNOTS[:, :-2]) / width * inside[..., :-1] + (KNOTS[:, 2:] - t) / width * inside[..., 1:]


def hats_value(call, x):
    t, width = reshape(x, (4, 6, 8, 1)), known(KNOTS[:, 1:-1] - KNOTS[:, :-2])
    inside = combine(torch.mul, combine(torch.ge, t, known(KNOTS[:, :-1])), combine(torch.lt, t, known(KNOTS[:, 1:])))
    up = combine(torch.div, combine(torch.sub, t, known(KNOTS[:, :-2])), width)
    down = combine(torch.div, combine(torch.sub, known(KNOTS[:, 2:]), t), width)
    return combine(torch.add, combine(torch.mul, up, take(inside, 3, 0, 4)), combine(torch.mul, down, take(inside, 3, 1, 5)))


# name: what tensors do, and what values do
COMPOSITIONS = {
    "half of the channels, the other half negated (rotary embeddings)": (
        lambda t: torch.cat([-t[..., 4:], t[..., :4]], -1),
        lambda call, x: join([affine(take(x, 2, 4, 8), -1.0), take(x, 2, 0, 4)], 2),
    ),
    "a tensor beside a function of it": (
        lambda t: torch.cat([t, torch.relu(t)], 1),
        lambda call, x: join([x, apply(torch.relu, x)], 1),
    ),
    "even and odd channels, interleaved anew": (
        lambda t: torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2),
        lambda call, x: reshape(
            join([reshape(affine(take(x, 2, 1, 8, 2), -1.0), (4, 6, 4, 1)), reshape(take(x, 2, 0, 8, 2), (4, 6, 4, 1))], 3),
            (4, 6, 8),
        ),
    ),
    "a tensor where it is positive, else a part of it": (
        lambda t: torch.where(t > 0.2, t, 0.1 * t),
        lambda call, x: combine(
            torch.add,
            combine(torch.mul, indicator := apply(lambda t: (t > 0.2).double(), x), x),
            combine(torch.mul, affine(indicator, -1.0, 1.0), affine(x, 0.1)),
        ),
    ),
    "bumps around centres": (
        lambda t: torch.exp(-((1.25 * (t[..., None] - CENTRES)) ** 2)),
        lambda call, x: apply(
            lambda t: torch.exp(-t),
            apply(torch.square, affine(combine(torch.sub, reshape(x, (4, 6, 8, 1)), known(CENTRES)), 1.25)),
        ),
    ),
    "sines of several frequencies": (
        lambda t: torch.sin(FREQUENCIES[:, None] * t[..., None, :]),
        lambda call, x: apply(torch.sin, combine(torch.mul, known(FREQUENCIES[:, None]), reshape(x, (4, 6, 1, 8)))),
    ),
    "hats between knots that are equal for all channels": (hats, hats_value),
    "a mask along positions": (
        lambda t: torch.where(torch.arange(6)[:, None] > 1, t, -t.relu()),
        lambda call, x: mixture(
            known((torch.arange(6)[:, None] > 1).double()), x, affine(apply(torch.relu, x), -1.0), is_choice=True
        ),
    ),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_values_do_what_tensors_do(name):
    operation, rule = COMPOSITIONS[name]
    assert_rule(RuleCase(op=operation, args=(X,)), rule)


def squashed(t):
    """Vectors brought to a length below one (capsules, S. Sabour et al. 2017, arXiv:1710.09829, eq. 1), of sums of zero mean."""
    votes = t.sum(1, keepdim=True)
    length = votes.square().sum(-1, keepdim=True)
    return length / (1 + length) * votes / length.sqrt()


def squashed_value(call, x):
    votes = total(x, [1], True)
    length = total(apply(torch.square, votes), [2], True)
    share = combine(torch.div, length, affine(length, 1.0, 1.0))
    return combine(torch.div, combine(torch.mul, share, votes), apply(torch.sqrt, length))


def test_a_sum_of_zero_mean_is_no_number():
    x = correlated((4, 6, 8), shares={(0, 1): 0.3})
    assert_rule(
        RuleCase(op=squashed, args=(x,), model_error=0.03, shape_error=0.08, reason="lengths are taken at their mean"),
        squashed_value,
    )


def test_a_sum_of_squares_is_never_negative():
    squares = apply(torch.square, correlated((4, 6, 8), shares={}))
    for dims in ([2], [1, 2]):
        assert total(squares, dims, True).marginal.values.min() >= 0.0
        assert total(affine(squares, -1.0), dims, True).marginal.values.max() <= 0.0


def test_a_concatenation_that_gained_a_dimension_is_taken_apart():
    whole = join([X, affine(X, 2.0)], 1)
    part = take(reshape(whole, (4, 1, 12, 8, 1)), 2, 8, 11)
    assert part.shape == (4, 1, 3, 8, 1)
    assert part.second_moment == pytest.approx(4.0 * X.second_moment)


@pytest.mark.parametrize("number", [0.0, 0.75, -2.0])
def test_the_largest_of_equal_numbers_is_that_number(number):
    same = known(torch.full((2, 6, 8), number, dtype=torch.float64))
    pooled = max_over(replace(same, constant=None), [1, 2], [np.arange(6)[None, :], np.arange(8)[None, :]])
    assert (pooled.mean, pooled.second_moment) == pytest.approx((number, number**2))


def test_an_axis_that_meets_itself_in_another_dimension_stands_there_once():
    row = take(X, 1, 0, 1)
    crossed = combine(torch.mul, reshape(row, (4, 8, 1)), reshape(row, (4, 1, 8)))
    assert len(set(crossed.axes)) == len(crossed.axes)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_a_long_line_is_padded_without_a_matrix(mode, monkeypatch):
    """Here 5 of 29 places are padding; what they share with those that they repeat is a part of the table that goes with that."""
    monkeypatch.setattr("gainstage.rules.shapes.LONG", 0)
    line = correlated((4, 3, 24), mean=0.3, shares={(0, 1): 0.2, (2,): 0.15})
    reason = "padding has a latent of its own"
    assert_rule(RuleCase(op=torch.ops.aten.pad.default, args=(line, [2, 3], mode), model_error=0.06, reason=reason))


def test_groups_of_places_beside_the_samples_are_samples_of_each_group():
    """Groups of queries go through a layer one by one (group-wise decoders): what the samples of one share stays with it."""
    queries = correlated((4, 6, 8), shares={(1, 2): 0.5})  # half of which is the same for all samples
    call = Call(torch.ops.aten.cat.default, ((12, 2, 8),))
    beside = rules()[call.op](call, [take(queries, 1, start, start + 2) for start in (0, 2, 4)])
    beside = contract(beside, independent((8, 8), 0.0, 8**-0.5), "btc", "cd", "btd")
    for start in (0, 4, 8):
        group = take(beside, 0, start, start + 4)
        assert group.table[0, 1, 1] == pytest.approx(queries.table[0, 1, 1], rel=1e-6)
