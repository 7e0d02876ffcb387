"""Exponentials, the largest that they are taken below and their sums are of one draw; draws of the model are the judge."""

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.graph import Region

NODES, EDGES, WIDTH, HEADS, DRAWS = 40, 200, 256, 4, 64
SOURCE, TARGET = torch.randint(NODES, (2, EDGES), generator=torch.Generator().manual_seed(0))


def edge_logits(h):
    of_source, of_target = h[..., 0], h[..., 1]
    return nn.functional.leaky_relu(of_source[SOURCE] + of_target[TARGET], 0.2)


def sums_at_targets(edges):
    return torch.zeros(NODES, *edges.shape[1:]).index_add(0, TARGET, edges)


def below_the_largest(e):
    largest = torch.full((NODES, HEADS), -1e9).scatter_reduce(0, TARGET[:, None].expand_as(e), e, "amax")
    return torch.exp(e - largest[TARGET])


def over_neighbours(h, y):
    p = below_the_largest(edge_logits(h))
    return p / (sums_at_targets(p)[TARGET] + 1e-16)


def over_neighbours_as_it_is(h, y):
    p = edge_logits(h).exp()
    total = torch.zeros(NODES, HEADS).scatter_add(0, TARGET[:, None].expand_as(p), p)
    return p / total.index_select(0, TARGET)


def divided_at_last(h, y):
    p = below_the_largest(edge_logits(h))
    return sums_at_targets(p[..., None] * y[SOURCE][:, None]) / (sums_at_targets(p)[..., None] + 1e-16)


def mean_weighted_by_exponentials(h, y):
    p = h[..., 0].exp()
    return (p[..., None] * y[:, None]).sum(0) / p.sum(0)[:, None]


def exponentials_alone(h, y):
    e = h[..., 0]
    return (e - e.amax(0, keepdim=True)).exp()


def logarithm_at_neighbours(h, y):
    e = edge_logits(h)
    return e - sums_at_targets(e.exp())[TARGET].log()


JOINT = [
    over_neighbours, over_neighbours_as_it_is, divided_at_last, mean_weighted_by_exponentials, exponentials_alone,
    logarithm_at_neighbours,
]  # fmt: skip


class Scored(nn.Module):
    """Logits of nodes, two for each head, and something that is done with them and with other features of the nodes."""

    def __init__(self, function):
        super().__init__()
        self.score = nn.Linear(WIDTH, 2 * HEADS, bias=False)
        self.function = function

    def forward(self, x, y):
        return self.function(self.score(x).unflatten(-1, (HEADS, 2)), y)


def drawn(model, seed):
    torch.manual_seed(seed)
    nn.init.normal_(model.score.weight, std=1.5 / WIDTH**0.5)
    return torch.randn(NODES, WIDTH), torch.randn(NODES, 8)


def draws_of(model):
    with torch.no_grad():
        return torch.stack([model(*drawn(model, seed)) for seed in range(DRAWS)]).double()


def output_of(model):
    trace = gs.inspect(model, drawn(model, 0), gradients=False)
    (name,) = trace.graph.outputs
    return trace, trace.nodes[name]


@pytest.mark.parametrize("function", JOINT)
def test_moments_are_those_of_draws(function):
    model = Scored(function)
    trace, signal = output_of(model)
    found = draws_of(model)
    assert any(isinstance(node.op, Region) for node in trace.graph.nodes)
    assert signal.second_moment == pytest.approx(found.square().mean().item(), rel=0.05)


def test_weights_of_few_neighbours_are_louder():
    """A node with one neighbour gives it the weight 1; sums over neighbours have levels of their own for it."""
    _, signal = output_of(Scored(over_neighbours))
    found = draws_of(Scored(over_neighbours)).square().mean((0, 2)).numpy()
    degree = np.bincount(TARGET.numpy(), minlength=NODES)[TARGET.numpy()]
    for count in (1, 2, 3, 5, 8):
        level = np.mean(signal.value.levels[degree == count, 0] ** 2)
        assert level == pytest.approx(found[degree == count].mean() / found.mean(), rel=0.1)


def test_exponentials_of_something_else_are_not_joined():
    def function(h, y):
        p, q = h[..., 0].exp(), h[..., 1].exp()
        return p / q.sum(0) + (h[..., 1] - h[..., 0].amax(0)).exp()

    trace, _ = output_of(Scored(function))
    assert not any(isinstance(node.op, Region) for node in trace.graph.nodes)


def test_a_contraction_between_ends_it():
    def function(h, y):
        p = h[..., 0].exp()
        return (p.T @ y) / (p.sum(0)[:, None])

    trace, _ = output_of(Scored(function))
    assert not any(isinstance(node.op, Region) for node in trace.graph.nodes)
