"""Depth without norms and skips: the conditions that tailored activations meet, the change itself, and that it trains."""

import copy
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.integrate import quad
from torch import nn

import gainstage as gs
from gainstage.cli import main
from gainstage.errors import InputError, PlanFormatError, PlanMismatchError
from gainstage.policies import find_policy
from gainstage.signal import affine, apply, independent, overlap, stray
from gainstage.signal.tailoring import leaky_cosine, tailored_slope, tailored_smooth

SMOOTH = {
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "mish": nn.functional.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": nn.functional.softplus,
}


def gaussian_mean(f):
    return quad(lambda z: f(z) * math.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi), -12.0, 12.0, limit=200)[0]


def derivatives(f, t):
    """g, g' and g'' of ``gamma f(alpha z + beta) + delta`` at a number, by autograd."""

    def at(z):
        x = torch.tensor(float(z), dtype=torch.float64, requires_grad=True)
        y = t.gamma * f(t.alpha * x + t.beta) + t.delta
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first, x)
        return float(y.detach()), float(first.detach()), float(second)

    return at


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_meet_the_four_conditions(name):
    """Zhang et al. 2022, arXiv:2203.08120: E[g^2] = 1, E[g g' z] = 1, E[g'^2] = 1, E[g''^2] = curvature."""
    found = tailored_smooth(SMOOTH[name], 0.003)
    assert found is not None
    at = derivatives(SMOOTH[name], found)
    assert gaussian_mean(lambda z: at(z)[0] ** 2) == pytest.approx(1.0, abs=1e-6)
    assert gaussian_mean(lambda z: at(z)[0] * at(z)[1] * z) == pytest.approx(1.0, abs=1e-5)  # the solver's tolerance
    assert gaussian_mean(lambda z: at(z)[1] ** 2) == pytest.approx(1.0, abs=1e-6)
    assert gaussian_mean(lambda z: at(z)[2] ** 2) == pytest.approx(0.003, rel=1e-5)


def test_what_is_linear_cannot_be_bent():
    assert tailored_smooth(lambda x: 2.0 * x, 0.003) is None


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.9])
def test_the_map_of_a_leaky_relu_is_its_correlation(slope):
    """By quadrature over the angle: (x, y) = r (cos t, sin t)-like pairs of correlation c, E over a wide sample of pairs."""
    generator = np.random.default_rng(0)
    z, e = generator.standard_normal((2, 2_000_000))
    for c in (-0.5, 0.0, 0.6, 0.95):
        u, v = z, c * z + math.sqrt(1.0 - c * c) * e
        f, g = (np.where(t > 0.0, t, slope * t) for t in (u, v))
        # Products of unit second moment stray by at most sqrt(5), so their mean by 1.6e-3: four deviations.
        assert leaky_cosine(slope, c) == pytest.approx((f * g).mean() / (f * f).mean(), abs=7e-3)


def test_a_slope_takes_a_chain_to_its_target():
    def network(local):
        c = 0.0
        for _ in range(50):
            c = local(c)
        return c

    slope = tailored_slope(network, 0.9, 0.0)
    assert network(lambda c: leaky_cosine(slope, c)) == pytest.approx(0.9, abs=1e-6)
    assert network(lambda c: leaky_cosine(0.0, c)) > 0.98


def test_a_shift_that_is_taken_back_leaves_what_strays():
    x = apply(torch.relu, independent((8, 16), 0.0, 1.0, stray=stray.of(0.3), overlap=overlap.independent(0.2)))
    there = affine(x, 2.0, 5.0)
    # d log E[(2 s relu + 5)^2] / d log s^2 = (4 E[r^2] + 20 E[r] / 2) / (4 E[r^2] + 20 E[r] + 25), by a step of 5 %.
    mean = 1.0 / math.sqrt(2.0 * math.pi)
    assert there.log_variance == pytest.approx(0.3 * ((2.0 + 10.0 * mean) / (27.0 + 20.0 * mean)) ** 2, rel=0.06)
    back = affine(there, 0.5, -2.5)
    assert back.log_variance == pytest.approx(x.log_variance, rel=1e-6)
    assert back.overlap.variance == pytest.approx(x.overlap.variance, rel=1e-6)


def connected(activation, depth, width=64):
    layers = [layer for n in [64] + [width] * (depth - 1) for layer in (nn.Linear(n, width), activation())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def test_the_policy_is_unit_with_orthogonal_weights():
    assert find_policy("isometric").targets == find_policy("unit").targets
    plan = gs.plan(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)),
        (torch.randn(2, 3, 8, 8),),
        policy="isometric",
    )
    assert plan.parameters["0.weight"].distribution.family is gs.Family.DELTA_ORTHOGONAL
    chosen = gs.plan(connected(nn.Tanh, 2), (X,), policy="isometric", distribution="normal")
    assert chosen.parameters["0.weight"].distribution.family is gs.Family.NORMAL


@pytest.mark.parametrize(("activation", "measured"), [(nn.ReLU, 0.9), (nn.GELU, None)])
def test_a_tailored_network_maps_cosines_as_it_was_asked_to(activation, measured):
    """On the real network: inputs of cosine 0 arrive with the cosine that was asked for, at an unchanged level."""
    model = connected(activation, 30, width=512)
    model[0] = nn.Linear(64, 512)
    gs.tailor(model, gs.plan(model, (X,), policy="isometric"))
    plan = gs.initialize(model, (X,), policy="isometric", seed=1)
    assert not plan.activations
    with torch.no_grad():
        y = model[:-1](X).double()
    products = y @ y.T / y.shape[1]
    level = float(products.diagonal().mean())
    cosine = float((products.sum() - products.trace()) / (64 * 63)) / level
    # 64 inputs of 64 entries have cosines of 0 within 1/8 each, 0.002 on average; one draw of width 512 strays by a few percent.
    assert level == pytest.approx(1.0, abs=0.1)
    if measured is not None:
        assert cosine == pytest.approx(measured, abs=0.03)
    else:
        assert cosine < 0.3  # at most C''(1) / 2 = 0.15 of it is bent away, for a map that is convex


