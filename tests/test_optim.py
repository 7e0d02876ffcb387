"""Parameter groups: torch's own optimizers take the first step, and it is as large as was asked for."""

import inspect
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import nn

import gainstage as gs
from gainstage.optim import LAWS, Start
from gainstage.optim.first import ROUNDING

ROOT = Path(__file__).parents[1]
REQUEST = 1e-2


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:2302.06675."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta_1, beta_2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                update = (beta_1 * average + (1 - beta_1) * p.grad).sign() + group["weight_decay"] * p
                p.sub_(group["lr"] * update)
                average.mul_(beta_2).add_(p.grad, alpha=1 - beta_2)


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "lion": Lion,
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.Muon,
}


def mlp():
    return nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    ), torch.randn(256, 64)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ), torch.randn(32, 3, 16, 16)  # fmt: skip


def transformer():
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Embedding(300, 64), layer, nn.LayerNorm(64), nn.Linear(64, 10)), torch.randint(0, 300, (16, 24))


MODELS = {"mlp": mlp, "convolutional": convolutional, "transformer": transformer}


def labelled_loss(output):
    return F.cross_entropy(output.flatten(0, -2), torch.arange(output[..., 0].numel()) % 10)


def prepared(make, scale=1.0, seed=1):
    """A model drawn from a plan, the plan, and the gradients of one batch."""
    torch.manual_seed(0)
    model, x = make()
    # Orthogonal matrices have the planned root mean square in every draw, so that nothing here is sampling error.
    plan = gs.initialize(model, (x,), seed=seed, distribution="orthogonal")
    (scale * labelled_loss(model(x))).backward()
    return model, x, plan, {name: parameter.grad for name, parameter in model.named_parameters()}


def step(model, groups):
    """Take the step with the optimizers that the groups name; the updates, and who made them."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    made_by = {name: group["optimizer"] for group in groups for name, _ in group["params"]}
    for kind in set(made_by.values()):
        OPTIMIZERS[kind]([group for group in groups if group["optimizer"] == kind]).step()
    return {name: (parameter.detach() - before[name]).double() for name, parameter in model.named_parameters()}, made_by


def rms(tensor):
    return float(tensor.detach().double().square().mean().sqrt())


def planned_size(name, plan):
    """Of these models' parameters, read off the plan by hand: levels for biases that start from zeros."""
    planned = plan.parameters[name]
    mean, std = planned.distribution.mean, planned.distribution.std
    if planned.blocks:
        return math.sqrt(sum(block.distribution.std**2 for block in planned.blocks) / len(planned.blocks))
    if mean or std:
        return math.hypot(mean, std)
    if name.endswith(("in_proj_bias", "out_proj.bias")):  # nn.MultiheadAttention calls no module for these
        return 1.0
    return math.sqrt(plan.predictions[f"{name.removesuffix('.bias')}@0"][0])


def realised(model, plan, groups, gradients):
    """First relative updates: over all entries, or those that the gradient reaches where these move alike."""
    updates, made_by = step(model, groups)
    found = {}
    for name, update in updates.items():
        sizes = gradients[name].abs()
        whole = made_by[name] in {"sgd", "radam", "muon"} or (made_by[name] == "adafactor" and update.dim() > 1)
        found[name] = rms(update if whole else update[sizes > ROUNDING * sizes.max()]) / planned_size(name, plan)
    return found


def assert_as_requested(found, tolerance=0.02):
    wrong = {name: value / REQUEST for name, value in found.items() if abs(value / REQUEST - 1) > tolerance}
    assert not wrong


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


# What the groups hold


def test_decay_is_for_matrices():
    model, _, plan, _ = prepared(transformer)
    groups = gs.param_groups(model, plan, weight_decay=0.1)
    decayed = {name for group in groups if group["weight_decay"] for name, _ in group["params"]}
    assert decayed == {
        "1.self_attn.in_proj_weight",
        "1.self_attn.out_proj.weight",
        "1.linear1.weight",
        "1.linear2.weight",
        "3.weight",
    }
    more = gs.param_groups(model, plan, weight_decay=0.1, also_decay=["0.*", "*norm1*"])
    decayed |= {"0.weight", "1.norm1.weight", "1.norm1.bias"}
    assert {name for group in more if group["weight_decay"] for name, _ in group["params"]} == decayed


