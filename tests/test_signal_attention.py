"""Attention: softmax, masks, experts and what positions share, against sampling of the real operations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gainstage.api import inspect
from gainstage.signal import (
    apply,
    combine,
    contract,
    independent,
    mean_over,
    measured,
    normalise,
    participation,
    reshape,
    softmax,
)
from gainstage.signal.gram import pairs, starts, ungrouped, widths
from gainstage.signal.rolling import roll
from gainstage.signal.sampling import draw


class SelfAttention(nn.Module):
    """One head over tokens; logits of a given variance for inputs of variance 1."""

    def __init__(self, width: int, variance: float, mask: torch.Tensor | None = None) -> None:
        """Draw the projections."""
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        for layer, gain in ((self.query, variance**0.5), (self.key, 1.0), (self.value, 1.0)):
            nn.init.normal_(layer.weight, std=gain * width**-0.5)
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weighted mean of the values."""
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), attn_mask=self.mask)


def second_moment_over_draws(make: object, shape: tuple[int, ...], count: int) -> tuple[float, float]:
    """Mean over draws of weights and inputs of the second moment, and its relative standard error."""
    assert callable(make)
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            found.append(float(model(torch.randn(shape)).double().square().mean()))
    return float(np.mean(found)), float(np.std(found) / np.mean(found) / math.sqrt(count))


