"""Gains: published values, closed forms, brute force on composed activations, and refusals."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import gainstage as gs
from gainstage.errors import InputError

PHI = stats.norm


CLOSED_FORMS = {
    # name: (function, backward, E[f^2] or E[f'^2])
    "relu": (torch.relu, False, 0.5),
    "relu, backward": (torch.relu, True, 0.5),
    "leaky relu": (lambda z: F.leaky_relu(z, 0.3), False, (1 + 0.3**2) / 2),
    "prelu module": (nn.PReLU(init=0.7), False, (1 + 0.7**2) / 2),
    "identity": (nn.Identity(), False, 1.0),
    "square": (torch.square, False, 3.0),
    "square, backward": (torch.square, True, 4.0),
    "sine": (torch.sin, False, (1 - math.exp(-2)) / 2),
    "fast sine": (lambda z: torch.sin(50 * z), False, 0.5),
    "exponential": (torch.exp, False, math.exp(2)),
    "steep exponential": (lambda z: torch.exp(7 * z), False, math.exp(98)),
    "erf": (torch.erf, False, 2 / math.pi * math.asin(2 / 3)),
    "jump": (lambda z: (z > 0.1234567).double(), False, PHI.sf(0.1234567)),
    "narrow window": (lambda z: ((z - 0.321).abs() < 0.01).double(), False, PHI.cdf(0.331) - PHI.cdf(0.311)),
    "kink": (lambda z: torch.relu(z - 0.3), False, (1 + 0.09) * PHI.sf(0.3) - 0.3 * PHI.pdf(0.3)),
    "kink, backward": (lambda z: torch.relu(z - 0.3), True, PHI.sf(0.3)),
    "logarithm of a size": (lambda z: z.abs().log(), False, (np.euler_gamma + math.log(2)) ** 2 / 4 + math.pi**2 / 8),
    "singular": (lambda z: z.abs() ** -0.25, False, 2**-0.25 * math.gamma(0.25) / math.sqrt(math.pi)),
    "hard to hold": (lambda z: torch.exp(z**2 / 8), False, math.sqrt(2)),
    "tiny": (lambda z: 1e-30 * z, False, 1e-60),
    "in place": (lambda z: z.relu_(), False, 0.5),
    "float32 inside": (lambda z: F.prelu(z, torch.tensor([0.5])), False, 0.625),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms(name):
    f, backward, moment = CLOSED_FORMS[name]
    assert gs.gain(f, backward=backward) == pytest.approx(moment**-0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("f", "backward", "published"),
    [
        (F.gelu, False, 1.534),
        (F.silu, False, 1.677),
        (torch.tanh, False, 1.593),
        (torch.tanh, True, 1.467),
        (F.elu, False, 1.245),
        (F.mish, False, 1.487),
        (F.selu, False, 1.000),
    ],
)
def test_values_of_the_literature(f, backward, published):
    assert gs.gain(f, backward=backward) == pytest.approx(published, abs=5.1e-4)  # they are given to three decimals


ATOMS = {  # torch, NumPy, kinks and jumps
    "relu": (torch.relu, lambda u: np.maximum(u, 0.0), [0.0]),
    "tanh": (torch.tanh, np.tanh, []),
    "sin": (torch.sin, np.sin, []),
    "abs": (torch.abs, np.abs, [0.0]),
    "softplus": (F.softplus, lambda u: np.logaddexp(u, 0.0), []),
    "hardtanh": (F.hardtanh, lambda u: np.clip(u, -1.0, 1.0), [-1.0, 1.0]),
    "step": (lambda u: (u > 0.0).to(u.dtype), lambda u: (u > 0.0).astype(float), [0.0]),
    "sigmoid": (torch.sigmoid, lambda u: 1.0 / (1.0 + np.exp(-u)), []),
    "floor": (torch.floor, np.floor, list(range(-12, 13))),
    "gauss": (lambda u: torch.exp(-(u**2)), lambda u: np.exp(-(u**2)), []),
}


def composed(seed):
    """A random chain of three activations with affine maps between them, in torch and in NumPy."""
    rng = np.random.default_rng(seed)
    chosen = [ATOMS[name] for name in rng.choice(list(ATOMS), 3)]
    scales, shifts = rng.uniform(0.5, 2.5, 3), rng.normal(size=3)

    def f(z):
        for (atom, _, _), scale, shift in zip(chosen, scales, shifts, strict=True):
            z = atom(scale * z + shift)
        return z + 0.1

    def g(z):
        for (_, atom, _), scale, shift in zip(chosen, scales, shifts, strict=True):
            z = atom(scale * z + shift)
        return z + 0.1

    return f, g


def test_composed_activations_against_brute_force():
    """150 random functions with kinks and jumps in unknown places, to 0.1 %.

    The judge: a million equidistant points, 1e-5 apart on [-5.5, 5.5]; a jump between two of them costs at most 4e-6.
    """
    z = np.linspace(-5.5, 5.5, 1_100_001)
    density = PHI.pdf(z)
    density /= density.sum()
    for seed in range(150):
        f, g = composed(seed)
        brute = float(density @ g(z) ** 2) ** -0.5
        assert gs.gain(f) == pytest.approx(brute, rel=1e-3), seed


@pytest.mark.parametrize(
    ("f", "calls"),
    [
        (torch.tanh, 6),  # four looks at what the function is, intervals of 1/8, their halves
        (lambda z: (z > 0.1234567).double(), 13),  # and sixteenths of what is left; 22 by halves
        (lambda z: torch.floor(10.0 * z), 22),  # 100 jumps that count: halves, until few are left
    ],
)
def test_a_gain_takes_few_calls(f, calls):
    """A call costs more than the points that it is for: what is left of the integral is cut the finer, the less it is."""
    sizes = []

    def counted(z):
        sizes.append(len(z))
        return f(z)

    gs.gain(counted)
    assert len(sizes) <= calls
    assert sum(sizes) < 30_000


def test_a_module_keeps_its_parameters_and_mode():
    module = nn.Sequential(nn.PReLU(), nn.Dropout(0.5)).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    assert gs.gain(module) == pytest.approx((2 / (1 + 0.25**2)) ** 0.5, rel=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert module[0].weight.dtype == torch.float32
    assert module[0].weight.grad is None
    assert not module.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("f", "backward", "message"),
    [
        (lambda z: 0 * z, False, "0 for every z"),
        (torch.sign, True, "0 for every z"),
        (lambda z: (z > 0).double(), True, "no derivative"),
        (lambda z: 1 / z, False, "no finite gain"),
        (lambda z: torch.exp(z**2), False, "no finite gain"),
        (lambda z: torch.exp(z**2 / 4), False, "no finite gain"),  # E[f^2] diverges, just so
        (lambda z: z + math.inf, False, "no finite gain"),
        (torch.log, False, "not a number at z = -"),
        (lambda z: torch.sin(1e9 * z), False, "too irregular"),
        (lambda z: F.glu(z[:, None].expand(-1, 2)), False, "changes the shape"),
        (torch.sum, False, "changes the shape"),
        (lambda z: z.softmax(0), False, "depends on the other entries"),
        (lambda z: z - z.mean(), False, "depends on the other entries"),
        (lambda _: None, False, "returns NoneType"),
        (nn.GELU, False, r"a module: GELU\(\)"),
        (lambda z: z * 1j, False, "complex"),
        (lambda z: z @ torch.ones(3), False, "cannot be called"),
        (1.5, False, "not float"),
    ],
)
def test_what_has_no_gain_is_refused_with_the_reason(f, backward, message):
    with pytest.raises(InputError, match=message):
        gs.gain(f, backward=backward)


SLOPES = torch.tensor([0.25, -0.5, 2.0, 0.0])


@pytest.mark.parametrize(
    ("f", "backward", "moment"),
    [
        (nn.RReLU(), False, (1 + (1 / 8**2 + 1 / 24 + 1 / 9) / 3) / 2),  # E[a^2] of a uniform slope
        (nn.RReLU(), True, (1 + (1 / 8**2 + 1 / 24 + 1 / 9) / 3) / 2),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.75)), False, 0.5 / 0.25),
        (nn.Sequential(nn.Tanh(), nn.Dropout(0.5)), True, 1.4673**-2 / 0.5),
    ],
)
def test_what_the_function_draws_is_averaged_over(f, backward, moment):
    state = torch.get_rng_state()
    assert gs.gain(f, backward=backward) == pytest.approx(moment**-0.5, rel=1e-3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("backward", [False, True])
def test_slopes_of_their_own_for_each_channel(backward):
    """(1 + E[a^2]) / 2 over the channels, negative slopes and slopes above 1 included."""
    module = nn.PReLU(4)
    with torch.no_grad():
        module.weight.copy_(SLOPES)
    expected = ((1 + float(SLOPES.square().mean())) / 2) ** -0.5
    assert gs.gain(module, backward=backward) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("slope", [-3.0, -1.0, -0.1, 0.0, 0.9, 1.0, 1.5, 10.0])
def test_any_slope(slope):
    assert gs.gain(nn.PReLU(init=slope)) == pytest.approx((2 / (1 + slope**2)) ** 0.5, rel=1e-6)


def test_inputs_that_are_not_normal():
    """After a norm over two entries all of them are 1 or -1."""
    x = F.layer_norm(torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)), (2,))
    assert gs.gain(torch.tanh, inputs=3.0 * x) == pytest.approx(1 / math.tanh(1.0), rel=1e-3)
    with pytest.raises(InputError, match="not all of them 0"):
        gs.gain(torch.tanh, inputs=torch.zeros(3))
