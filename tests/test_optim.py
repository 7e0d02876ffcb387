"""Parameter groups: torch's own optimizers take the first step, and it is as large as was asked for."""

import inspect
import math
import re
import runpy

import numpy as np
import pytest
import torch
from optimized import (
    MODELS,
    OPTIMIZERS,
    REQUEST,
    ROOT,
    assert_as_requested,
    convolutional,
    labelled_loss,
    mlp,
    prepared,
    realised,
    rms,
    step,
    transformer,
)
from scipy import integrate, stats
from torch import nn

import gainstage as gs
from gainstage.optim import LAWS, Start


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_first_step_moves_every_parameter_by_what_was_asked(make, optimizer):
    model, _, plan, gradients = prepared(make)
    groups = gs.param_groups(model, plan, relative_update=REQUEST, optimizer=optimizer, weight_decay=0.1, gradients=gradients)
    assert sorted(name for group in groups for name, _ in group["params"]) == sorted(plan.parameters)
    assert_as_requested(realised(model, plan, groups, gradients))


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS.keys() - {"sgd", "radam", "muon"}))
def test_most_optimizers_need_no_gradient(optimizer):
    model, _, plan, gradients = prepared(transformer)
    groups = gs.param_groups(model, plan, relative_update=REQUEST, optimizer=optimizer)
    assert len(groups) <= 7  # of 16 parameters
    assert_as_requested(realised(model, plan, groups, gradients))


def test_without_a_gradient_muon_is_taken_as_orthogonal():
    """Newton-Schulz in five steps leaves singular values of .68 to 1.14, and the gradient has full rank here: 256 samples."""
    model, _, plan, gradients = prepared(mlp)
    groups = gs.param_groups(model, plan, relative_update=REQUEST, optimizer="muon")
    assert {group["optimizer"] for group in groups} == {"muon", "adamw"}
    found = realised(model, plan, groups, gradients)
    assert all(0.68 < found[name] / REQUEST < 1.14 for name in ("0.weight", "3.weight"))
    assert_as_requested({name: value for name, value in found.items() if name not in {"0.weight", "3.weight"}})


def test_muon_on_gradients_of_low_rank():
    """Here the exact singular values fall short by a tenth: bfloat16's rounding errors are orthogonalised as well."""
    model, _, plan, gradients = prepared(lambda: (mlp()[0], torch.randn(6, 64)))
    assert torch.linalg.matrix_rank(gradients["3.weight"]) <= 6
    groups = gs.param_groups(model, plan, relative_update=REQUEST, optimizer="muon", gradients=gradients)
    assert_as_requested(realised(model, plan, groups, gradients))


OPTIONS = {
    "sgd": [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
    "adam": [{"eps": 1e-3}],
    "nadam": [{"betas": (0.6, 0.9)}, {"momentum_decay": 0.5}],
    "rmsprop": [{"alpha": 0.8}, {"alpha": 0.8, "centered": True}, {"eps": 1e-3}],
    "adafactor": [{"d": 0.5}, {"d": 10.0}, {"eps": (None, 0.5)}, {"eps": (1e-3, 1e-3)}],
    "muon": [{"adjust_lr_fn": "match_rms_adamw"}, {"ns_steps": 3}],
}


@pytest.mark.parametrize(
    ("optimizer", "options"), [(name, options) for name, several in OPTIONS.items() for options in several], ids=str
)
@pytest.mark.parametrize("make", [mlp, convolutional])
def test_options_that_change_the_first_update(make, optimizer, options):
    model, _, plan, gradients = prepared(make)
    groups = gs.param_groups(model, plan, relative_update=REQUEST, optimizer=optimizer, gradients=gradients, **options)
    assert_as_requested(realised(model, plan, groups, gradients))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "nadam", "rmsprop", "adafactor"])
def test_gradients_as_small_as_eps(optimizer):
    model, _, plan, gradients = prepared(mlp, scale=1e-5)
    assert 1e-9 < rms(gradients["3.weight"]) < 1e-7
    groups = gs.param_groups(model, plan, relative_update=REQUEST, optimizer=optimizer, gradients=gradients)
    assert_as_requested(realised(model, plan, groups, gradients))


@pytest.mark.parametrize("ratio", [1e-6, 1e-2, 1.0, 1e3])
def test_the_share_that_eps_leaves_of_gaussian_gradients(ratio):
    start = Start(shape=(3,), dtype=torch.float32, rms=1.0, gradient_rms=1.0, settings={"eps": ratio})
    square = 2 * integrate.quad(lambda x: (x / (x + ratio)) ** 2 * stats.norm.pdf(x), 0, 12, points=[min(ratio, 11)])[0]
    assert LAWS["adam"].magnitude(start) == pytest.approx(math.sqrt(square), rel=1e-6)


def test_predicted_gradients_serve_sgd():
    """A prediction is a mean over draws: that of the squared updates of 16 draws is as asked, within four standard errors."""
    squares = []
    for seed in range(16):
        model, x, plan, gradients = prepared(mlp, seed=seed)
        trace = gs.inspect(model, (x,), loss=labelled_loss)
        groups = gs.param_groups(model, plan, relative_update=REQUEST, optimizer="sgd", trace=trace)
        found = realised(model, plan, groups, gradients)
        squares.append([(found[name] / REQUEST) ** 2 for name in ("0.weight", "3.weight", "5.weight")])
    error = np.std(squares, axis=0) / math.sqrt(len(squares))
    assert np.all(error < 0.05)
    assert np.all(np.abs(np.mean(squares, axis=0) - 1) < 4 * error)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"lion"}))
