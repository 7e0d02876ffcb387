"""Policies are data; the classical ones agree with their papers wherever a weight is contracted."""

import math

import pytest
import torch
from plain_roles import as_role, solved
from torch import nn

from gainstage.capture import capture
from gainstage.errors import InputError, UnknownNameError
from gainstage.plan import Family
from gainstage.policies import POLICIES, Level, Policy, find_policy, module_default
from gainstage.roles import Branch, Role, Setter, Stream


def test_every_policy_says_something_of_every_role_and_where_it_comes_from():
    assert set(POLICIES) == {"unit", "isometric", "torch", "he", "glorot", "lecun", "gpt2"}
    for policy in POLICIES.values():
        assert set(policy.targets) == set(Role)
        assert policy.source


def test_a_policy_without_a_target_for_a_role_is_refused():
    with pytest.raises(InputError, match=r"no target for the role.*query"):
        Policy(name="mine", targets={Role.HIDDEN: Level()}, source="here")


def test_an_unknown_policy_is_told_the_nearest():
    with pytest.raises(UnknownNameError, match=r"no policy 'glorto' \(nearest: glorot\)"):
        find_policy("glorto")
    with pytest.raises(InputError, match=r"name or a gainstage\.Policy"):
        find_policy(3)
    assert find_policy(POLICIES["he"]) is POLICIES["he"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 32, 48))

    def forward(self, x_EBD):
        return torch.einsum("ebd,edf->ebf", x_EBD, self.up)


class Transposed(nn.Module):
    """y = x w with the weight stored as [in, out]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(24, 72))

    def forward(self, x):
        return x @ self.weight


# model, input shape, parameter, fan-in, fan-out, both as counted on paper
CONTRACTIONS = {
    "linear": (nn.Linear(24, 40), (8, 24), "weight", 24, 40),
    "transposed": (Transposed(), (8, 24), "weight", 24, 72),
    "grouped": (nn.Conv2d(32, 64, 3, groups=4), (2, 32, 18, 18), "weight", 8 * 9, 16 * 9 * (16 / 18) ** 2),
    "depthwise": (nn.Conv1d(16, 16, 5, groups=16), (2, 16, 20), "weight", 5, 5 * 16 / 20),
    # Each output of a transposed convolution with kernel 4 and stride 2 adds up 2 x 2 taps.
    "upsampling": (nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1), (2, 16, 64, 64), "weight", 16 * 4 * (127 / 128) ** 2, None),
    "strided": (nn.Conv2d(16, 32, 2, stride=2), (2, 16, 8, 8), "weight", 16 * 4, 32),
    "experts": (Experts(), (4, 8, 32), "up", 32, 48),
}


@pytest.mark.parametrize("case", CONTRACTIONS)
def test_fans_are_counted_at_the_contraction(case):
    model, shape, name, fan_in, fan_out = CONTRACTIONS[case]

    def variance(policy):
        return solved(model, (torch.randn(shape),), policy).parameters[name].distribution.std ** 2

    assert variance("he") == pytest.approx(2 / fan_in, rel=1e-6)
    assert variance("lecun") == pytest.approx(1 / fan_in, rel=1e-6)
    if fan_out is not None:
        assert variance("glorot") == pytest.approx(2 / (fan_in + fan_out), rel=1e-6)


def test_zero_padding_counts():
    plan = solved(nn.Conv2d(16, 16, 3, padding=1), (torch.randn(2, 16, 7, 7),), "he")
    inside = (19 / 21) ** 2  # of three taps along 7 positions, two fall outside
    assert plan.parameters["weight"].distribution.std ** 2 == pytest.approx(2 / (144 * inside), rel=1e-6)


class Residual(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.first = nn.Embedding(50, 32)
        self.branches = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(depth))

    def forward(self, index):
        x = self.first(index)
        for branch in self.branches:
            x = x + branch(x)
        return x


def residual_stream(graph, uses):
    adds = [node for node in graph.nodes if node.op_name == "aten.add.Tensor"]
    ends = [as_role(uses, f"branches.{i}.1.weight", Role.RESIDUAL_END) for i in range(len(adds))]
    branches = tuple(Branch(operand=list(a.operands())[1], setters=(Setter(end),)) for a, end in zip(adds, ends, strict=True))
    return {"streams": (Stream(first="embedding", adds=tuple(a.name for a in adds), branches=branches),)}


def test_gpt2_divides_the_ends_of_residual_branches():
    plan = solved(Residual(4), (torch.randint(0, 50, (2, 8)),), "gpt2", add=residual_stream)
    assert plan.parameters["first.weight"].distribution.std == 0.02
    assert plan.parameters["branches.2.1.weight"].distribution.std == pytest.approx(0.02 / math.sqrt(4))
    assert "0.02 / sqrt(4) = 0.01" in plan.explain("branches.2.1.weight")


# Modules of torch.nn, wide enough that a sample's deviation is known to a few percent.
MODULES = [
    nn.Linear(300, 200), nn.Conv1d(60, 80, 5), nn.Conv2d(30, 40, 3, groups=2), nn.Conv3d(8, 16, 3),
    nn.ConvTranspose2d(20, 30, 3, groups=2), nn.LayerNorm(64), nn.BatchNorm2d(64), nn.GroupNorm(4, 64), nn.RMSNorm(64),
    nn.InstanceNorm1d(64, affine=True), nn.Embedding(200, 100), nn.EmbeddingBag(200, 100), nn.LSTM(50, 60, proj_size=30),
    nn.GRU(50, 60), nn.RNN(50, 60), nn.LSTMCell(50, 60), nn.MultiheadAttention(120, 4),
    nn.MultiheadAttention(120, 4, kdim=80, vdim=40, add_bias_kv=True), nn.Bilinear(40, 30, 20), nn.PReLU(40),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_torch_says_what_the_modules_draw(module):
    torch.manual_seed(0)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            kind = f"{type(part).__module__}.{type(part).__qualname__}"
            weight = getattr(part, "weight", None)
            info = _Info(name=name, shape=tuple(parameter.shape), module_type=kind)
            found = module_default(info, None if weight is None else tuple(weight.shape))
            values = torch.cat([_again(module, name, part).flatten() for _ in range(20)])
            # The deviation of n uniform or normal values strays by at most 1 / sqrt(2 n), relatively.
            margin = 5 / math.sqrt(2 * values.numel())
            assert float(values.mean()) == pytest.approx(found.mean, abs=margin * 2 * found.std + 1e-12), name
            assert float(values.std()) == pytest.approx(found.std, rel=margin, abs=1e-12), name
            if found.family is Family.UNIFORM:
                assert float(values.abs().max()) == pytest.approx(found.std * math.sqrt(3), rel=0.02), name


class _Info:
    def __init__(self, name, shape, module_type):
        self.name, self.shape, self.module_type = name, shape, module_type


def _again(module, name, part):
    """Draw a parameter anew, as construction does: parts first, then what nn.MultiheadAttention sets in them."""
    for each in reversed(list(module.modules())):
        reset = getattr(each, "_reset_parameters", None) or getattr(each, "reset_parameters", None)
        reset()
    return dict(part.named_parameters(recurse=False))[name].detach().clone()


def test_modules_of_others_are_not_guessed():
    class Linear(nn.Linear):
        pass

    graph = capture(Linear(4, 4), (torch.randn(2, 4),))
    assert module_default(graph.parameters["weight"], (4, 4)) is None
    plan = solved(Linear(4, 4), (torch.randn(2, 4),), "torch")
    assert plan.parameters["weight"].distribution.family is Family.KEEP
    assert "kept as they are: weight, bias" in plan.notes
