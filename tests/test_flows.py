"""Normalizing flows of other libraries: the log-determinant found, its deviation asked for and measured."""

import math

import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.errors import InputError
from gainstage.signal.quadrature import nodes, quantiles, sum_quantiles, weights

FEATURES = 6


def zuko_maf():
    return pytest.importorskip("zuko").flows.MAF(FEATURES, transforms=3, hidden_features=(64, 64))


def zuko_coupling():
    return pytest.importorskip("zuko").flows.RealNVP(FEATURES, transforms=4, hidden_features=(64, 64))


def zuko_spline():
    return pytest.importorskip("zuko").flows.NSF(FEATURES, transforms=2, hidden_features=(64, 64))


def normflows_coupling():
    normflows = pytest.importorskip("normflows")
    layers = []
    for i in range(4):
        mask = (torch.arange(FEATURES) % 2 == i % 2).float()
        scale, shift = (normflows.nets.MLP([FEATURES, 64, 64, FEATURES]) for _ in range(2))
        layers.append(normflows.flows.MaskedAffineFlow(mask, shift, scale))
    return normflows.NormalizingFlow(normflows.distributions.base.DiagGaussian(FEATURES), layers)


def normflows_affine():
    normflows = pytest.importorskip("normflows")
    layers = []
    for _ in range(4):
        network = normflows.nets.MLP([FEATURES // 2, 64, 64, FEATURES], init_zeros=False)
        layers += [normflows.flows.AffineCouplingBlock(network), normflows.flows.Permute(FEATURES, mode="swap")]
    return normflows.NormalizingFlow(normflows.distributions.base.DiagGaussian(FEATURES), layers)


def nflows_maf():
    return pytest.importorskip("nflows.flows").MaskedAutoregressiveFlow(FEATURES, 64, 2, 2)


def nflows_spline():
    transforms = pytest.importorskip("nflows.transforms")
    residual = pytest.importorskip("nflows.nn.nets").ResidualNet
    return transforms.CompositeTransform(
        [
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                (torch.arange(FEATURES) + i) % 2, lambda i, o: residual(i, o, 64, num_blocks=1), tails="linear", tail_bound=3.0
            )
            for i in range(3)
        ]
    )


FLOWS = [zuko_maf, zuko_coupling, zuko_spline, normflows_coupling, normflows_affine, nflows_maf]


def determinants(model, plan, *, seeds, calibrated, features=FEATURES):
    found = []
    for seed in range(seeds):
        gs.apply(model, plan, seed=seed)
        if calibrated:
            gs.calibrate(model, plan, (torch.randn(256, features),))
        with torch.no_grad():
            found.append(model(torch.randn(512, features))[1])
    return torch.stack(found)


LAYERS = {zuko_maf: 3, zuko_coupling: 4, zuko_spline: 2, nflows_maf: 2, nflows_spline: 3}


@pytest.mark.parametrize("build", LAYERS)
def test_the_log_determinant_has_the_deviation_asked_for(build):
    """Within a fifth, of which a tenth is what 24 draws leave open; masks let each row of a weight see other inputs."""
    torch.manual_seed(0)
    model = gs.Flow(build()).eval()
    plan = gs.plan(model, (torch.randn(256, FEATURES),), logdet_std=0.1)
    scales = [name for name, parameter in plan.parameters.items() if parameter.role == "coupling_scale"]
    assert len(scales) == LAYERS[build]
    assert plan.predictions["@0"][0] < 1.1  # what is left of the data: the flow starts near the identity
    assert "Var(log det) = 0.01" in plan.explain(scales[0])
    drawn = determinants(model, plan, seeds=24, calibrated=False)
    assert 0.08 < drawn.std() < 0.12
    assert abs(drawn.mean()) < 0.1
    if build is nflows_spline:
        return  # each pass over data captures it anew, which takes seconds
    calibrated = determinants(model, plan, seeds=6, calibrated=True)
    assert 0.08 < calibrated.std() < 0.12
    assert abs(calibrated.mean()) < 0.1


def test_exponentials_of_scales_are_stacked():
    """Without autoregressive masks the draws keep the deviation by themselves; 48 of them tell it within a tenth."""
    torch.manual_seed(0)
    model = gs.Flow(normflows_affine()).eval()
    plan = gs.plan(model, (torch.randn(256, FEATURES),), logdet_std=0.1)
    assert plan.predictions["@0"][0] < 1.1
    drawn = determinants(model, plan, seeds=48, calibrated=False)
    assert 0.08 < drawn.std() < 0.125
    assert abs(drawn.mean()) < 0.05


def test_couplings_that_only_add():
    transforms = pytest.importorskip("nflows.transforms")
    residual = pytest.importorskip("nflows.nn.nets").ResidualNet
    masks = [(torch.arange(FEATURES) + i) % 2 for i in range(3)]
    layers = [transforms.AdditiveCouplingTransform(mask, lambda i, o: residual(i, o, hidden_features=64)) for mask in masks]
    model, x = gs.Flow(transforms.CompositeTransform(layers)).eval(), torch.randn(512, FEATURES)
    plan = gs.plan(model, (x,), logdet_std=0.1)
    shifts = [name for name, parameter in plan.parameters.items() if parameter.role == "coupling_shift"]
    assert len(shifts) == 3
    assert "log det is 0 whatever the weights are" in plan.explain(shifts[0])
    moved = []
    for seed in range(16):
        gs.apply(model, plan, seed=seed)
        z, determinant = model(x)
        assert determinant.abs().max() == 0.0
        moved.append((z - x).square().mean().item())
    assert sum(moved) / 16 == pytest.approx(0.015, rel=0.3)  # three shifts of variance 0.01, of half the features each
    gs.initialize(model, (x,), logdet_std=0.0)
    assert torch.equal(model(x)[0], x)


def test_continuous_flows():
    """To first order in the velocity; zuko's own solver, and the trace that it differentiates for, are the judge."""
    flows = pytest.importorskip("zuko").flows
    torch.manual_seed(0)
    flow = flows.CNF(FEATURES, hidden_features=(64, 64))
    model, x = gs.Flow(flow).eval(), torch.randn(256, FEATURES)
    plan = gs.plan(model, (x,), logdet_std=0.1)
    assert "Var(log det) = 0.01" in plan.explain("flow.transform.ode.4.weight")
    drawn = determinants(model, plan, seeds=32, calibrated=False)
    assert 0.08 < drawn.std() < 0.12
    assert abs(drawn.mean()) < 0.05
    with torch.no_grad():
        (z, determinant), (exact_z, exact) = model(x), flow().transform.call_and_ladj(x)
    assert (determinant - exact).std() < 0.1 * exact.std()
    assert (z - exact_z).square().mean() < 0.02 * (exact_z - x).square().mean()
    with pytest.raises(InputError, match="LayerNorm in the network of a continuous flow"):
        gs.Flow(flows.CNF(FEATURES, normalize=True))(x)


def test_twice_the_deviation():
    torch.manual_seed(0)
    model = gs.Flow(zuko_maf()).eval()
    x = torch.randn(256, FEATURES)
    half, whole = (determinants(model, gs.plan(model, (x,), logdet_std=std), seeds=1, calibrated=False) for std in (0.1, 0.2))
    assert whole.std() / half.std() == pytest.approx(2.0, rel=0.15)  # layers read what those before them made


@pytest.mark.parametrize("build", FLOWS)
def test_a_start_at_the_identity(build):
    model = gs.Flow(build()).eval()
    x = torch.randn(64, FEATURES)
    gs.initialize(model, (x,), logdet_std=0.0)
    at_rest = build is nflows_maf  # at a bias that is known to 1e-6
    rounding = 1e-4 if at_rest else 1e-6 if build is zuko_spline else 0.0  # of a quotient of two sums
    z, determinant = model(x)
    assert determinant.abs().max() <= rounding
    assert z.square().mean().item() == pytest.approx(x.square().mean().item(), rel=1e-4)


class Resting(nn.Module):
    """A coupling whose log-scales are a function of what its network puts out, packed with its shifts."""

    def __init__(self, function):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 16))
        self.function = function

    def forward(self, x):
        kept, moved = x.split([4, 8], -1)
        parts = self.net(kept).unflatten(-1, (8, 2))
        logs = self.function(parts[..., 0])
        return torch.cat([kept, moved * logs.exp() + parts[..., 1]], -1), logs.sum(-1)


