"""Values that share an ancestor: tied and repeated weights, parts of one tensor, norms by hand, parametrizations."""

from __future__ import annotations

from collections.abc import Callable
from math import comb

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import gainstage as gs
from gainstage.graph import FOLLOWED, tensor_leaves

WIDTH, BATCH, LENGTH = 128, 16, 6


class Scripted(nn.Module):
    """A module whose forward is a function of itself and one input; every step that it names is a module call."""

    def __init__(self, forward: Callable[..., torch.Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.m = nn.ModuleList(modules)
        self.function = forward

    def forward(self, x):
        return self.function(self.m, x)


def linear(inputs: int = WIDTH, outputs: int = WIDTH, **options) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, **options)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def rows() -> torch.Tensor:
    return torch.randn(BATCH * LENGTH, WIDTH)


def tokens() -> torch.Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH)


def attention(m, x):
    q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in m[0](x).chunk(3, -1))
    weights = (q @ k.transpose(-2, -1) / (WIDTH / 4) ** 0.5).softmax(-1)
    return m[1]((weights @ v).transpose(1, 2).flatten(2))


def shared_block(m, x):
    for _ in range(4):
        x = x + attention(m[1:3], m[0](x))
        x = x + m[5](F.gelu(m[4](m[3](x))))
    return x


def universal(m, x):
    times = torch.linspace(-1, 1, WIDTH)
    for step in range(4):
        x = m[0](x + torch.sin(times * (step + 1)))
    return m[1](x)


def timed(m, x):
    """Slopes at two times, by one network that reads the time, as integrators of differential equations ask for them."""
    slopes = []
    for time in (0.0, 0.5):
        slopes.append(m[1](torch.tanh(m[0](torch.cat([x + time * sum(slopes), torch.full_like(x[:, :1], time)], -1)))))
    return m[2](slopes[0] + 2.0 * slopes[1])


def shared_steps(m, x):
    for _ in range(6):
        x = m[2](x + m[1](F.gelu(m[0](x))))
    return x


def shared_maps(m, x):
    for _ in range(4):
        x = m[2](F.relu(x + m[1](F.relu(m[0](x)))))
    return x


def there_and_back(activation, transposed):
    """A decoder with the encoder's weights; how far it is from the input."""

    def forward(m, x):
        y = m[1](F.linear(activation(m[0](x)), transposed(m[0].weight)))
        return m[1](y - x)

    return forward


def columns_there_and_back(m, x):
    return m[1](x - m[1](m[0].weight.T @ torch.tanh(m[0].weight @ x + m[0].bias[:, None])))


def deep_there_and_back(m, x):
    h = m[2](F.relu(m[1](F.relu(m[0](x)))))
    return m[2](F.linear(m[2](F.relu(F.linear(h, m[1].weight.t()))), m[0].weight.t()))


def maps_there_and_back(m, x):
    return m[1](F.conv_transpose2d(F.relu(m[0](x)), m[0].weight, padding=1))


def sparse_code(m, x):
    """Iterated soft thresholding: each step goes through the dictionary and back."""
    dictionary = m[0].weight
    z = 0.0 * (x @ dictionary.t())
    for _ in range(3):
        z = m[1](F.softshrink(z + 0.5 * F.linear(m[1](x - z @ dictionary), dictionary), 0.1))
    return z


def one_head_for_two(m, x):
    h = m[0](x)
    return m[2](m[1](torch.tanh(h)) + m[1](F.relu(h)))


def injected(m, x):
    z = torch.zeros_like(x)
    for _ in range(5):
        z = m[2](m[3](x + m[1](F.relu(m[0](z + x)))))
    return z


def cells(m, x):
    h = torch.zeros(x.shape[0], WIDTH)
    for step in range(LENGTH):
        h = m[0](x[:, step], h)
    return m[1](h)


def lstm_cells(m, x):
    state = torch.zeros(x.shape[0], WIDTH), torch.zeros(x.shape[0], WIDTH)
    for step in range(LENGTH):
        state = m[0](x[:, step], state)
    return m[1](state[0])


def gate(m, x):
    a, b = m[0](x).chunk(2, -1)
    return m[1](a * torch.sigmoid(b))


