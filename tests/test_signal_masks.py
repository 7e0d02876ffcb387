"""Attention in which not all keys are seen, or some more than others: against sums over fixed patterns, and draws."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from over_draws import second_moment_over_draws
from torch import nn
from torch.nn import functional as F

from gainstage.api import inspect
from gainstage.signal import (
    apply,
    combine,
    contract,
    independent,
    mean_over,
    normalise,
    softmax,
)
from gainstage.signal.gram import pairs, starts, ungrouped, widths


def log_weights(mask: torch.Tensor) -> torch.Tensor:
    """Nothing known but what is excluded."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)


def windows(size: int, reach: int) -> torch.Tensor:
    """Each query sees itself and a few keys before it."""
    return torch.ones(size, size, dtype=torch.bool).tril().triu(-reach)


@pytest.mark.parametrize(
    "mask", [windows(48, 48), windows(48, 5), torch.rand(48, 48, generator=torch.Generator().manual_seed(1)) < 0.4]
)
def test_rows_of_masked_attention_have_their_own_levels_and_pairs_their_own_share(mask: torch.Tensor) -> None:
    """Values that differ in level by position, in a second causal layer: against the sums over one fixed pattern of weights."""
    size, mask = 48, mask | torch.eye(48, dtype=torch.bool)
    logits = independent((size, size), 0.0, 0.0)

    weights = softmax(replace(logits, prior=log_weights(mask)), -1)
    value = independent((size, 8), 0.0, 1.0)
    first = contract(weights, value, "qk", "kc", "qc")
    second = contract(weights, first, "qk", "kc", "qc")
    pattern = (mask.double() / mask.double().sum(-1, keepdim=True)).numpy()
    for result, matrix in ((first, pattern), (second, pattern @ pattern)):
        exact = matrix @ matrix.T
        assert result.second_moment == pytest.approx(np.trace(exact) / size, rel=1e-6)
        assert result.levels is not None
        assert result.gram is not None
        assert (result.levels**2).ravel() * result.second_moment == pytest.approx(np.diag(exact), rel=1e-6)
        apart = ~np.eye(size, dtype=bool)
        assert result.table[0, 1] == pytest.approx(exact[apart].mean(), rel=1e-6)
        assert (result.gram.factors * result.table[0, 1])[apart] == pytest.approx(exact[apart], rel=1e-6)


