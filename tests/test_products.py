"""Contractions that are written otherwise than as a layer, and what meets itself in rows and columns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captured import run_graph
from torch import nn

import gainstage as gs
from gainstage.capture import capture
from gainstage.graph import real_parameters
from gainstage.propagate.execution import Execution


class Written(nn.Module):
    """A weight [24, 4, 6] that is contracted with x [n, 4, 6] in some way, before a layer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.randn(24, 4, 6))
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, weight = x.flatten(1), self.weight.flatten(1)
        ways = {
            "tensordot": lambda: torch.tensordot(x, self.weight, dims=([1, 2], [1, 2])),
            "inner": lambda: torch.inner(flat, weight),
            "vecdot": lambda: torch.linalg.vecdot(flat[:, None], weight),
            "multi_dot": lambda: torch.linalg.multi_dot([flat, weight.T, torch.eye(24)]),
            "summed": lambda: (x[:, None] * self.weight).sum((-1, -2)),
        }
        return self.head(torch.relu(ways[self.way]()))


@pytest.mark.parametrize("way", ["tensordot", "inner", "vecdot", "multi_dot", "summed"])
def test_contraction_is_found_however_it_is_written(way: str) -> None:
    model, x = Written(way), torch.randn(16, 4, 6)
    graph = capture(model, (x,), {})
    values = run_graph(graph, model, (x,))
    torch.testing.assert_close(values[graph.outputs[0]], model(x), rtol=1e-5, atol=1e-5)
    plan = gs.plan(model, (x,))
    assert plan.parameters["weight"].distribution.std == pytest.approx(24**-0.5, rel=0.02)


class Vectors(nn.Module):
    """Heads [n, 4, 8], each contracted with a vector of its own, as the attention of a graph network does it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(12, 32)
        self.vectors = nn.Parameter(torch.ones(1, 4, 8))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh((self.heads(x).view(-1, 4, 8) * self.vectors).sum(-1)))


def test_vectors_of_heads_are_weights() -> None:
    plan = gs.plan(Vectors(), (torch.randn(16, 12),))
    assert plan.parameters["vectors"].distribution.std == pytest.approx(8**-0.5, rel=0.02)


class Sampled(nn.Module):
    """Features of each head, [n heads, 8, queries, keys], weighed by shares of the keys, and viewed as heads side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.shares, self.head = nn.Linear(12, 32), nn.Linear(12, 4 * 6), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, queries, _ = x.shape
        heads = self.features(x).view(n, queries, 4, 8).permute(0, 2, 3, 1).flatten(0, 1)
        shares = self.shares(x).view(n, queries, 4, 6).softmax(-1).transpose(1, 2).reshape(n * 4, 1, queries, 6)
        keys = torch.stack([heads.roll(shift, -1) for shift in range(6)], -1)
        return self.head((keys * shares).sum(-1).view(n, 32, queries).transpose(1, 2))


def test_what_shares_weigh_is_viewed_as_the_model_does_it() -> None:
    """The sum is laid out otherwise than the contraction that takes its place, and no view shows that as heads side by side."""
    model, x = Sampled(), torch.randn(4, 5, 12)
    graph = capture(model, (x,))
    with torch.no_grad():
        *_, (_, result) = Execution(graph, real_parameters(model), ()).run()
        torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-6)
    plan = gs.plan(model, (x,))
    gs.apply(model, plan, seed=0)
    assert any(row.is_met for row in gs.calibrate(model, plan, (x,)).rows)


def measured(model: nn.Module, plan: gs.Plan, shapes: tuple[tuple[int, ...], ...], draws: int) -> float:
    """Mean square of what the model returns, over draws of weights and inputs."""
    generator, levels = torch.Generator().manual_seed(0), []
    for seed in range(draws):
        gs.apply(model, plan, seed=seed)
        with torch.no_grad():
            levels.append(float(model(*(torch.randn(shape, generator=generator) for shape in shapes)).square().mean()))
    return sum(levels) / draws


class Pooled(nn.Module):
    """Pooling by attention: the keys are the values, and what is pooled leans towards what the scores read."""

    def __init__(self, scores: nn.Module) -> None:
        super().__init__()
        self.features, self.scores = nn.Linear(48, 48), scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return (torch.softmax(self.scores(x), 1) * x).sum(1)


@pytest.mark.parametrize("scores", [nn.Linear(48, 1), nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))])
def test_pooling_by_attention_leans_towards_what_its_scores_read(scores: nn.Module) -> None:
    """To first order in the cosine of two keys; values that know nothing of the scores would give two thirds."""
    model = Pooled(scores)
    plan = gs.plan(model, (torch.randn(8, 40, 48),))
    assert plan.predictions["@0"][0] == pytest.approx(measured(model, plan, ((8, 40, 48),), 200), rel=0.15)


