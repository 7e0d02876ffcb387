"""Branches of other people's models contribute what they are asked for, measured on real passes."""

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.cli.huggingface import cpu_torchvision_if_installed
from gainstage.errors import InputError, UnknownNameError

WIDTH = 64


class Branches(nn.Module):
    """Three branches of unequal fan-ins, one that ends in ReLU; added or concatenated."""

    def __init__(self, *, is_sum, widths=(WIDTH, WIDTH, WIDTH)):
        super().__init__()
        self.is_sum = is_sum
        self.inner = nn.ModuleList(nn.Linear(WIDTH, n) for n in (16, 64, 256))
        self.ends = nn.ModuleList(nn.Linear(n, width) for n, width in zip((16, 64, 256), widths, strict=True))
        self.last = nn.Linear(WIDTH if is_sum else sum(widths), 10)

    def branches(self, x):
        found = [end(inner(x).relu()) for inner, end in zip(self.inner, self.ends, strict=True)]
        return [found[0].relu(), *found[1:]]

    def forward(self, x):
        found = self.branches(x)
        return self.last(sum(found[1:], found[0]) if self.is_sum else torch.cat(found, -1)).sin()


def contributions(model, policy, draws=24):
    """Mean over draws of the summed squares of each branch, over their mean."""
    x = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0))
    plan = gs.plan(model, (x,), policy=policy)
    found = []
    for seed in range(draws):
        gs.apply(model, plan, seed=seed)
        with torch.no_grad():
            found.append([float(branch.square().mean()) * branch.shape[-1] for branch in model.branches(x)])
    mean = np.mean(found, axis=0)
    return mean / mean.mean()


@pytest.mark.parametrize("form", [{"is_sum": True}, {"is_sum": False, "widths": (16, 32, 80)}], ids=["sum", "concatenation"])
def test_branches_contribute_equally_or_as_asked(form):
    equal = contributions(Branches(**form), gs.policies.unit())
    asked = contributions(Branches(**form), gs.policies.unit(branch_shares={"ends.1": 4.0}))
    # a 16-wide layer strays by sqrt(5/16) in each of two layers; over 24 draws that is 15 %
    np.testing.assert_allclose(equal, 1.0, rtol=0.3)
    np.testing.assert_allclose(asked, [0.5, 2.0, 0.5], rtol=0.3)


def test_the_closed_form_of_relu_branches():
    """sigma_b^2 ~ 1/n_b: equal inputs, unequal fan-ins, 3 siblings that are added to a second moment of 1."""
    x = torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(0))
    plan = gs.plan(Branches(is_sum=True), (x,))
    for name, fan in (("ends.1.weight", 64), ("ends.2.weight", 256)):
        assert plan.parameters[name].distribution.std ** 2 == pytest.approx(2 / (3 * fan), rel=0.03)
    assert plan.parameters["ends.0.weight"].distribution.std ** 2 == pytest.approx(2 * 2 / (3 * 16), rel=0.03)


def test_shares_of_a_stream():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
    x = torch.randn(64, 8, WIDTH, generator=torch.Generator().manual_seed(0))
    plan = gs.plan(layer, (x,), policy=gs.policies.unit(branch_shares={"linear2.weight": 3.0}))
    assert plan.predictions["linear2@0"][0] == pytest.approx(0.75, rel=0.01)
    assert "1.5 times an equal share" in plan.explain("linear2.weight")


def test_inception_blocks_of_torchvision():
    """Four branches of 64, 128, 32 and 32 channels that end in convolution, batch norm and ReLU."""
    cpu_torchvision_if_installed()
    googlenet = pytest.importorskip("torchvision.models.googlenet")
    block = googlenet.Inception(64, 64, 96, 128, 16, 32, 32).train()
    x = torch.randn(8, 64, 14, 14, generator=torch.Generator().manual_seed(0))
    gs.initialize(block, (x,))
    with torch.no_grad():
        squares = [float(part.square().sum()) for part in block(x).split([64, 128, 32, 32], 1)]
    assert max(squares) / min(squares) < 1.1


@pytest.mark.parametrize(
    ("shares", "error", "message"),
    [
        ({"ends.1": 0.0}, InputError, "positive"),
        ({"ends.1": float("nan")}, InputError, "positive"),
        ({"emds.1": 2.0}, UnknownNameError, r"nearest: ends\.\d"),
        ({"inner.0.weight": 2.0}, UnknownNameError, "ends a branch"),
    ],
)
def test_shares_that_cannot_be_meant(shares, error, message):
    with pytest.raises(error, match=message):
        gs.plan(Branches(is_sum=True), (torch.randn(4, WIDTH),), policy=gs.policies.unit(branch_shares=shares))
