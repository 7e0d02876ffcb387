"""Statistics of present parameters: slices that were drawn with different deviations are found, and only those."""

import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.errors import UnsupportedParameterError
from gainstage.propagate import input_value, level_profile


@pytest.mark.parametrize(
    ("stds", "rows", "dim"),
    [
        ((0.05, 0.2, 0.2), 48, 0),  # queries smaller than keys and values
        ((0.05, 0.1, 0.3), 32, 1),  # stored transposed
        ((1.0, 1.3), 64, 0),
        ((0.0, 1.0), 16, 0),
    ],
)
def test_slices_are_found_where_they_are(stds, rows, dim):
    for seed in range(10):
        torch.manual_seed(seed)
        matrix = torch.cat([std * torch.randn(rows, 96) for std in stds])
        profile = level_profile(matrix if dim == 0 else matrix.T)
        assert {d for d, _, _, _ in profile} == {dim}
        expected, start = [], 0
        for index, std in enumerate(stds):
            if index and std == stds[index - 1]:
                expected[-1] = (expected[-1][0], start + rows, std)
            else:
                expected.append((start, start + rows, std))
            start += rows
        assert len(profile) == len(expected)
        for (_, begin, end, found), (first, last, std) in zip(profile, expected, strict=True):
            # A cut is placed where the two sides differ most; rows of 96 entries put it within two rows of the true one.
            assert abs(begin - first) <= 2
            assert abs(end - last) <= 2
            assert found == pytest.approx(std, rel=0.1, abs=1e-12)


@pytest.mark.parametrize("shape", [(64, 64), (256, 16), (8, 512), (32, 3, 3, 3), (1000, 4)])
def test_a_parameter_of_one_piece_has_no_slices(shape):
    torch.manual_seed(0)
    draws = [draw(shape) for _ in range(100) for draw in (torch.randn, torch.rand)]
    assert sum(bool(level_profile(draw - draw.mean())) for draw in draws) == 0
    assert level_profile(torch.randn(100)) == ()
    assert level_profile(torch.zeros(shape)) == ()


def test_parameters_on_meta_have_no_moments():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedParameterError, match=r"on the meta device.*0\.weight, 0\.bias.*gainstage\.plan"):
        gs.inspect(model, (torch.zeros(2, 3),))


@pytest.mark.parametrize(
    ("entries", "is_normal"),
    [
        (lambda: torch.randn(30, 2), True),
        (lambda: torch.randn(8, 3), True),
        (lambda: torch.rand(50, 2) * 2 - 1, False),  # coordinates; E[x^2] = 1/3
        (lambda: torch.rand(30, 1), False),  # times; mean 1/2
        (lambda: torch.full((4, 1), 0.5), False),
    ],
)
def test_few_inputs_are_standard_normal_only_where_they_look_so(entries, is_normal):
    torch.manual_seed(0)
    tensor = entries()
    found = input_value("x", tensor, tuple(tensor.shape))
    assert found.second_moment == pytest.approx(1.0 if is_normal else float(tensor.square().mean()))
