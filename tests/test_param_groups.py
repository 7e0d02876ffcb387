"""Which parameters stand in which group, and what their rates are compared with."""

import math

import pytest
import torch
from optimized import labelled_loss, mlp, prepared, rms, transformer
from torch import nn

import gainstage as gs


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