def dense(m, x):
    for layer in list(m)[:-1]:
        x = torch.cat([x, F.relu(layer(x))], -1)
    return m[-1](x)


def rectified_branches(m, x):
    for layer in m:
        x = x + F.relu(layer(x))
    return x


def less_terms(m, x):
    """Token mixers of parallel branches less their input, as reparametrised networks have them; x is a sum in turn."""
    for branch in m[1:4]:
        mixed = 0.6 * m[0](x) + branch(x)
        x = m[4](x + 0.7 * m[4](mixed - m[0](x)))
    return x


def by_hand(m, x):
    h = m[0](x)
    return m[1](h * torch.sigmoid(h))


def layer_norm(m, x):
    h = F.relu(m[0](x))
    centred = h - h.mean(-1, keepdim=True)
    return m[1](centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5))


def rms_norm(m, x):
    h = F.relu(m[0](x))
    return m[1](h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def adapted(m, x):
    return m[3](F.relu(m[0](x) + 2.0 * m[2](m[1](x))))


def dense_layers() -> list[nn.Linear]:
    return [linear(WIDTH, 32), linear(WIDTH + 32, 32), linear(WIDTH + 64, 32), linear(WIDTH + 96, WIDTH)]


def scripted(forward, modules: Callable[[], list[nn.Module]]) -> Callable[[], nn.Module]:
    return lambda: Scripted(forward, *modules())


def with_norm(parametrize) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(linear(), nn.ReLU(), parametrize(linear(WIDTH, 192)), nn.ReLU(), parametrize(linear(192, WIDTH)))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)


TOLERANCE = 0.03  # of the log second moment of a module output, beyond three standard errors of the mean over draws

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "RNN cells": (scripted(cells, lambda: [nn.RNNCell(WIDTH, WIDTH), linear()]), tokens),
    "GRU cells": (scripted(cells, lambda: [nn.GRUCell(WIDTH, WIDTH), linear()]), tokens),
    "LSTM cells": (scripted(lstm_cells, lambda: [nn.LSTMCell(WIDTH, WIDTH), linear()]), tokens),
    "fused queries, keys and values": (scripted(attention, lambda: [linear(WIDTH, 3 * WIDTH), linear()]), tokens),
    "gated linear unit": (scripted(lambda m, x: m[1](F.glu(m[0](x))), lambda: [linear(WIDTH, 2 * WIDTH), linear()]), rows),
    "gate by chunks": (scripted(gate, lambda: [linear(WIDTH, 2 * WIDTH), linear()]), rows),
    "dense skips": (scripted(dense, dense_layers), rows),
    "branches that end in an activation": (scripted(rectified_branches, lambda: [linear() for _ in range(6)]), rows),
    "sums less a term": (
        scripted(
            less_terms, lambda: [nn.LayerNorm(WIDTH, elementwise_affine=False), *(linear() for _ in range(3)), nn.Identity()]
        ),
        rows,
    ),
    "x sigmoid(x)": (scripted(by_hand, lambda: [linear(), linear()]), rows),
    "layer norm by hand": (scripted(layer_norm, lambda: [linear(), linear()]), rows),
    "RMS norm by hand": (scripted(rms_norm, lambda: [linear(), linear()]), rows),
    "weight norm": (with_norm(parametrizations.weight_norm), rows),
    "spectral norm": (with_norm(parametrizations.spectral_norm), rows),
    "orthogonal": (with_norm(parametrizations.orthogonal), rows),
    "low-rank adapter": (scripted(adapted, lambda: [linear(), linear(WIDTH, 16), linear(16, WIDTH), linear()]), rows),
    "low-rank factors": (lambda: nn.Sequential(linear(WIDTH, 16, bias=False), linear(16, WIDTH), nn.ReLU(), linear()), rows),
}
# Several uses of one weight.
MODELS |= {
    "ALBERT: one block, four times": (
        scripted(
            shared_block,
            lambda: [nn.LayerNorm(WIDTH), linear(WIDTH, 3 * WIDTH), linear(), nn.LayerNorm(WIDTH), linear(), linear()],
        ),
        tokens,
    ),
    "slopes at two times": (scripted(timed, lambda: [linear(WIDTH + 1), linear(), nn.Identity()]), rows),
    "universal transformer": (scripted(universal, lambda: [encoder_layer(), linear()]), tokens),
    "one residual branch, six times": (
        scripted(shared_steps, lambda: [nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Identity()]),
        rows,
    ),
    "one residual branch of convolutions": (
        scripted(shared_maps, lambda: [nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Identity()]),
        lambda: torch.randn(4, 32, 10, 10),
    ),
    "injected input": (
        scripted(
            injected, lambda: [nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Identity(), nn.LayerNorm(WIDTH)]
        ),
        rows,
    ),
    "one head on two functions": (scripted(one_head_for_two, lambda: [linear(), linear(), nn.Identity()]), rows),
    "tied autoencoder, ReLU": (
        scripted(there_and_back(F.relu, torch.t), lambda: [nn.Linear(WIDTH, 2 * WIDTH), nn.Identity()]),
        rows,
    ),
    "tied autoencoder, tanh": (
        scripted(there_and_back(torch.tanh, lambda w: w.mT), lambda: [nn.Linear(WIDTH, 2 * WIDTH), nn.Identity()]),
        rows,
    ),
    "tied autoencoder of columns": (
        scripted(columns_there_and_back, lambda: [nn.Linear(WIDTH, 2 * WIDTH), nn.Identity()]),
        lambda: torch.randn(WIDTH, BATCH),
    ),
    "tied autoencoder, two layers": (
        scripted(deep_there_and_back, lambda: [nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Identity()]),
        rows,
    ),
    "tied autoencoder of maps": (
        scripted(maps_there_and_back, lambda: [nn.Conv2d(16, 32, 3, padding=1), nn.Identity()]),
        lambda: torch.randn(4, 16, 12, 12),
    ),
    "sparse code": (scripted(sparse_code, lambda: [nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Identity()]), rows),
}