@pytest.mark.parametrize(
    ("function", "rest"),
    [
        (lambda c: c, 0.0),
        (lambda c: nn.functional.softplus(c).log(), math.log(math.e - 1.0)),
        (lambda c: (2.0 * torch.sigmoid(c + 0.5)).log(), -0.5),
        (lambda c: torch.sigmoid(c + 2.0).log(), 0.0),  # at most 0, and flat where it comes near
        (lambda c: -((c - 0.7) ** 2), 0.0),  # flat where it is 0
    ],
)
def test_where_a_scale_is_at_rest(function, rest):
    """The bias at which scales are 1; shifts beside them in one weight have none."""
    model, x = Resting(function), torch.randn(512, 12)
    plan = gs.plan(model, (x,), logdet_std=0.1)
    gs.apply(model, plan, seed=0)
    scales, shifts = model.net[2].bias.unflatten(0, (8, 2)).unbind(-1)
    assert scales.tolist() == pytest.approx([rest] * 8, abs=1e-4)
    assert shifts.abs().max() == 0.0
    left = 8.0 * function(torch.tensor(rest)).item()  # of 8 outputs, with weights of zero
    assert any(f"log det starts at {left:.1f}" in note for note in plan.notes) == (abs(left) > 0.1)
    if rest != 0.0:
        found = determinants(model, plan, seeds=24, calibrated=False, features=12)
        assert found.std() == pytest.approx(0.1, rel=0.2)
        assert abs(found.mean()) < 0.05