class Looked(nn.Module):
    """Queries look up what keys are: the keys themselves, values made of them, a memory."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.queries, self.keys, self.values = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.memory, self.kind = nn.Parameter(torch.randn(40, 32)), kind

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        keys = self.memory if self.kind == "memory" else self.keys(y)
        shares = (self.queries(x) @ keys.transpose(-1, -2) / 32**0.5).softmax(-1)
        return shares @ (self.values(keys) if self.kind == "values" else keys)


@pytest.mark.parametrize("kind", ["keys", "values", "memory"])
def test_what_is_looked_up_leans_towards_the_query(kind: str) -> None:
    model, shapes = Looked(kind), ((8, 20, 32), (8, 40, 32))
    plan = gs.plan(model, tuple(torch.randn(shape) for shape in shapes))
    assert plan.predictions["@0"][0] == pytest.approx(measured(model, plan, shapes, 60), rel=0.1)


class Pairs(nn.Module):
    """Features of n places in rows and columns."""

    def __init__(self, sign: float, f: nn.Module) -> None:
        super().__init__()
        self.features, self.f, self.sign = nn.Linear(16, 64), f, sign

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.f(self.features(x))
        return x[:, :, None] + self.sign * x[:, None]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("f", [nn.Identity(), nn.ReLU()])
def test_rows_and_columns_are_other_places_but_on_the_diagonal(sign: float, f: nn.Module) -> None:
    model = Pairs(sign, f)
    plan = gs.plan(model, (torch.randn(4, 5, 16),))
    assert plan.predictions["@0"][0] == pytest.approx(measured(model, plan, ((4, 5, 16),), 40), rel=0.03)


class Gated(nn.Module):
    """A layer's output h, another f of it, and a gate z."""

    def __init__(self, way: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.gate, self.way = nn.Linear(16, 48), nn.Linear(48, 48), nn.Linear(16, 48), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.way(h, self.second(torch.relu(h)), torch.sigmoid(self.gate(x)))


@pytest.mark.parametrize(
    "way",
    [
        lambda h, f, z: h + z * h,
        lambda h, f, z: torch.relu(h) + z * torch.relu(h),
        lambda h, f, z: h - z * h,
        lambda h, f, z: h + z * (f - h),
        lambda h, f, z: (1 - z) * h + z * f,
    ],
)
def test_gate_passes_in_part_what_the_residual_is(way: Callable[..., torch.Tensor]) -> None:
    model = Gated(way)
    plan = gs.plan(model, (torch.randn(64, 16),))
    assert plan.predictions["@0"][0] == pytest.approx(measured(model, plan, ((64, 16),), 60), rel=0.05)


class Excess(nn.Module):
    """What one layer has beyond another, by a sum with their maximum or minimum."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.way = nn.Linear(64, 64), nn.Linear(64, 64), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.first(x), self.second(x)
        ways = {"maximum": lambda: torch.maximum(a, b) - a, "minimum": lambda: b - torch.minimum(b, a)}
        return ways[self.way]()


@pytest.mark.parametrize("way", ["maximum", "minimum"])
def test_sums_with_a_maximum_know_what_it_has_of_their_terms(way: str) -> None:
    """``E[max(b - a, 0)^2] = (E[a^2] + E[b^2]) / 2``; half of it for each of two that know nothing of each other is too much."""
    trace = gs.inspect(Excess(way), (torch.randn(16, 64),), gradients=False)
    total = trace.modules["first"][0].second_moment + trace.modules["second"][0].second_moment
    assert trace.modules[""][0].second_moment == pytest.approx(total / 2, rel=0.01)


class Itself(nn.Module):
    """Products of all places of a tensor with all, and something that is done with them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.scale, self.way = nn.Parameter(torch.ones(1)), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scale * x
        products = x @ x.transpose(1, 2) / 6.0
        rows, columns = torch.tril_indices(24, 24, -1)
        ways = {
            "all": lambda: products,
            "written": lambda: torch.einsum("bic,bjc->bij", x, x),
            "pairs": lambda: products[:, rows, columns],
            "attention": lambda: products.softmax(-1) @ x,
            "others": lambda: products.masked_fill(torch.eye(24, dtype=torch.bool), -torch.inf).softmax(-1) @ x,
        }
        return ways[self.way]()


@pytest.mark.parametrize("way", ["all", "written", "pairs", "attention", "others"])
def test_products_of_a_tensor_with_itself_have_a_diagonal(way: str) -> None:
    """``x_i x_i`` is n times the variance, and a softmax sees it; what leaves the diagonal out knows nothing of it."""
    model, generator = Itself(way), torch.Generator().manual_seed(0)
    trace = gs.inspect(model, (torch.randn(8, 24, 36),), gradients=False)
    with torch.no_grad():
        exact = float(model(torch.randn(400, 24, 36, generator=generator)).square().mean())
    # Of the diagonal's own variance half is missing; that a query leans towards its keys is followed to first order.
    assert trace.modules[""][0].second_moment == pytest.approx(exact, rel=0.12)


class Queries(nn.Module):
    """Self-attention of a table of learned queries, the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.query, self.key, self.value, self.end = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = self.table.weight.expand(x.shape[0], 20, 32)
        query, key, value = (layer(table).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return x + self.end(nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def test_a_table_that_layers_read_is_data_to_them() -> None:
    """Of weights times weights it was not known that keys and values are of one table: 1.5 times too loud."""
    torch.manual_seed(0)
    model, x = Queries(), torch.randn(2, 20, 32)
    plan = gs.plan(model, (x,))
    levels: list[float] = []
    model.end.register_forward_hook(lambda _module, _args, y: levels.append(float(y.detach().square().mean())))
    for seed in range(100):
        gs.apply(model, plan, seed=seed)
        with torch.no_grad():
            model(x)
    assert plan.predictions["end@0"][0] == pytest.approx(sum(levels) / len(levels), rel=0.1)