@pytest.mark.parametrize("variance", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("count", [8, 128])
def test_participation_is_that_of_sampled_softmax(variance: float, count: int) -> None:
    """Sampling error of 200,000 rows or fewer: four standard errors."""
    torch.manual_seed(0)
    rows = 1_600_000 // count
    squares = (torch.randn(rows, count, dtype=torch.float64) * variance**0.5).softmax(-1).square().sum(-1)
    assert participation(variance, count) == pytest.approx(float(squares.mean()), abs=4.0 * float(squares.std()) / rows**0.5)


@pytest.mark.parametrize("variance", [0.25, 1.0])
def test_attention_leans_towards_what_keys_and_values_share(variance: float) -> None:
    """96 tokens of 64 channels: without the lean a quarter of the output's second moment is missing."""
    torch.manual_seed(0)
    trace = inspect(SelfAttention(64, variance), (torch.randn(2, 96, 64),))
    mean, error = second_moment_over_draws(lambda: SelfAttention(64, variance), (2, 96, 64), 60)
    assert abs(math.log(trace.calls[-1].outputs[0].second_moment / mean)) < 0.03 + 4.0 * error


class OnMap(nn.Module):
    """Tokens that were laid out on a map when a kernel made them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Conv2d(16, 64, 4, stride=4, bias=False), SelfAttention(64, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        return self.attend((y / y.square().mean(1, keepdim=True).sqrt()).flatten(2).transpose(1, 2))


class NormedTwice(SelfAttention):
    """Keys and values each have the norm of the same tokens to themselves, as in the Perceiver."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for_keys, for_values = (F.layer_norm(x, x.shape[-1:]) for _ in range(2))
        return F.scaled_dot_product_attention(self.query(for_keys), self.key(for_keys), self.value(for_values))


@pytest.mark.parametrize(("make", "shape"), [(OnMap, (2, 16, 32, 48)), (lambda: NormedTwice(64, 1.0), (2, 96, 64))])
def test_attention_leans_wherever_keys_and_values_come_from_the_same_tokens(make: object, shape: tuple[int, ...]) -> None:
    """As above: 96 tokens of 64 channels."""
    assert callable(make)
    torch.manual_seed(0)
    trace = inspect(make(), (torch.randn(shape),))
    mean, error = second_moment_over_draws(make, shape, 60)
    assert abs(math.log(trace.calls[-1].outputs[0].second_moment / mean)) < 0.03 + 4.0 * error


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


class Experts(nn.Module):
    """Each token goes to two of six experts: rows are sorted by expert, multiplied in groups, and put back."""

    def __init__(self) -> None:
        """Draw the router and the experts."""
        super().__init__()
        self.router = nn.Linear(32, 6, bias=False)
        nn.init.normal_(self.router.weight, std=32**-0.5)  # logits of variance 1: shares that differ
        self.weight = nn.Parameter(torch.randn(6, 32, 24) * 32**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weighted sum over the experts of each token."""
        share, choice = self.router(x).softmax(-1).topk(2)
        order = choice.reshape(-1).argsort()
        rows = x[order // 2]
        ends = torch.histc(choice.reshape(-1)[order].float(), bins=6, min=0, max=5).cumsum(0).to(torch.int32)
        y = torch._grouped_mm(rows.bfloat16(), self.weight.bfloat16(), offs=ends).float() * share.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        return y[back].reshape(-1, 2, 24).sum(1)


def test_experts_are_summed_as_independent_whatever_tokens_share() -> None:
    """Tokens correlate by one half: two experts of one token are independent, one expert of two tokens is not."""

    def tokens() -> torch.Tensor:
        return (torch.randn(64, 32) + torch.randn(1, 32)) / 2**0.5

    found = []
    for seed in range(60):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(float(Experts()(tokens()).double().square().mean()))
    torch.manual_seed(0)
    trace = inspect(Experts(), (tokens(),))
    error = np.std(found) / np.mean(found) / math.sqrt(len(found))
    assert abs(math.log(trace.calls[-1].outputs[0].second_moment / np.mean(found))) < 0.04 + 4.0 * error


class ClassToken(nn.Module):
    """A token is put before the others; the rest of the stream meets a norm of itself."""

    def __init__(self) -> None:
        """Token and norm."""
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 48))
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[h(n_0), n_rest] + x``, n the norm of x: coherent in the rest, independent in the token."""
        x = torch.cat([self.token.expand(2, -1, -1), 3.0 * x], dim=1)
        n = self.norm(x)
        return x + torch.cat([self.head(n[:, :1]), n[:, 1:]], dim=1)


def test_parts_of_a_concatenation_are_combined_as_what_they_are() -> None:
    """The rest adds amplitudes: (3 + 1)^2."""
    torch.manual_seed(0)
    trace = inspect(ClassToken(), (torch.randn(2, 9, 48),))
    mean, error = second_moment_over_draws(ClassToken, (2, 9, 48), 40)
    assert abs(math.log(trace.calls[-1].outputs[0].second_moment / mean)) < 0.01 + 4.0 * error


@pytest.mark.parametrize("shift", [-3, 2, 4, 11])
def test_a_cyclic_shift_gives_windows_other_members(shift: int) -> None:
    """Five windows of four places, each window with a level of its own: against the shifted tensor itself, and back."""
    torch.manual_seed(0)
    data = torch.randn(5, 1, 200_000, dtype=torch.float64) + 0.5 * torch.randn(5, 4, 200_000, dtype=torch.float64)
    value = reshape(measured(data), (20, 200_000))
    moved = roll(value, 0, shift)
    exact = measured(torch.roll(data.reshape(20, -1), shift, 0).reshape(5, 4, -1))
    assert moved.table == pytest.approx(exact.table, abs=2e-2)  # five windows: their own average over pairs strays by 1 %
    assert roll(moved, 0, -shift).axes == value.axes


class Linear(nn.Module):
    """Attention with linear biases: keys far away are known to count less, head by head."""

    def __init__(self) -> None:
        """Draw the projections."""
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Causal, two heads of different slopes."""
        q, k, v = self.qkv(x).reshape(2, 24, 3, 2, 16).permute(2, 0, 3, 1, 4)
        distance = torch.arange(24)[:, None] - torch.arange(24)
        bias = -torch.tensor([0.5, 0.1])[:, None, None] * distance
        return ((q @ k.transpose(-2, -1)) / 4.0 + bias.masked_fill(distance < 0, -math.inf)).softmax(-1) @ v


class Strangers(nn.Module):
    """Keys and values that read different tensors have no direction in common."""

    def __init__(self) -> None:
        """Draw the projections."""
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True, kdim=48, vdim=16)
        nn.init.normal_(self.attention.q_proj_weight, std=0.25)  # logits of variance 1 and more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of three thirds of the channels."""
        result: torch.Tensor = self.attention(*x.split([32, 48, 16], dim=-1), need_weights=False)[0]
        return result


@pytest.mark.parametrize(("model", "shape"), [(Linear, (2, 24, 32)), (Strangers, (2, 64, 96))])
def test_known_biases_and_keys_that_are_strangers_to_the_values(model: type[nn.Module], shape: tuple[int, ...]) -> None:
    """Mean over draws of weights and inputs."""
    torch.manual_seed(0)
    trace = inspect(model(), (torch.randn(shape),))
    mean, error = second_moment_over_draws(model, shape, 60)
    assert abs(math.log(trace.calls[-1].outputs[0].second_moment / mean)) < 0.03 + 4.0 * error


def test_drawn_probabilities_sum_to_one_and_have_the_table_that_they_are_drawn_from() -> None:
    """A quarter of a million rows: one in 500."""
    logits = independent((250_000, 4), 0.0, 1.0)
    weights = softmax(logits, -1)
    (sample,) = draw([weights], np.random.default_rng(0))
    assert sample.sum(-1).numpy() == pytest.approx(np.ones(250_000))
    assert float(sample.square().mean()) == pytest.approx(weights.second_moment, rel=5e-3)


class MapThenToken(nn.Module):
    """A smooth map becomes tokens, and a class token is put before them."""

    def __init__(self) -> None:
        """Token, projection and head."""
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 24))
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.head = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens of a pooled map."""
        tokens = F.avg_pool2d(self.conv(x).relu(), 3, 1).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.token.expand(2, -1, -1), tokens], dim=1))


def test_a_map_that_is_smooth_can_be_joined_as_tokens() -> None:
    """What near places share ends with the map."""
    torch.manual_seed(0)
    trace = inspect(MapThenToken(), (torch.randn(2, 3, 8, 8),))
    mean, error = second_moment_over_draws(MapThenToken, (2, 3, 8, 8), 60)
    assert abs(math.log(trace.calls[-1].outputs[0].second_moment / mean)) < 0.05 + 4.0 * error
