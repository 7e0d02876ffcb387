"""Attention: softmax, masks, experts and what positions share, against sampling of the real operations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from over_draws import second_moment_over_draws
from torch import nn
from torch.nn import functional as F

from gainstage.api import inspect
from gainstage.signal import (
    independent,
    measured,
    participation,
    reshape,
    softmax,
)
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