def test_equal_rates_are_one_group():
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(32, 32), nn.ReLU())))
    plan = gs.initialize(model, (torch.randn(8, 32),))
    groups = gs.param_groups(model, plan)
    assert [len(group["params"]) for group in groups] == [12, 11, 1]  # biases, matrices after a ReLU, the first one
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 1e-3 * (2 / 32) ** 0.5, 1e-3 * (1 / 32) ** 0.5], rel=0.01)


def test_a_fused_parameter_has_one_rate_of_its_whole_size():
    model, _, plan, _ = prepared(transformer)
    rates = {name: group["lr"] for group in gs.param_groups(model, plan) for name, _ in group["params"]}
    assert rates["1.self_attn.in_proj_weight"] == pytest.approx(1e-3 * rms(model[1].self_attn.in_proj_weight), rel=0.01)


def test_complex_parameters_move_by_what_was_asked():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(16, 16, dtype=torch.complex64)), nn.Linear(16, 4)

        def forward(self, x):
            return self.head((x.to(torch.complex64) @ self.weight).abs())

    torch.manual_seed(0)
    model, x = Mixing(), torch.randn(64, 16)
    groups = gs.param_groups(model, gs.plan(model, (x,)), relative_update=0.01, optimizer="adam")
    before = model.weight.detach().clone()
    optimizer = torch.optim.Adam(groups)
    model(x).square().mean().backward()
    optimizer.step()
    assert ((model.weight.detach() - before).norm() / before.norm()).item() == pytest.approx(0.01, rel=0.02)


def test_frozen_parameters_are_left_out_and_tied_ones_stand_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mixing, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
            self.head.weight = self.table.weight
            self.mixing.bias.requires_grad_(requires_grad=False)

        def forward(self, x):
            return self.head(self.mixing(self.table(x)).relu())

    model, x = Tied(), torch.randint(0, 40, (4, 8))
    groups = gs.param_groups(model, gs.plan(model, (x,)), weight_decay=0.1)
    assert {name: group["weight_decay"] for group in groups for name, _ in group["params"]} == {
        "table.weight": 0.0,
        "mixing.weight": 0.1,
    }


def test_weights_that_start_from_zeros_are_compared_with_the_unit_level_weight():
    model, x = mlp()
    nn.init.zeros_(model[5].weight)
    plan = gs.plan(model, (x,), keep=["5.*"])
    rates = {name: group["lr"] for group in gs.param_groups(model, plan) for name, _ in group["params"]}
    assert rates["5.weight"] == pytest.approx(1e-3 / math.sqrt(128), rel=0.01)
    model[5].weight.data.normal_(0, 0.3)
    rates = {name: group["lr"] for group in gs.param_groups(model, plan) for name, _ in group["params"]}
    assert rates["5.weight"] == pytest.approx(1e-3 * rms(model[5].weight), rel=0.01)


@pytest.mark.parametrize("deviation", [0.0, 0.1])
def test_quiet_scales_of_a_flow_move_as_if_they_were_at_unit_level(deviation):
    """Drawn for log-determinants of a deviation of 0.1, or zeros: N layers reach unit level together."""
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    flow = gs.Flow(zuko.flows.MAF(6, transforms=2, hidden_features=(64,)))
    plan = gs.initialize(flow, (torch.randn(64, 6),), logdet_std=deviation)
    rates = {name: group["lr"] for group in gs.param_groups(flow, plan, relative_update=0.01) for name, _ in group["params"]}
    last = [name for name, planned in plan.parameters.items() if planned.role == "coupling_scale" and len(planned.shape) == 2]
    assert len(last) == 2
    for name in last:
        assert plan.parameters[name].distribution.std < 0.02
        assert rates[name] == pytest.approx(0.01 / 8.0 / 2**0.5, rel=0.01)
        assert rates[name.replace("weight", "bias")] == pytest.approx(0.01 / 2**0.5, rel=0.01)