@pytest.mark.parametrize("common", [0.0, 0.5])
@pytest.mark.parametrize("labels", ["qk", "kq"])
def test_rows_of_a_loud_causal_attention_are_each_as_peaked_as_their_number_of_keys_allows(labels: str, common: float) -> None:
    """Logits of variance 2: the first row is its one key, the last one twice as loud as an average. Against samples of softmaxes.

    ``kq``: sums over queries, as for the gradient of values. ``common``: what two values have in common.
    """
    size, prior = 24, log_weights(windows(24, 24))
    values = independent((size, 8), 0.0, 1.0)
    table = values.table.copy()
    table[0, 1] = common
    weights = softmax(replace(independent((size, size), 0.0, 2.0**0.5), prior=prior), -1)
    result = contract(weights, replace(values, table=table), labels, "kc", "qc")
    p = (
        torch.randn(4000, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.0**0.5 + prior
    ).softmax(-1)
    p = p if labels == "qk" else p.transpose(1, 2)
    exact = (p @ torch.full((size, size), common, dtype=torch.float64).fill_diagonal_(1.0) @ p.transpose(1, 2)).mean(0).numpy()
    assert result.levels is not None
    # 1 % of sampling; the gain is interpolated between numbers of keys; two keys of one query are taken to be independent.
    within = 0.02 if labels == "qk" else 0.08
    assert (result.levels**2).ravel() * result.second_moment == pytest.approx(np.diag(exact), rel=within)
    assert result.table[0, 1] == pytest.approx(exact[~np.eye(size, dtype=bool)].mean(), rel=0.02)


def test_sums_over_positions_of_two_tensors_count_what_each_pair_of_positions_shares_of_both() -> None:
    """A weight's gradient, ``sum of g_t x_t``, g loud at the first positions and x alike at the last; or a scale's."""
    size, weights = 48, softmax(replace(independent((48, 48), 0.0, 0.0), prior=log_weights(windows(48, 48))), -1)
    x = contract(weights, independent((size, 8), 0.0, 1.0), "qk", "kc", "qc")
    g = contract(weights, independent((size, 8), 0.0, 1.0), "qk", "qc", "kc")
    pattern = np.tril(np.ones((size, size))) / np.arange(1, size + 1)[:, None]
    exact = (pattern @ pattern.T) * (pattern.T @ pattern)
    assert contract(g, x, "tc", "td", "cd").second_moment == pytest.approx(exact.sum(), rel=1e-6)
    product = combine(torch.mul, g, x)
    assert product.second_moment == pytest.approx(np.trace(exact) / size, rel=1e-6)
    assert mean_over(product, product.dims[0]).second_moment * size**2 == pytest.approx(exact.sum(), rel=1e-6)
    apart = ~np.eye(size, dtype=bool)
    assert product.gram is not None
    assert (product.gram.factors * product.table[0, 1])[apart] == pytest.approx(exact[apart], rel=1e-6)


def test_functions_of_positions_share_by_pairs_what_their_correlations_leave() -> None:
    """ReLU of causal averages, each at its own level: pair by pair the arc-cosine kernel (Cho & Saul 2009)."""
    size, weights = 48, softmax(replace(independent((48, 48), 0.0, 0.0), prior=log_weights(windows(48, 48))), -1)
    x = contract(weights, independent((size, 512), 0.0, 1.0), "qk", "kc", "qc")
    y = apply(torch.relu, normalise(x, x.dims[1], 0.0, centre=False))
    count = np.arange(1.0, size + 1.0)
    rho = np.sqrt(np.minimum.outer(count, count) / np.maximum.outer(count, count))
    angle = np.arccos(np.minimum(rho, 1.0))
    exact = (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2.0 * np.pi)
    apart = ~np.eye(size, dtype=bool)
    assert y.gram is not None
    assert y.gram.factors[apart] == pytest.approx(exact[apart] / exact[apart].mean(), rel=1e-3)  # the grid that inverts a series


def test_groups_of_positions_cover_a_long_sequence() -> None:
    """Positions once each, and every pair of different ones."""
    for size in (2, 64, 65, 3000):
        assert starts(size)[0] == 0
        assert widths(size).sum() == size
        assert pairs(size).sum() == pytest.approx(size * (size - 1))
        assert len(ungrouped(widths(size), size)) == size
        assert len(starts(size)) < 150


def test_a_long_causal_sequence_is_right_through_groups() -> None:
    """Two causal averages over 2,000 positions: mean of (second average of white noise)^2."""
    size = 2000

    mask = torch.ones(size, size, dtype=torch.bool).tril()
    weights = softmax(replace(independent((size, size), 0.0, 0.0), prior=log_weights(mask)), -1)
    second = contract(weights, contract(weights, independent((size, 4), 0.0, 1.0), "qk", "kc", "qc"), "qk", "kc", "qc")
    pattern = np.tril(np.ones((size, size))) / np.arange(1, size + 1)[:, None]
    exact = float(((pattern @ pattern) ** 2).sum() / size)
    assert second.second_moment == pytest.approx(exact, rel=0.02)  # groups of up to 8 % of their distance from the start


class Decoder(nn.Module):
    """Pre-norm causal blocks whose attention is loud beside the stream, as after a small embedding."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        """Draw the weights."""
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(layers))
        self.fused = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Three layers of attention, without feed-forward parts."""
        for norm, fused, out in zip(self.norms, self.fused, self.out, strict=True):
            shape = (*x.shape[:2], 3, self.heads, -1)
            q, k, v = fused(norm(x)).reshape(shape).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = 0.1 * x + out(y.transpose(1, 2).flatten(2))
        return x


def test_causal_layers_on_causal_layers() -> None:
    """Early rows are loud and alike, so later layers average less away than the mean over all pairs tells."""
    torch.manual_seed(0)
    trace = inspect(Decoder(96, 4, 3), (torch.randn(2, 64, 96),))
    mean, error = second_moment_over_draws(lambda: Decoder(96, 4, 3), (2, 64, 96), 40)
    assert abs(math.log(trace.calls[-1].outputs[0].second_moment / mean)) < 0.04 + 4.0 * error


class Windows(nn.Module):
    """Queries and keys of the same windowed positions, a table of biases and a float mask."""

    def __init__(self) -> None:
        """Draw the projection and the table."""
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.bias = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("mask", torch.zeros(16, 16).masked_fill(windows(16, 16).logical_not(), -100.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention within windows of 4 x 4 places of a map of 8 x 8."""
        x = x.reshape(2, 2, 4, 2, 4, 32).permute(0, 1, 3, 2, 4, 5).reshape(8, 16, 32)
        q, k, v = self.qkv(x).reshape(8, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) * 0.25 + self.bias
        return (logits + self.mask).softmax(-1) @ v


def test_windowed_attention_with_biases_and_a_float_mask() -> None:
    """The axes of the map stand twice in the logits, split as windows."""
    torch.manual_seed(0)
    trace = inspect(Windows(), (torch.randn(2, 8, 8, 32),))
    mean, error = second_moment_over_draws(Windows, (2, 8, 8, 32), 60)
    assert abs(math.log(trace.calls[-1].outputs[0].second_moment / mean)) < 0.04 + 4.0 * error


class MaskedInPart(nn.Module):
    """A corner of the logits is overwritten, where a triangle of it is excluded; the rest stays as it is."""

    def __init__(self) -> None:
        """Draw the projection."""
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention in which the first eight queries see one to eight of the last eight keys and all others."""
        q, k, v = self.qkv(x).chunk(3, -1)
        logits = q @ k.transpose(-2, -1) * 0.2
        corner = logits[:, :8, 4:]
        logits[:, :8, 4:] = torch.full_like(corner, -math.inf).where(torch.ones(8, 8).triu(1).bool(), corner)
        return logits.softmax(-1) @ v


def test_a_mask_that_is_written_into_a_part_of_the_logits() -> None:
    """What is excluded in a slice stays excluded in the whole: else the output is a quarter too small."""
    torch.manual_seed(0)
    trace = inspect(MaskedInPart(), (torch.randn(2, 12, 32),))
    assert not trace.sampled
    mean, error = second_moment_over_draws(MaskedInPart, (2, 12, 32), 100)
    assert abs(math.log(trace.calls[-1].outputs[0].second_moment / mean)) < 0.04 + 4.0 * error


class MaskedByData(nn.Module):
    """Keys are excluded where a score, made of the data as well, is negative: half of them."""

    def __init__(self) -> None:
        """Draw the projections."""
        super().__init__()
        self.qkv, self.score = nn.Linear(32, 96), nn.Linear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention over about 24 of 48 keys."""
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = torch.zeros(x.shape[1], 48).masked_fill(self.score(x) < 0, -math.inf)
        return (q @ k.transpose(-2, -1) * 0.2 + mask).softmax(-1) @ v


def test_a_mask_that_depends_on_data_is_one_realisation_of_itself() -> None:
    """Half of the keys: the mean of 24 values has twice the second moment of the mean of 48."""
    torch.manual_seed(0)
    trace = inspect(MaskedByData(), (torch.randn(2, 48, 32),))
    mean, error = second_moment_over_draws(MaskedByData, (2, 48, 32), 60)
    assert abs(math.log(trace.calls[-1].outputs[0].second_moment / mean)) < 0.05 + 4.0 * error