def drawn(build, source, plan: gs.Plan | None = None, draws: int = 24) -> dict[tuple[str, int], tuple[float, float]]:
    """Mean over draws of the mean square of each module output, and the standard error of its log."""
    found: dict[tuple[str, int], list[float]] = {}
    for seed in range(draws):
        torch.manual_seed(seed)
        model, calls = build(), {}
        if plan is not None:
            gs.apply(model, plan, seed=seed)

        def hook_for(path, calls=calls):
            def hook(_module, _args, output):
                calls[path] = calls.get(path, -1) + 1
                found.setdefault((path, calls[path]), []).append(float(tensor_leaves(output)[0].square().mean()))

            return hook

        for path, module in model.named_modules():
            module.register_forward_hook(hook_for(path))
        with torch.no_grad():
            model(source())
    return {key: (np.mean(values), np.std(values, ddof=1) / np.mean(values) / draws**0.5) for key, values in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_those_of_draws(name):
    build, source = MODELS[name]
    measured = drawn(build, source)
    predicted: dict[tuple[str, int], list[float]] = {}
    for seed in range(100, 104):  # the moments of small parameters stray
        torch.manual_seed(seed)
        trace = gs.inspect(build(), (source(),), gradients=False)
        for call in trace.calls:
            predicted.setdefault((call.path, call.call), []).append(call.outputs[0].second_moment)
    errors = {key: abs(np.log(np.mean(predicted[key]) / measured[key][0])) for key in predicted if key in measured}
    worst = {key: round(error, 3) for key, error in errors.items() if error > TOLERANCE + 3.0 * measured[key][1]}
    assert not worst, worst


def by_variance(h):
    return (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True, unbiased=False))


def by_squares(h):
    centred = h - h.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt()


def by_heads(h):
    """Of vectors of 16 entries, which have levels of their own."""
    h = torch.cat([h, 3.0 * h], 1).unflatten(-1, (-1, 16))
    return by_variance(h).flatten(-2)


@pytest.mark.parametrize("norm", [by_variance, by_squares, by_heads])
def test_what_a_norm_by_hand_leaves_has_mean_square_one(norm):
    trace = gs.inspect(Scripted(lambda m, x: norm(m[0](x)), linear()), (torch.randn(4, 6, WIDTH),), gradients=False)
    assert trace.nodes[trace.graph.outputs[0]].second_moment == pytest.approx(1.0, rel=1e-4)