def test_scales_at_rest_are_calibrated_apart_from_their_bias():
    """The square of the bias is 600 times what the weight adds to it: what both share in one draw would drown that."""
    torch.manual_seed(0)
    model = Resting(lambda c: nn.functional.softplus(c).log())
    plan = gs.plan(model, (torch.randn(512, 12),), logdet_std=0.05)
    for seed in range(4):
        gs.apply(model, plan, seed=seed)
        x = torch.randn(256, 12)
        calibration = gs.calibrate(model, plan, (x,))
        assert not calibration.missed
        with torch.no_grad():
            moved = (model.net(x[:, :4]) - model.net[2].bias).square().mean().item()
        assert 8 * 0.63**2 * moved == pytest.approx(0.05**2, rel=0.05)  # the log of softplus has the slope .63 at its rest


def test_a_flow_of_your_own():
    class Coupling(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 6))

        def forward(self, x):
            kept, moved = x.chunk(2, -1)
            scale, shift = self.net(kept).chunk(2, -1)
            return torch.cat([kept, moved * scale.exp() + shift], -1), scale.sum(-1)

    model, x = Coupling(), torch.randn(512, FEATURES)
    plan = gs.plan(model, (x,), logdet_std=0.3)
    assert plan.parameters["net.2.weight"].role == "coupling_scale"
    # d v n E[tanh^2] = 0.09 for the rows of the scales; those of the shifts are as quiet
    std = plan.parameters["net.2.weight"].distribution.std
    assert 3 * 64 * plan.predictions["net.1@0"][0] * std**2 == pytest.approx(0.09, rel=2e-3)
    assert gs.plan(model, (x,), logdet_std=0.3).parameters["net.2.weight"].blocks == ()
    found = determinants(model, plan, seeds=60, calibrated=False)
    assert found.std() == pytest.approx(0.3, rel=0.1)
    assert gs.plan(model, (x,), logdet_std=0.3, logdet=-1).parameters == plan.parameters