def test_layers_of_a_flow_share_what_they_move_and_log_scales_start_at_any_value():
    """ActNorm set from data that are normal already: log-scales of nearly 0. At spectral norms N layers follow one gradient."""
    transforms = pytest.importorskip("nflows.transforms")
    residual = pytest.importorskip("nflows.nn.nets").ResidualNet
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    x = (x - x.mean(0)) / x.std(0)
    layers = []
    for i in range(3):
        mask = (torch.arange(6) + i) % 2
        layers.append(transforms.ActNorm(6))
        layers.append(transforms.AffineCouplingTransform(mask, lambda n, m: residual(n, m, 64, num_blocks=2)))
    flow = gs.Flow(transforms.CompositeTransform(layers))
    plan = gs.initialize(flow, (x,), logdet_std=0.1)
    flow.normalize(x)
    assert layers[0].log_scale.abs().max() < 1e-6
    rates = {
        norm: {name: group["lr"] for group in gs.param_groups(flow, plan, norm=norm) for name, _ in group["params"]}
        for norm in ("entries", "spectral")
    }
    for i in (0, 2, 4):
        name = f"flow._transforms.{i}.log_scale"
        assert plan.parameters[name].role == "log_scale"
        assert rates["entries"][name] == pytest.approx(1e-3, rel=0.01)
        assert rates["spectral"][name] == pytest.approx(1e-3 / 3**0.5, rel=0.01)
    assert plan.parameters["flow._transforms.1.transform_net.final_layer.weight"].branches == 3
    assert plan.parameters["flow._transforms.1.transform_net.blocks.0.linear_layers.0.weight"].branches == 6  # a stream inside


def test_where_the_first_gradient_is_zero_sgd_gets_its_smallest_rate():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10)), torch.randn(8, 3, 8, 8)
    plan = gs.initialize(model, (x,))
    labelled_loss(model(x)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    rates = {n: g["lr"] for g in gs.param_groups(model, plan, optimizer="sgd", gradients=gradients) for n, _ in g["params"]}
    assert rates["0.bias"] == min(rates.values())  # a batch norm takes it away again; the gradient is rounding error


def test_a_model_on_the_meta_device_has_the_same_rates():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    plan = gs.plan(model, (torch.empty(8, 64, device="meta"),))
    rates = [(group["lr"], [name for name, _ in group["params"]]) for group in gs.param_groups(model, plan)]
    model.to_empty(device="cpu")
    gs.apply(model, plan)
    assert rates == [(group["lr"], [name for name, _ in group["params"]]) for group in gs.param_groups(model, plan)]


# Laws


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


# Refusals


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


# Documents


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


class Blocks(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.enter, self.head = nn.Linear(16, 32), nn.Linear(32, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(depth)
        )

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(nn.functional.layer_norm(x, (32,)))


def test_rates_in_branches_fall_with_the_root_of_their_number():
    """Norms and biases inside, too; the way in and the head stay."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    rates = {}
    for depth in (2, 8):
        model = Blocks(depth)
        plan = gs.plan(model, (x,))
        groups = gs.param_groups(model, plan, norm="spectral")
        rates[depth] = {name: group["lr"] for group in groups for name, _ in group["params"]}
        shown = {name: plan.parameters[name].branches for name in ("enter.weight", "blocks.0.0.weight", "blocks.1.1.bias")}
        assert shown == {"enter.weight": 1, "blocks.0.0.weight": depth, "blocks.1.1.bias": depth}
        assert plan.parameters["head.weight"].branches == 1
        assert gs.Plan.from_json(plan.to_json()) == plan
    assert rates[2]["enter.weight"] == pytest.approx(rates[8]["enter.weight"], rel=0.02)
    assert rates[2]["blocks.0.0.weight"] == pytest.approx(2.0 * rates[8]["blocks.0.0.weight"], rel=0.02)
    # The end of a branch is smaller itself, too, by the root of what it shares out.
    assert rates[2]["blocks.0.3.weight"] == pytest.approx(4.0 * rates[8]["blocks.0.3.weight"], rel=0.1)