def test_the_proposal_says_what_it_does_and_reads_back():
    model = connected(nn.ReLU, 40)
    plan = gs.plan(model, (X,), policy="isometric")
    assert [change.module for change in plan.activations] == [str(i) for i in range(1, 80, 2)]
    said = plan.explain("1")
    assert "takes cosine 0 to 0.9 through the whole network" in said
    assert "if you ask for it: gainstage.tailor(model, plan)" in said
    assert gs.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanFormatError, match=r"activations\[0\].gamma: expected a number"):
        gs.Plan.from_json(plan.to_json().replace(f'"gamma": {plan.activations[0].gamma!r}', '"gamma": null', 1))
    assert [type(module) for module in model[:4]] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU]  # nothing was changed


def test_the_command_line_shows_balance_and_proposals(tmp_path):
    file = tmp_path / "deep.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n"
        "    layers = [m for _ in range(40) for m in (nn.Linear(32, 32), nn.ReLU())]\n"
        "    return nn.Sequential(*layers), (torch.randn(8, 32),)\n"
    )
    shown = CliRunner().invoke(main, ["plan", f"{file}:build", "--policy", "isometric"])
    assert shown.exit_code == 0
    assert "LeakyReLU" in shown.output
    assert "of 39 activations, 1 first" in " ".join(shown.output.split())  # the last makes the output
    read = CliRunner().invoke(main, ["plan", f"{file}:build", "--policy", "isometric", "--balance", "geometric", "--json"])
    plan = gs.Plan.from_json(read.output)
    assert plan.balance == "geometric"
    assert len(plan.activations) == 39


def test_shallow_networks_are_left_alone():
    plan = gs.plan(connected(nn.ReLU, 3), (X,), policy="isometric")
    assert not plan.activations
    assert "inputs stay distinguishable" in plan.notes[-1]
    with pytest.raises(InputError, match=r"proposes no change to any activation.*inputs stay distinguishable"):
        gs.tailor(connected(nn.ReLU, 3), plan)


class Functional(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(depth)])
        self.act = nn.GELU()
        self.same = self.act

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = torch.relu(layer(x)) if i == 5 else (self.act if i % 2 else self.same)(layer(x))
        return x


def test_functions_inside_of_forward_are_refused_by_name_and_a_shared_module_is_changed_everywhere():
    model = Functional(40)
    plan = gs.plan(model, (X,), policy="isometric")
    refused = [note for note in plan.notes if "is not tailored" in note]
    assert len(refused) == 1
    assert "aten.relu.default" in refused[0]
    assert "torch.relu(layer(x))" in refused[0]
    assert "not a module of torch.nn" in refused[0]
    assert [change.module for change in plan.activations] == ["act"]
    gs.tailor(model, plan)
    assert type(model.act).__name__ == "TailoredActivation"
    assert model.same is model.act


def test_a_model_that_does_not_fit_is_not_changed():
    plan = gs.plan(connected(nn.GELU, 30), (X,), policy="isometric")
    other = connected(nn.GELU, 30)
    other[5] = nn.Tanh()
    with pytest.raises(PlanMismatchError, match=r"changes '5', a torch.nn.modules.activation.GELU, but the model has a .*Tanh"):
        gs.tailor(other, plan)
    with pytest.raises(PlanMismatchError, match="which the model has not"):
        gs.tailor(connected(nn.GELU, 10), plan)
    assert not any(type(module).__name__ == "TailoredActivation" for module in other.modules())


def test_weights_of_a_tailored_network_do_not_load_into_another():
    model = connected(nn.GELU, 30)
    plain = copy.deepcopy(model)
    gs.tailor(model, gs.plan(model, (X,), policy="isometric"))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(model.state_dict())
    model.load_state_dict(model.state_dict())
    shallower = connected(nn.GELU, 30)
    plan = gs.plan(connected(nn.GELU, 40), (X,), policy="isometric")
    reduced = gs.Plan(
        policy=plan.policy,
        parameters=plan.parameters,
        fingerprint=plan.fingerprint,
        training=True,
        activations=plan.activations[:30],
    )
    gs.tailor(shallower, reduced)
    with pytest.raises(InputError, match="weights for an activation with alpha"):
        shallower.load_state_dict(model.state_dict())


def last_loss(model, steps, rate):
    """Eight separable classes of noisy inputs."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 64, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        labels = torch.randint(0, 8, (32,), generator=generator)
        x = centres[labels] + 0.5 * torch.randn(32, 64, generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-5:]) / 5


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_a_hundred_plain_layers_train(activation):
    """40 steps at one rate; examples/deep_plain.py compares the best of several on real data."""
    torch.manual_seed(0)
    model, plain = connected(activation, 100, width=32), connected(activation, 100, width=32)
    gs.tailor(model, gs.plan(model, (X,), policy="isometric"))
    gs.initialize(model, (X,), policy="isometric")
    gs.initialize(plain, (X,), policy="unit")
    chance = math.log(10)
    assert last_loss(model, 40, 3e-4) < 0.3 * chance
    assert last_loss(plain, 40, 3e-4) > 0.7 * chance
