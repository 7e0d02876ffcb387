"""Picks by integers that depend on data are of one draw with what these were computed from; draws of the model are the judge."""

import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.capture.regions.region import in_order
from gainstage.graph import Node, NodeKind, Ref, Region

WIDTH, BINS, DRAWS = 32, 5, 64  # of so many inputs a sum hardly depends on any one


class Picking(nn.Module):
    """A linear layer, and something that is done with what it puts out and with its input."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH * BINS, bias=False)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x).unflatten(-1, (WIDTH, BINS)), x)


def picked_largest(h, x):
    return h.gather(-1, h.argmax(-1, keepdim=True))


def place_in_bin(h, x):
    edges = 2.5 * (2 * nn.functional.pad(h.softmax(-1).cumsum(-1), (1, 0)) - 1)
    k = (edges < x[..., None]).sum(-1) - 1
    inside = (k >= 0) & (k < BINS)
    k = k % BINS
    low, high = (edges.gather(-1, (k + i)[..., None])[..., 0] for i in (0, 1))
    return torch.where(inside, (x - low) / (high - low), 0.5)


def weights_of_the_two_largest(h, x):
    score = (h + 0.5).sigmoid()
    chosen = score.topk(2, dim=-1).indices
    weights = score.gather(-1, chosen)
    return torch.zeros_like(score).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))


def largest_where_inside(h, x):
    inside = x.abs() < 1.5
    result = torch.zeros_like(x)
    result[~inside] = x[~inside]
    picked = h[inside]
    picked[:, 0] = 0.2
    result[inside] = picked.gather(-1, picked.argmax(-1, keepdim=True))[:, 0]
    return result


def centred_by_the_largest(h, x):
    return h - h.gather(-1, h.argmax(-1, keepdim=True))


def logarithm_of_the_chance_of_what_was_drawn(h, x):
    chances = (4.0 * h).log_softmax(-1)
    drawn = chances.exp().flatten(0, -2).multinomial(1)
    return chances.gather(-1, drawn.reshape(*chances.shape[:-1], 1))


PICKS = [
    picked_largest,
    place_in_bin,
    weights_of_the_two_largest,
    largest_where_inside,
    centred_by_the_largest,
    logarithm_of_the_chance_of_what_was_drawn,
]


def compared(function):
    torch.manual_seed(0)
    model = Picking(function)
    x = torch.randn(64, WIDTH)
    trace = gs.inspect(model, (x,), gradients=False)
    found = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        model.linear.reset_parameters()
        with torch.no_grad():
            found.append(model(torch.randn(64, WIDTH)))
    return trace, torch.stack(found)


@pytest.mark.parametrize("function", PICKS)
def test_moments_are_those_of_draws(function):
    trace, found = compared(function)
    signal = trace.nodes[trace.graph.outputs[0]]
    assert signal.mean == pytest.approx(found.mean().item(), rel=0.03)
    assert signal.second_moment == pytest.approx(found.square().mean().item(), rel=0.05)
    assert any(isinstance(trace.graph.by_name[name].op, Region) for name in trace.sampled)


def test_a_single_entry_stands_for_as_many_as_there_are():
    """What a condition holds for once, torch writes as a number."""
    torch.manual_seed(0)
    model = Picking(largest_where_inside)
    x = torch.randn(64, WIDTH).clamp(-1.4, 1.4)
    x[3, 5] = 1.6
    trace = gs.inspect(model, (x,), gradients=False)
    assert any(isinstance(trace.graph.by_name[name].op, Region) for name in trace.sampled)
    found = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        model.linear.reset_parameters()
        found.append(model(x).detach().square().mean().item())
    assert trace.modules[""][0].second_moment == pytest.approx(sum(found) / DRAWS, rel=0.05)


def test_a_place_in_a_bin_lies_between_its_edges():
    trace, _ = compared(place_in_bin)
    values = trace.nodes[trace.graph.outputs[0]].value.marginal.values
    assert values.min() >= 0.0
    assert values.max() <= 1.0


def regions_of(model, *args):
    return [node for node in gs.inspect(model, args, gradients=False).graph.nodes if isinstance(node.op, Region)]


def test_rows_for_experts_are_looked_up():
    """What goes to an expert does not depend on the router's weights: a contraction lies between."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.expert = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.expert(x[self.router(x)[:, 0].argsort()])

    assert regions_of(Routed(), torch.randn(32, WIDTH)) == []