def steps(count: int) -> nn.Module:
    """``x + w x`` over and over, with one w."""

    def forward(m, x):
        for _ in range(count):
            x = x + m[0](x)
        return x

    return Scripted(forward, linear(bias=False))


def relative_variance(model: nn.Module) -> float:
    """``n Var(w)`` of the square matrix of a model."""
    return float(model.m[0].weight.detach().double().square().mean()) * WIDTH


def test_a_linear_step_taken_several_times_grows_as_the_power_of_its_matrix():
    """``E|(1 + w)^k x|^2 = sum over j of C(k, j)^2 (n v)^j |x|^2``: different powers of w have nothing in common."""
    torch.manual_seed(0)  # noise, and taken for standard normal
    model = steps(FOLLOWED)
    q = relative_variance(model)
    trace = gs.inspect(model, (rows(),), gradients=False)
    found = [call.outputs[0].second_moment for call in trace.calls if call.path == "m.0"]
    exact = [q * sum(comb(k, j) ** 2 * q**j for j in range(k + 1)) for k in range(FOLLOWED)]
    np.testing.assert_allclose(found, exact, rtol=1e-5)  # 24 factors of single precision
    assert not trace.assumptions


def test_more_uses_than_are_followed_are_named_and_taken_to_be_independent():
    torch.manual_seed(0)
    model = steps(FOLLOWED + 1)
    trace = gs.inspect(model, (rows(),), gradients=False)
    assert trace.nodes[trace.graph.outputs[0]].second_moment == pytest.approx((1.0 + relative_variance(model)) ** (FOLLOWED + 1))
    (sentence,) = trace.assumptions
    assert sentence == f"Used more than {FOLLOWED} times, also on what it made, and taken to be independent of that: m.0.weight."


def test_descent_through_a_matrix_and_back_has_the_moments_of_marchenko_and_pastur():
    """``r <- (1 - a w' w) r``: ``E|r_k|^2`` is the mean of ``(1 - a t)^(2k)`` over eigenvalues t of w' w; moments: Narayana."""
    rate, rounds, rows_of_w = 0.5, 5, 2 * WIDTH

    def forward(m, x):
        z, found = F.linear(x, rate * m[0].weight), []
        for _ in range(rounds):
            found.append(x - F.linear(z, m[0].weight.t()))
            z = z + rate * m[0](found[-1])
        return found

    torch.manual_seed(0)
    model = Scripted(forward, nn.Linear(WIDTH, rows_of_w, bias=False))
    level, ratio = float(model.m[0].weight.detach().double().square().mean()) * rows_of_w, WIDTH / rows_of_w

    def moment(k: int) -> float:
        narayana = (ratio**r / (r + 1) * comb(k, r) * comb(k - 1, r) for r in range(k))
        return level**k * sum(narayana) if k else 1.0

    trace = gs.inspect(model, (rows(),), gradients=False)
    found = [trace.nodes[name].second_moment for name in trace.graph.outputs]
    exact = [sum(comb(2 * k, j) * (-rate) ** j * moment(j) for j in range(2 * k + 1)) for k in range(1, rounds + 1)]
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_a_plan_gives_shared_branches_their_share_of_the_sum():
    """What the uses have in common is in the demand: the stream of ``1 + N`` equal shares comes out as planned, over draws."""
    build, source = MODELS["one residual branch, six times"]
    torch.manual_seed(0)
    plan = gs.plan(build(), (source(),))
    predicted = {key: moments[0] for key, moments in plan.predictions.items() if moments}
    measured = {f"{path}@{call}": found for (path, call), found in drawn(build, source, plan).items()}
    assert {"@0", "m.0@5", "m.1@5"} <= predicted.keys()
    errors = {key: abs(np.log(predicted[key] / measured[key][0])) for key in predicted}
    assert {key: error for key, error in errors.items() if error > TOLERANCE + 3.0 * measured[key][1]} == {}


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"spectral norm"}))
def test_these_models_are_read_without_assumptions(name):
    build, source = MODELS[name]
    assert not gs.inspect(build(), (source(),), gradients=False).assumptions
