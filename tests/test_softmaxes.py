"""Softmaxes that are written out are softmaxes; the model itself is the judge of what they are the same as."""

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.capture import capture
from gainstage.graph import real_parameters
from gainstage.propagate.execution import Execution
from gainstage.signal import independent, reshape, softmax
from gainstage.signal.sampling import draw

WIDTH, KEYS, SPREAD = 64, 32, 3.0  # logits of so large a variance that exponentials and their sum are far from independent


class Attention(nn.Module):
    """Queries and keys, and something that is done with their products."""

    def __init__(self, function):
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.function = function

    def forward(self, x):
        return self.function(self.query(x) @ self.key(x).transpose(1, 2) / WIDTH**0.5, x)


def below_the_largest(logits):
    return torch.exp(logits - logits.amax(-1, keepdim=True))


def over_their_sum(logits, x):
    exponentials = below_the_largest(logits)
    return exponentials / exponentials.sum(-1, keepdim=True)


def over_their_sum_kept_from_zero(logits, x):
    exponentials = torch.exp(logits - logits.max(-1)[0].detach()[..., None])
    return exponentials / (exponentials.sum(-1, keepdim=True).expand_as(logits) + 1e-9)


def below_the_largest_of_all(logits, x):
    exponentials = torch.exp(logits - logits.max())
    return exponentials / exponentials.sum(-1).unsqueeze(-1).clamp(min=1e-12)


def along_queries(logits, x):
    exponentials = logits.exp()
    return exponentials / exponentials.sum(1, keepdim=True)


def of_a_logarithm(logits, x):
    return (logits - torch.logsumexp(logits, -1, keepdim=True)).exp()


def divided_at_last(logits, x):
    exponentials = below_the_largest(logits)
    return exponentials @ x / exponentials.sum(-1, keepdim=True)


def logarithm(logits, x):
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def logarithm_of_it(logits, x):
    return over_their_sum(logits, x).log()


def logarithm_of_the_sum(logits, x):
    largest = logits.amax(-1)
    return torch.exp(logits - largest[..., None]).sum(-1).log() + largest


WRITTEN = {
    over_their_sum: "softmax",
    over_their_sum_kept_from_zero: "softmax",
    below_the_largest_of_all: "softmax",
    along_queries: "softmax",
    of_a_logarithm: "softmax",
    divided_at_last: "softmax",
    logarithm: "log_softmax",
    logarithm_of_it: "log_softmax",
    logarithm_of_the_sum: "logsumexp",
}


def drawn(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=SPREAD**0.5 / WIDTH**0.5)
    return torch.randn(8, KEYS, WIDTH)


@pytest.mark.parametrize("function", WRITTEN)
def test_what_is_written_out_is_named_and_predicted(function):
    model = Attention(function)
    trace = gs.inspect(model, (drawn(model, 0),), gradients=False)
    assert WRITTEN[function] in [node.short_name for node in trace.graph.nodes]
    assert "exp" not in [node.short_name for node in trace.graph.nodes]
    with torch.no_grad():
        found = [model(drawn(model, seed)).square().mean() for seed in range(24)]
    # A softmax of products of normals, which are not quite normal, is 4 % off; what is averaged by it a little more.
    assert trace.nodes[trace.graph.outputs[0]].second_moment == pytest.approx(torch.stack(found).mean().item(), rel=0.09)


def square_over_the_other_sum(logits, x):
    exponentials = logits[:, :, :KEYS].exp()
    return exponentials / exponentials.sum(1)[..., None]


def below_what_differs_along_keys(logits, x):
    exponentials = (logits - logits.amax(1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def over_more_than_their_sum(logits, x):
    exponentials = below_the_largest(logits)
    return exponentials / (exponentials.sum(-1, keepdim=True) + 1.0)


def less_another_largest(logits, x):
    return below_the_largest(logits).sum(-1).log() + logits.amax(1)


@pytest.mark.parametrize(
    "function",
    [*WRITTEN, square_over_the_other_sum, below_what_differs_along_keys, over_more_than_their_sum, less_another_largest],
)
def test_the_graph_computes_what_the_model_computes(function):
    model = Attention(function)
    x = drawn(model, 0)
    graph = capture(model, (x,))
    with torch.no_grad():
        *_, (_, result) = Execution(graph, real_parameters(model), ()).run()
        torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-6)


SEEN = torch.tril(torch.ones(KEYS, KEYS))
MASKS = {
    "a number is taken off": lambda logits: logits * SEEN - 1e4 * (1 - SEEN),
    "a number is added, the mask is in front": lambda logits: 1e4 * (SEEN - 1) + SEEN * logits,
}


@pytest.mark.parametrize("way", MASKS)
def test_masks_that_are_written_out_are_masks(way):
    model, filled = (Attention(lambda logits, x, mask=mask: mask(logits).softmax(-1) @ x) for mask in (
        MASKS[way], lambda logits: logits.masked_fill(SEEN == 0, -1e4),
    ))  # fmt: skip
    x = drawn(model, 0)
    graph = capture(model, (x,))
    assert "masked_fill" in {node.short_name for node in graph.nodes}
    with torch.no_grad():
        *_, (_, result) = Execution(graph, real_parameters(model), ()).run()
        torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-6)
    plan, other = gs.plan(model, (x,)), gs.plan(filled, (x,))
    assert plan.parameters["query.weight"].distribution.std == pytest.approx(other.parameters["query.weight"].distribution.std)
    assert plan.predictions["@0"][0] == pytest.approx(other.predictions["@0"][0])


@pytest.mark.parametrize("added", [SEEN, 1e4 * (SEEN - 2), torch.arange(KEYS * KEYS).view(KEYS, KEYS) * (SEEN - 1)])
def test_what_is_no_mask_is_left_as_it_is(added):
    graph = capture(Attention(lambda logits, x: (logits * SEEN + added).softmax(-1) @ x), (torch.randn(8, KEYS, WIDTH),))
    assert "masked_fill" not in {node.short_name for node in graph.nodes}


def test_projections_behind_it_are_queries_and_keys():
    model = Attention(over_their_sum)
    plan = gs.plan(model, (drawn(model, 0),))
    assert {plan.parameters[name].role for name in ("query.weight", "key.weight")} == {"query", "key"}


def test_a_view_of_shares_is_sampled_in_its_own_shape() -> None:
    shares = reshape(softmax(independent((4, 6), 0.0, 1.0), 1), (24,))
    (sample,) = draw([shares], np.random.default_rng(0))
    torch.testing.assert_close(sample.view(4, 6).sum(1), torch.ones(4, dtype=torch.float64))
