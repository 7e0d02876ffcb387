"""Operations of others: sampled as they are, ruled on request, and counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage import testing
from gainstage.api.operations import operations
from gainstage.report.ops import count_ops
from gainstage.rules.backward import backward

WIDTH = 128


@torch.library.custom_op("gainstage_tests::bent", mutates_args=())
def bent(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, 0.1 * x) + 0.2 * x.roll(1, -1)


@torch.library.custom_op("gainstage_tests::straight", mutates_args=())
def straight(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + x.abs())


for custom in (bent, straight):
    custom.register_fake(torch.empty_like)
bent.register_autograd(
    lambda ctx, g: g * torch.where(ctx.saved_tensors[0] > 0, 1.0, 0.1) + 0.2 * g.roll(-1, -1),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Between(nn.Module):
    """An operation between two linear layers."""

    def __init__(self, op) -> None:
        super().__init__()
        self.first, self.second, self.op = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), op

    def forward(self, x):
        return self.second(self.op(self.first(x)))


def x() -> torch.Tensor:
    return torch.randn(64, WIDTH)


def treatments(op) -> dict[str, str]:
    found = operations(Between(op), (x(),))
    return {row.op: row.treatment for row in count_ops(found.graph, found.sampled)}


def test_a_custom_operation_is_sampled_forward_and_backward_and_the_trace_says_so():
    torch.manual_seed(0)
    model = Between(bent)
    trace = gs.inspect(model, (x(),))
    assert [trace.graph.by_name[name].op_name for name in trace.sampled] == ["gainstage_tests.bent.default"]
    assert trace.sampled_backward == trace.sampled
    assert treatments(bent) == {"aten.linear.default": "ruled", "gainstage_tests.bent.default": "sampled"}
    outputs, gradients = [], []
    for seed in range(16):
        torch.manual_seed(seed)
        drawn = Between(bent)
        output = drawn(x())
        output.backward(torch.randn_like(output))
        outputs.append(float(output.detach().square().mean()))
        gradients.append(float(drawn.first.weight.grad.square().mean()))
    for predicted, measured in (
        (trace.modules[""][0].second_moment, outputs),
        (trace.parameters["first.weight"].gradient_second_moment, gradients),
    ):
        error = np.std(measured, ddof=1) / np.mean(measured) / len(measured) ** 0.5
        assert abs(np.log(predicted / np.mean(measured))) < 0.03 + 3.0 * error  # 3 %: one draw of the parameters' moments


def test_the_sampling_error_is_in_the_spread():
    model = Between(bent)
    narrow, wide = (gs.inspect(model, (torch.randn(rows, WIDTH),), gradients=False) for rows in (2, 512))
    strays = [trace.nodes[trace.sampled[0]].value.log_variance for trace in (narrow, wide)]
    assert strays[0] > strays[1] > 0.0


def test_five_lines_from_outside_give_a_rule_that_is_held_against_the_operation():
    assert treatments(straight)["gainstage_tests.straight.default"] == "sampled"
    op = torch.ops.gainstage_tests.straight.default
    gs.rules.pointwise(op)
    case = testing.RuleCase(op=op, args=(testing.correlated((4, 6, 5), mean=0.3, shares={(0, 1): 0.2, (2,): 0.1}),))
    assert testing.assert_rule(case).ok
    assert treatments(straight)["gainstage_tests.straight.default"] == "ruled"
    assert not gs.inspect(Between(straight), (x(),), gradients=False).sampled
    with pytest.raises(gs.RuleError, match="has a rule already"):
        gs.rules.pointwise(op)


def test_integers_among_numbers_count_as_numbers():
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) * torch.arange(WIDTH) + (x > 0)

    trace = gs.inspect(Shifted(WIDTH, WIDTH), (x(),), gradients=False)
    expected = float(torch.arange(WIDTH).double().square().mean()) * 2 / 3 + 0.5  # E[w x + b]^2 is 1/3 + 1/3/128 by default
    assert trace.modules[""][0].second_moment == pytest.approx(expected / 2, rel=0.06)


class Places(nn.Linear):
    """A mask that becomes a number by the type of a tensor, and a condition on data into which places are written."""

    def forward(self, x):
        h, mask = super().forward(x), torch.arange(WIDTH) > 31
        loud = h.abs() > 0.1
        loud[torch.where(loud.sum(-1) == WIDTH)] = False
        return torch.where(loud, h * (1 - mask.type_as(h)), 0.0)


def test_masks_are_numbers_where_the_model_has_them_as_numbers_and_conditions_stay_conditions():
    torch.manual_seed(0)
    model, given = Places(WIDTH, WIDTH), x()
    measured = float(model(given).detach().square().mean())
    assert gs.inspect(model, (given,), gradients=False).modules[""][0].second_moment == pytest.approx(measured, rel=0.1)


def test_picks_of_nothing_change_nothing():
    class Nothing(nn.Linear):
        def forward(self, x):
            h, none = super().forward(x), torch.arange(0)
            return h.index_put((none,), torch.tanh(h[none]))

    trace = gs.inspect(Nothing(WIDTH, WIDTH), (x(),))
    before = next(signal for name, signal in trace.nodes.items() if name.startswith("linear"))
    assert not trace.sampled
    assert trace.modules[""][0].second_moment == before.second_moment


@torch.library.custom_op("gainstage_tests::half", mutates_args=())
def half(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x


half.register_fake(torch.empty_like)
half.register_autograd(lambda ctx, g: 0.5 * g)


@gs.rules.rule(torch.ops.gainstage_tests.half.default)
def broken(call, x):
    """A rule with a mistake in it."""
    return x / 2


def test_a_rule_that_fails_leaves_its_node_to_sampling_and_the_trace_says_so():
    torch.manual_seed(0)
    model = Between(half)
    trace = gs.inspect(model, (x(),), gradients=False)
    assert [trace.graph.by_name[name].op_name for name in trace.sampled] == ["gainstage_tests.half.default"]
    before, after = (trace.modules["first"][0].second_moment, trace.nodes[trace.sampled[0]].second_moment)
    assert after == pytest.approx(before / 4, rel=0.01)  # 32 draws of 8192 entries
    assert treatments(half)["gainstage_tests.half.default"] == "sampled"
    for remarks in (trace.assumptions, gs.plan(model, (x(),)).notes, operations(model, (x(),)).remarks):
        (sentence,) = [remark for remark in remarks if "half" in remark]
        assert "a mistake of the rule (test_operations.broken: TypeError: unsupported operand type(s) for /" in sentence
    with pytest.raises(TypeError):  # held against the operation, the mistake comes out
        testing.assert_rule(testing.RuleCase(op=torch.ops.gainstage_tests.half.default, args=(testing.entries(4, 6),)))


@torch.library.custom_op("gainstage_tests::third", mutates_args=())
def third(x: torch.Tensor) -> torch.Tensor:
    return x / 3.0


third.register_fake(torch.empty_like)
third.register_autograd(lambda ctx, g: g / 3.0)
gs.rules.pointwise(torch.ops.gainstage_tests.third.default)


@backward(torch.ops.gainstage_tests.third.default)
def broken_backwards(call, g, x):
    """A backward rule with a mistake in it."""
    return (g / 3,)


def test_a_backward_rule_that_fails_is_named_as_well():
    trace = gs.inspect(Between(third), (x(),))
    assert not trace.sampled
    assert [trace.graph.by_name[name].op_name for name in trace.sampled_backward] == ["gainstage_tests.third.default"]
    (sentence,) = [remark for remark in trace.assumptions if "third" in remark]
    assert "a mistake of the rule (test_operations.broken_backwards: TypeError" in sentence


def assert_level_over_draws(trace, make, length):
    """The second moment of the whole is that over draws of the model and of its sequences."""
    found = []
    for seed in range(32):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(float(make()(torch.randn(8, length, WIDTH)).square().mean()))
    error = np.std(found) / np.mean(found) / len(found) ** 0.5
    assert abs(np.log(trace.modules[""][0].second_moment / np.mean(found))) < 0.03 + 3.0 * error  # 3 %: 32 samples


class Decays(nn.Module):
    """Weights of earlier positions decay by what lies between them: exponentials of differences of running sums."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.value = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("speed", -torch.arange(1.0, 5.0))

    def forward(self, x):
        steps = (self.speed * nn.functional.softplus(self.rate(x))).transpose(1, 2)  # [batch, head, position]
        sums = steps.cumsum(-1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        weights = (sums[..., :, None] - sums[..., None, :]).masked_fill(~mask, -torch.inf).exp()
        left = (sums[..., -1:] - sums).exp()
        values = self.value(x).unflatten(-1, (4, -1)).transpose(1, 2)
        return torch.cat([weights @ values, left[..., None] * values], -1)


def test_decays_of_running_sums_are_one_operation_that_never_grows():
    torch.manual_seed(0)
    sequences = torch.randn(8, 24, WIDTH)
    trace = gs.inspect(Decays(), (sequences,), gradients=False)
    assert [trace.graph.by_name[name].short_name for name in trace.sampled] == ["cumsum..exp"]
    assert_level_over_draws(trace, Decays, 24)


class RunningAverage(nn.Module):
    """Averages of values so far, weighted by exponentials of keys that a running maximum keeps from growing (RWKV)."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.decay = nn.Parameter(torch.zeros(WIDTH))
        nn.init.normal_(self.key.weight, std=1.5 * WIDTH**-0.5)

    def forward(self, x):
        keys, values = self.key(x), self.value(x)
        found, highest = torch.zeros_like(keys), torch.zeros_like(keys[:, 0]) - 1e38
        total = norm = torch.zeros_like(keys[:, 0])
        for t in range(x.shape[1]):
            raised = torch.maximum(highest - self.decay.exp(), keys[:, t])
            old, new = torch.exp(highest - self.decay.exp() - raised), torch.exp(keys[:, t] - raised)
            total, norm, highest = old * total + new * values[:, t], old * norm + new, raised
            found[:, t] = total / norm
        return self.out(found)


def test_what_a_running_maximum_keeps_from_growing_is_one_operation_with_the_averages_made_of_it():
    torch.manual_seed(0)
    trace = gs.inspect(RunningAverage(), (torch.randn(8, 12, WIDTH),), gradients=False)
    assert len(trace.sampled) == 1
    assert_level_over_draws(trace, RunningAverage, 12)


class Hashed(nn.Module):
    """Features of points from a table, by a hash of the corners of their cells (T. Müller et al. 2022, arXiv:2201.05989)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(256, 8), nn.Linear(8, WIDTH)

    def forward(self, points):
        cells, found = (8 * points).floor(), 0.0
        for corner in range(2):
            weight = (8 * points - cells) if corner else 1.0 - (8 * points - cells)
            places = cells.long() + corner
            found = found + self.table((places[:, 0] ^ places[:, 1] * 2654435761) % 256) * weight.prod(-1, keepdim=True)
        return self.out(found)


def test_bits_of_integers_that_depend_on_data():
    torch.manual_seed(0)
    model, points = Hashed(), torch.rand(512, 2)
    trace = gs.inspect(model, (points,), gradients=False)
    measured = []
    for seed in range(16):
        torch.manual_seed(seed)
        with torch.no_grad():
            measured.append(Hashed()(points).square().mean().item())
    assert trace.modules[""][0].second_moment == pytest.approx(sum(measured) / 16, rel=0.1)


class GaussianProcess(nn.Module):
    """Minus the log-likelihood of targets, under a kernel of learned features."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.noise = nn.Linear(64, 4), nn.Parameter(torch.tensor(-2.0))

    def forward(self, x, y):
        z = self.features(x)
        kernel = torch.exp(-0.5 * torch.cdist(z, z).square())
        root = torch.linalg.cholesky(kernel + self.noise.exp() * torch.eye(len(x)))
        return 0.5 * (y * torch.cholesky_solve(y, root)).sum(0) + root.diagonal().log().sum()


def test_factors_of_a_matrix_are_one_operation_with_what_makes_it_and_what_is_made_of_them():
    torch.manual_seed(0)
    trace = gs.inspect(GaussianProcess(), (torch.randn(24, 64), torch.randn(24, 1)), gradients=False)
    assert len(trace.sampled) == 1
    measured = []
    for seed in range(64):
        torch.manual_seed(seed)
        with torch.no_grad():
            measured.append(GaussianProcess()(torch.randn(24, 64), torch.randn(24, 1)).square().item())
    assert trace.modules[""][0].second_moment == pytest.approx(sum(measured) / 64, rel=0.25)  # 8 % is the error of 64


class GraphNetwork(nn.Module):
    """Sums over neighbours, divided by the root of their number; by ``index_add`` or by ``scatter_add``."""

    def __init__(self, *, scatters):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 128), nn.Linear(128, 128), nn.Linear(128, 128)])
        self.scatters = scatters

    def forward(self, x, edges):
        degree = torch.bincount(edges[1], minlength=len(x)).clamp(min=1)[:, None]
        for layer in self.layers:
            messages = layer(x)[edges[0]]
            nothing = torch.zeros(len(x), messages.shape[1])
            if self.scatters:
                summed = nothing.scatter_add(0, edges[1][:, None].expand_as(messages), messages)
            else:
                summed = nothing.index_add(0, edges[1], messages)
            x = torch.relu(summed / degree.sqrt())
        return x


@pytest.mark.parametrize("scatters", [True, False])
def test_graph_networks(scatters):
    """Nodes with many neighbours have louder sums, which the division makes equal again."""
    torch.manual_seed(0)
    edges = torch.randint(100, (2, 600))
    model = GraphNetwork(scatters=scatters)
    plan = gs.plan(model, (torch.randn(100, 32), edges))
    measured = []
    for seed in range(32):
        gs.apply(model, plan, seed=seed)
        torch.manual_seed(seed)
        measured.append(float(model(torch.randn(100, 32), edges).detach().square().mean()))
    assert not gs.inspect(model, (torch.randn(100, 32), edges), gradients=False).sampled
    error = float(np.std(measured)) / np.mean(measured) / 32**0.5
    assert plan.predictions["@0"][0] == pytest.approx(np.mean(measured), rel=3.0 * error)
    assert error < 0.06


class Spectral(nn.Module):
    """The lowest frequencies multiplied by a weight, as in a Fourier neural operator (Li et al. 2021, arXiv:2010.08895)."""

    def __init__(self, select):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 8, dtype=torch.complex64) / 4)
        self.select = select

    def forward(self, x):
        whole = torch.fft.rfft(x)
        made = torch.zeros_like(whole)
        if self.select:
            made[..., 1] = torch.einsum("bi,io->bo", whole[..., 1], self.weight[..., 0])
        else:
            made[..., :8] = torch.einsum("bim,iom->bom", whole[..., :8], self.weight)
        return torch.fft.irfft(made, n=x.shape[-1])


@pytest.mark.parametrize("select", [False, True])
def test_gradients_pass_what_is_written_into_complex_tensors(select):
    """Autograd refuses slice_scatter and select_scatter of complex numbers, but not the writes that they are made of."""
    torch.manual_seed(0)
    trace = gs.inspect(nn.Sequential(nn.Conv1d(2, 4, 1), Spectral(select)), (torch.randn(8, 2, 64),))
    assert trace.parameters["0.weight"].gradient_second_moment > 0.0