def test_bad_requests():
    plain = nn.Linear(FEATURES, FEATURES)
    x = torch.randn(8, FEATURES)
    with pytest.raises(InputError, match=r"of shapes \[8, 6\], 0 have one number for each sample"):
        gs.plan(plain, (x,), logdet_std=0.1)
    with pytest.raises(InputError, match="logdet_std is -1"):
        gs.plan(plain, (x,), logdet_std=-1.0)
    with pytest.raises(InputError, match="there is no output 3; the model returns 1"):
        gs.plan(plain, (x,), logdet_std=0.1, logdet=3)
    with pytest.raises(InputError, match="Linear is no flow of zuko, nflows, normflows"):
        gs.Flow(plain)
    assert gs.Flow(plain, lambda flow, x: (flow(x), x.sum(-1)))(x)[1].shape == (8,)


def test_rows_of_a_masked_weight_differ():
    """Units that see few inputs are quiet, and are seen by many: autoregressive masks, three layers deep, against 300 draws."""

    class Masked(nn.Linear):
        def __init__(self, before, after, *, strict):
            super().__init__(len(before), len(after), bias=False)
            self.register_buffer("mask", after[:, None] > before if strict else after[:, None] >= before)

        def forward(self, x):
            return nn.functional.linear(x, self.mask * self.weight)

    features, hidden = torch.arange(6), torch.arange(64) % 5
    model = nn.Sequential(
        Masked(features, hidden, strict=False), nn.ReLU(), Masked(hidden, hidden, strict=False), nn.ReLU(),
        Masked(hidden, features, strict=True),
    )  # fmt: skip
    torch.manual_seed(0)
    x = torch.randn(512, FEATURES)
    x = x / x.square().mean(0).sqrt()  # all features are equally loud, and weights have the variance that they are drawn with
    for layer in model[::2]:
        layer.weight.data /= (3 * layer.in_features * layer.weight.square().mean()).sqrt().detach()
    trace = gs.inspect(model, (x,), gradients=False)
    draws = []
    for seed in range(300):
        torch.manual_seed(seed)
        for layer in model[::2]:
            layer.reset_parameters()
        with torch.no_grad():
            inner = model[:3](x)
            levels = [inner.square().mean(0)[hidden == degree].mean() for degree in range(5)]
            draws.append(torch.stack([*levels, model[3:](inner).square().mean()]))
    signal = trace.modules["2"][0]
    rows = torch.from_numpy(signal.value.levels.reshape(-1)) ** 2 * signal.second_moment
    predicted = [*(rows[hidden == degree].mean().item() for degree in range(5)), trace.modules["4"][0].second_moment]
    means, deviations = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 300**0.5
    for level, mean, error in zip(predicted, means.tolist(), deviations.tolist(), strict=True):
        assert abs(level - mean) < 3 * error
        assert 3 * error < 0.15 * mean


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_on_a_weight_counts(dtype):
    """Masks of booleans were taken for zeros."""

    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(40, 30)
            self.register_buffer("mask", (torch.arange(1200).view(30, 40) % 4 == 0).to(dtype))

        def forward(self, x):
            return nn.functional.linear(x, self.mask * self.weight, self.bias)

    x = torch.randn(64, 40)
    plan = gs.plan(nn.Sequential(Masked(), nn.ReLU(), nn.Linear(30, 3)), (x,))
    assert plan.parameters["0.weight"].distribution.std ** 2 == pytest.approx(1 / 10, rel=0.01)


def test_both_tails_of_products_and_sums():
    """The probability below the last points is 1 to a float: layer by layer their value grew to e^300."""
    z = nodes()
    product = quantiles(z[:, None] * z[None, :], weights()[:, None] * weights()[None, :])
    for made in (quantiles(z, weights()), product, sum_quantiles(z, z**3)):
        assert made == pytest.approx(-made[::-1], rel=1e-6, abs=1e-6)
    assert quantiles(z, weights()) == pytest.approx(z, abs=1e-4)