def test_a_contraction_ends_a_region():
    """The second layer's bins depend on the first layer's result through a contraction: two regions, the first an operand."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Picking(place_in_bin), Picking(place_in_bin)])

        def forward(self, x):
            first = self.layers[0](x)
            return first + self.layers[1](first)

    found = regions_of(Two(), torch.randn(32, WIDTH))
    assert len(found) == 2
    assert set(found[0].op.results) & set(found[1].op.operands)


def test_operands_that_are_computed_from_one_another_are_of_one_draw():
    """Couplings write what they keep of a signal, and then what they pick, into one tensor; the next one reads both again."""

    class Coupling(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.kept, self.moved = torch.arange(first, WIDTH, 2), torch.arange(1 - first, WIDTH, 2)
            self.linear = nn.Linear(WIDTH // 2, WIDTH // 2 * BINS)

        def forward(self, x):
            kept, moved = x[:, self.kept], x[:, self.moved]
            result = torch.empty_like(x)
            result[:, self.kept] = kept
            place = place_in_bin(self.linear(kept).unflatten(-1, (WIDTH // 2, BINS)), moved)
            result[:, self.moved] = moved + 0.2 * (place - 0.5)
            return result

    torch.manual_seed(0)
    x = torch.randn(64, WIDTH)
    model = nn.Sequential(*(Coupling(i % 2) for i in range(3)))
    trace = gs.inspect(model, (x,), gradients=False)
    regions = [node for node in trace.graph.nodes if isinstance(node.op, Region)]
    assert len(regions) == 3
    found = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        for layer in model:
            layer.linear.reset_parameters()
        x = torch.randn(64, WIDTH)
        found.append([h.square().mean().item() for h in (model[0](x), model[:2](x), model(x))])
    for layer, measured in enumerate(torch.tensor(found).mean(0).tolist()):
        assert trace.modules[str(layer)][0].second_moment == pytest.approx(measured, rel=0.03)


def test_what_is_computed_without_integers_keeps_its_rule():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            h = self.linear(x).tanh()
            return h.gather(-1, h.argmax(-1, keepdim=True)), h

    model = Shared()
    trace = gs.inspect(model, (torch.randn(32, WIDTH),), gradients=False)
    assert trace.graph.outputs[1] not in trace.sampled
    assert trace.graph.outputs[0] in trace.sampled


def by_passes(nodes):
    """What is ready, again and again in the order given."""
    found, known, waiting = [], set(), list(nodes)
    while waiting:
        for node in list(waiting):
            if known.issuperset(node.operands()):
                found.append(node)
                known.add(node.name)
                waiting.remove(node)
    return found


def test_shuffled_nodes_are_put_in_order_as_by_going_through_them_again_and_again():
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        read = [torch.randint(i, (2,), generator=draw).tolist() if i else [] for i in range(30)]
        operands = [tuple(Ref(f"{j}") for j in names) for names in read]
        made = [Node(name=f"{i}", kind=NodeKind.OP, op=torch.add, args=refs) for i, refs in enumerate(operands)]
        nodes = [made[i] for i in torch.randperm(30, generator=draw)]
        assert [node.name for node in in_order(nodes)] == [node.name for node in by_passes(nodes)]


def test_what_is_made_of_an_operand_beside_the_region_is_of_its_draw():
    """Neighbours of points less the points themselves: these are spread out by operations that no pick depends on."""

    class Edges(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, BINS, bias=False)

        def forward(self, x):
            points = self.linear(x)
            near = (-torch.cdist(points, points)).topk(3, -1).indices
            spread = points[:, None].expand(-1, x.shape[1], -1, -1)
            neighbours = spread.gather(2, near[..., None].expand(-1, -1, -1, BINS))
            return neighbours - points[:, :, None].expand(-1, -1, 3, -1)

    model, found = Edges(), []
    trace = gs.inspect(model, (torch.randn(4, 16, WIDTH),), gradients=False)
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        model.linear.reset_parameters()
        with torch.no_grad():
            found.append(model(torch.randn(4, 16, WIDTH)).square().mean())
    expected = torch.stack(found).mean().item()
    assert trace.nodes[trace.graph.outputs[0]].second_moment == pytest.approx(expected, rel=0.1)
