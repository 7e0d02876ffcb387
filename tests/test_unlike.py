"""Softmaxes over queries and keys that are not alike: windows with padding, against sampling and draws of the real layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gainstage as gs
from gainstage.signal import filter_dim, independent, normalise, take
from gainstage.signal.axes import new_dims
from gainstage.signal.patterns import pairs_of
from gainstage.signal.rolling import roll
from gainstage.signal.unlike import STEP, _by_kind, of_one, unlike
from gainstage.signal.value import gaussian


def test_what_pairs_of_a_known_array_share():
    known = np.random.default_rng(0).normal(size=(3, 1, 4))
    table = pairs_of(known)
    assert table.shape == (2, 1, 2)
    apart = [
        known[i, 0, a] * known[j, 0, b]
        for i in range(3)
        for j in range(3)
        for a in range(4)
        for b in range(4)
        if i != j and a != b
    ]
    one_row = [known[i, 0, a] * known[i, 0, b] for i in range(3) for a in range(4) for b in range(4) if a != b]
    assert table[0, 0, 0] == pytest.approx(np.mean(apart))
    assert table[1, 0, 0] == pytest.approx(np.mean(one_row))
    assert table[1, 0, 1] == pytest.approx(np.mean(known**2))


@pytest.mark.parametrize("loud", [1.0, 3.0])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_are_those_of_a_sampled_softmax(loud, masked):
    """Of 12 keys 5 are zeros; half of the logits' variance is common to all keys of a row."""
    levels = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    root = float(np.mean(levels**2)) ** 0.5
    profile, prior = levels[None] / root, np.where(np.arange(12) % 4 == 3, -np.inf, 0.0)[None] if masked else None
    square = loud * root**2
    table = np.array([[0.0, 0.0], [0.5 * square, square]]) * pairs_of(profile)
    found = unlike(tuple(axis for dim in new_dims((2, 12)) for axis in dim), table, profile, prior, 3.0)
    assert found is not None
    rows, variance = found
    assert variance == pytest.approx(0.5 * square)

    draws = 400_000
    noise = torch.randn(draws, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    common = torch.randn(draws, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = torch.from_numpy(levels) * (0.5 * loud) ** 0.5 * (noise + common)
    if prior is not None:
        logits = logits + torch.from_numpy(prior)
    p = logits.softmax(-1).numpy()
    # 400,000 draws of p, which strays by less than 4 times its mean: 0.7 % is a standard error; levels are told apart to 1/24.
    np.testing.assert_allclose(rows.mean[0], p.mean(0), rtol=0.02, atol=1e-6)
    np.testing.assert_allclose(rows.square[0], (p**2).mean(0), rtol=0.03, atol=1e-6)
    np.testing.assert_allclose(rows.pair[0, 4] ** 2, (p[:, 4] * p[:, 5]).mean(), rtol=0.02)
    assert float(rows.rows(levels, 1.0, 1.0)[0, 0]) == pytest.approx(float(((p @ levels) ** 2).mean()), rel=0.03)


def test_zeros_stay_zeros_in_norms_and_rolls_and_what_is_cut_out_has_its_own_pairs():
    inner = independent((4, 5, 64), 0.0, 2.0)
    x = gaussian(inner.dims, 0.0, np.where(inner.table > 0.0, inner.table, 1.0) * np.ones((2, 2, 2)))
    padded = filter_dim(x, 1, np.eye(8, 5))
    normed = normalise(padded, padded.dims[2], 1e-5)
    assert normed.second_moment == pytest.approx(5 / 8, rel=1e-4)
    assert roll(normed, 1, 3).levels.ravel() == pytest.approx(np.roll(normed.levels.ravel(), 3))
    part = take(padded, 1, 0, 5)
    np.testing.assert_allclose(part.table, x.table, rtol=1e-9)


class Windowed(nn.Module):
    """A map of 7 x 7 in four windows of 5 x 5, rolled, with padding that a norm leaves at zero; then cut back."""

    def __init__(self, variance: float, *, fused: bool = True) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(96), nn.Linear(96, 288, bias=False), nn.Linear(96, 96, bias=False)
        with torch.no_grad():
            self.qkv.weight.normal_(std=96**-0.5)
            self.qkv.weight[:192] *= variance**0.25
            self.out.weight.normal_(std=96**-0.5)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c = x.shape[0], x.shape[-1]
        x = F.pad(x, (0, 0, 0, 3, 0, 3)).roll((-2, -2), (1, 2))
        x = x.reshape(b, 2, 5, 2, 5, c).transpose(2, 3).reshape(b * 4, 25, c)
        q, k, v = self.qkv(self.norm(x)).reshape(b * 4, 25, 3, 3, 32).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT * 32**-0.5).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(b, 2, 2, 5, 5, c).transpose(2, 3).reshape(b, 10, 10, c))
        return y.roll((2, 2), (1, 2))[:, :7, :7]


def drawn(build, seeds) -> tuple[float, float, float]:
    """Mean over draws of the second moment and its relative standard error, and of the cosine between places."""
    squares, shared = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        with torch.no_grad():
            y = build()(torch.randn(4, 7, 7, 96)).double().flatten(1, 2)
        squares.append(float(y.square().mean()))
        shared.append((float(y.sum(1).square().mean()) / 49 - squares[-1]) / 48)
    return (
        float(np.mean(squares)),
        float(np.std(squares) / np.mean(squares) / len(squares) ** 0.5),
        float(np.mean(shared) / np.mean(squares)),
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variance", [1.0, 4.0])
def test_padded_windows(variance, fused):
    """Taken for alike, rows give 1.9 (variance 1) and 2.9 times the second moment. 6 % for the lean, which is of first order."""
    torch.manual_seed(0)
    signal = gs.inspect(Windowed(variance, fused=fused), (torch.randn(4, 7, 7, 96),), gradients=False).calls[-1].outputs[0]
    mean, error, cosine = drawn(lambda: Windowed(variance, fused=fused), range(24))
    assert abs(math.log(signal.second_moment / mean)) < 0.06 + 3.0 * error
    assert signal.cosine(1) == pytest.approx(cosine, abs=0.1)


def test_logits_are_asked_for_where_queries_and_keys_are_no_padding():
    model, x = Windowed(1.0), torch.randn(4, 7, 7, 96)
    plan = gs.plan(model, (x,))
    found = []
    for seed in range(6):
        gs.apply(model, plan, seed=seed)
        with torch.no_grad():
            q, k, _ = model.qkv(model.norm(torch.randn(4, 49, 96))).reshape(4, 49, 3, 3, 32).permute(2, 0, 3, 1, 4).unbind(0)
            found.append(float((q @ k.mT * 32**-0.5).var(-1).mean()))
    assert np.mean(found) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("variance", [0.05, 0.5, 8.0])
def test_no_finer_step_of_the_integral_tells_more(monkeypatch: pytest.MonkeyPatch, variance: float):
    rng, points = np.random.default_rng(0), []
    counts, variances, priors = rng.integers(1, 4, (5, 60)) * 1.0, variance * rng.uniform(0.3, 1.0, 60), -rng.uniform(0, 6, 60)

    def counted(*arguments: object) -> object:
        points.append(len(arguments[1]))
        return of_one(*arguments)

    monkeypatch.setattr("gainstage.signal.unlike.of_one", counted)
    found = _by_kind(counts, variances, priors, 3.0)
    assert max(points) < 150
    monkeypatch.setattr("gainstage.signal.unlike.STEP", STEP / 8.0)
    np.testing.assert_allclose(found, _by_kind(counts, variances, priors, 3.0), rtol=1e-8)