def test_defaults_are_those_of_torch(name):
    defaults = inspect.signature(OPTIMIZERS[name]).parameters
    assert LAWS[name].settings == {key: defaults[key].default for key in LAWS[name].settings}


def test_the_law_of_another_optimizer():
    law = gs.FirstUpdate(name="half", magnitude=lambda start: 0.5, derivation="half a sign")
    model, _, plan, _ = prepared(mlp)
    halved, whole = gs.param_groups(model, plan, optimizer=law), gs.param_groups(model, plan, optimizer="lion")
    assert [group["lr"] for group in halved] == pytest.approx([2 * group["lr"] for group in whole])
    assert {group["optimizer"] for group in halved} == {"half"}


def test_refusals():
    model, _, plan, gradients = prepared(mlp)
    none = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    cases = [
        ({"optimizer": "adan"}, gs.UnknownNameError, r"'adan' \(nearest: adam.*known are sgd.*To add it.*FirstUpdate"),
        ({"optimizer": torch.optim.Adam}, gs.InputError, "named"),
        ({"relative_update": 0.0}, gs.InputError, "between 0 and 1"),
        ({"relative_update": float("nan")}, gs.InputError, "between 0 and 1"),
        ({"weight_decay": -0.1}, gs.InputError, "not negative"),
        ({"also_decay": ["5.weigth"]}, gs.UnknownNameError, "nearest: 5.weight"),
        ({"epz": 1e-6}, gs.UnknownNameError, "nearest: eps"),
        ({"optimizer": "lion", "betas": (0.9, 0.99)}, gs.UnknownNameError, "does not depend on 'betas'"),
        ({"lr": 1e-3}, gs.UnknownNameError, "follow from relative_update"),
        ({"optimizer": "sgd"}, gs.InputError, "0.weight is not known: give trace="),
        ({"optimizer": "sgd", "gradients": none}, gs.InputError, "every first gradient is zero"),
        ({"optimizer": "sgd", "gradients": {"0.weigth": torch.ones(1)}}, gs.UnknownNameError, "nearest: 0.weight"),
        ({"optimizer": "sgd", "gradients": {"0.weight": torch.ones(1)}}, gs.InputError, r"shape \[1\]"),
        ({"gradients": {"0.bias": torch.full((128,), float("inf"))}}, gs.NonFiniteError, "0.bias"),
        ({"optimizer": gs.FirstUpdate(name="still", magnitude=lambda start: 0.0, derivation="")}, gs.InputError, "still gives"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            gs.param_groups(model, plan, **options)
    with pytest.raises(gs.PlanMismatchError):
        gs.param_groups(nn.Linear(64, 10), plan)
    loud = gs.FirstUpdate(name="slow", magnitude=lambda start: 1e-9, derivation="", largest_rate=1.0)
    with pytest.raises(gs.InputError, match="slow cannot move"):
        gs.param_groups(model, plan, optimizer=loud)


def test_the_document_has_every_law_and_its_examples_run():
    text = (ROOT / "docs" / "learning-rates.md").read_text(encoding="utf-8")
    for law in LAWS.values():
        assert f"| `{law.name}` |" in text
    space = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, space)  # noqa: S102
    assert {"optimizer", "muon"} <= space.keys()


def test_the_example_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "learning_rates.py"), run_name="__main__")
    shares = [float(value) for value in re.findall(r"moved by (\S+)", capsys.readouterr().out)]
    assert len(shares) == 10
    assert shares == pytest.approx([1e-3] * 10, rel=0.05)  # 2 % and the sampling error of the smallest matrix, 640 entries


@pytest.mark.parametrize(
    ("optimizer", "low", "high"),
    [
        ("adamw", 0.4, 1.0),  # the sign of a gradient has rank one but for its noise, which on labels without sense is half of it
        ("muon", 1.0, 1.14 / 0.86),  # its singular values reach 1.14, and their root mean square is .86
    ],
)
def test_spectral_norms_of_the_first_step(optimizer, low, high):
    """Hidden matrices: the largest singular value of the update over that of the weights is what was asked for."""
    torch.manual_seed(0)
    widths = (256, 512, 256)
    model = nn.Sequential(*(layer for n in widths for layer in (nn.LazyLinear(n), nn.ReLU())), nn.LazyLinear(10))
    x = torch.randn(512, 256)
    model(x)
    plan = gs.initialize(model, (x,))
    labelled_loss(model(x)).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = gs.param_groups(model, plan, relative_update=REQUEST, norm="spectral", optimizer=optimizer)
    updates, _ = step(model, groups)
    for name in ("2.weight", "4.weight"):
        found = float(torch.linalg.matrix_norm(updates[name].float(), 2) / torch.linalg.matrix_norm(before[name], 2)) / REQUEST
        assert low < found < high, name


def test_at_spectral_norms_the_rate_of_adam_falls_with_the_width():
    """n x n at unit level: lr = rho 2 sqrt(n) / n / sqrt(n), the 1/n of muP."""
    rates = {}
    for n in (64, 256):
        model = nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 10))
        plan = gs.plan(model, (torch.randn(4096, n, generator=torch.Generator().manual_seed(0)),))
        groups = gs.param_groups(model, plan, norm="spectral", relative_update=1e-3)
        rates[n] = next(group["lr"] for group in groups if "0.weight" in dict(group["params"]))
        assert rates[n] == pytest.approx(1e-3 * 2 / n, rel=0.02)
