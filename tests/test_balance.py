"""Which direction a weight keeps levels in: closed forms on paper, and autograd on real models."""

import math
import re
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad
from torch import nn

import gainstage as gs
from gainstage.capture import capture
from gainstage.errors import InputError, UnknownNameError
from gainstage.graph import NodeKind
from gainstage.propagate.interpret import resolve
from gainstage.signal import is_multiple

WIDTHS = (48, 64, 128, 32, 10)


def chain(activation):
    pairs = pairwise(WIDTHS)
    layers = [layer for n, m in pairs for layer in (nn.Linear(n, m), activation())]
    return nn.Sequential(*layers[:-1])


def hidden_variances(model, x, balance):
    plan = gs.plan(model, (x,), balance=balance)
    return [p.distribution.std**2 for p in plan.parameters.values() if p.role == "hidden"]


# Over a ReLU half of the second moment is left, and half of the gradient's; the first weight has nothing before it.
@pytest.mark.parametrize(("activation", "left"), [(nn.Identity, 1.0), (nn.ReLU, 0.5)])
def test_chains_come_out_as_in_the_papers(activation, left):
    """Glorot & Bengio 2010, eq. 10 and 11, for linear layers; He et al. 2015, eq. 10 and 14, for ReLU."""
    pairs = list(pairwise(WIDTHS))[:-1]  # the last is a head
    lefts = [1.0, left, left]
    forward = [1.0 / (n * r) for (n, _), r in zip(pairs, lefts, strict=True)]
    backward = [1.0 / (m * r) for (_, m), r in zip(pairs, lefts, strict=True)]
    both = [math.sqrt(v * w) for v, w in zip(forward, backward, strict=True)]
    x = torch.randn(16, WIDTHS[0])
    for balance, expected in (("forward", forward), ("backward", backward)):
        assert hidden_variances(chain(activation), x, balance) == pytest.approx(expected, rel=2e-3)  # the solver's 1e-3, twice
    # Levels differ from one here, and a homogeneous activation does not mind: v_f is then divided by them.
    level, wanted = 1.0, []
    for v, w in zip(forward, backward, strict=True):
        wanted.append(math.sqrt(v / level * w))
        level *= wanted[-1] / v
    assert hidden_variances(chain(activation), x, "geometric") == pytest.approx(wanted, rel=3e-3)
    assert both[0] == pytest.approx(wanted[0])


def test_the_slope_of_tanh_is_that_at_the_level_that_arrives():
    """``v = 1 / (n_out E[tanh'(s z)^2])``, s^2 the second moment before the tanh."""
    first, second, *_ = hidden_variances(chain(nn.Tanh), torch.randn(16, WIDTHS[0]), "backward")
    s = math.sqrt(WIDTHS[0] * first)

    def integrand(z):
        return (1.0 - math.tanh(s * z) ** 2) ** 2 * math.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi)

    assert first == pytest.approx(1.0 / WIDTHS[1], rel=2e-3)
    assert second == pytest.approx(1.0 / (WIDTHS[2] * quad(integrand, -12, 12)[0]), rel=2e-3)


def test_a_look_up_and_a_head_keep_their_meaning():
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 10))
    tokens = (torch.randint(0, 50, (4, 8)),)
    forward, backward = (gs.plan(model, tokens, balance=balance) for balance in ("forward", "backward"))
    assert backward.parameters["0.weight"] == forward.parameters["0.weight"]
    assert forward.parameters["0.weight"].passage is None
    assert backward.parameters["1.weight"].distribution.std ** 2 == pytest.approx(1 / 96, rel=2e-3)
    assert backward.predictions["@0"] == pytest.approx(forward.predictions["@0"], rel=2e-3)  # near chance, by the head


def test_the_explanation_says_what_the_other_direction_pays():
    plan = gs.plan(chain(nn.ReLU), (torch.randn(16, WIDTHS[0]),))
    assert "E[x^2] is multiplied by 1, and E[g^2] by 2 on the way back" in plan.explain("2.weight")
    assert plan.to_dict()["parameters"]["2.weight"]["passage"]["backward"] == pytest.approx(2.0, rel=2e-3)
    backward = gs.plan(chain(nn.ReLU), (torch.randn(16, WIDTHS[0]),), balance="backward")
    assert "n_out = 128; s^2 = 0.5" in backward.explain("2.weight")
    assert "E[x^2] is multiplied by 0.5, and E[g^2] by 1 on the way back" in backward.explain("2.weight")
    assert gs.Plan.from_json(backward.to_json()) == backward
    assert backward.to_dict()["balance"] == "backward"


def test_what_cannot_be_balanced_is_refused():
    model, x = chain(nn.ReLU), torch.randn(16, WIDTHS[0])
    with pytest.raises(UnknownNameError, match=r"no balance 'bakward' .nearest: backward"):
        gs.plan(model, (x,), balance="bakward")
    with pytest.raises(InputError, match="policy 'he' sets no levels"):
        gs.plan(model, (x,), balance="backward", policy="he")


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.conv1(torch.relu(x))))


def convolutional(activation):
    layers = []
    for n, m, stride in ((3, 32, 1), (32, 48, 2), (48, 32, 1), (32, 64, 1)):
        layers += [nn.Conv2d(n, m, 3, stride=stride, padding=1), activation()]
    return nn.Sequential(*layers[:6], nn.MaxPool2d(2), *layers[6:], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def residual():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), *[Block(32) for _ in range(4)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


def transformer():
    layer = nn.TransformerEncoderLayer(64, 4, 160, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


MODELS = {
    "gelu": (lambda: convolutional(nn.GELU), (8, 3, 16, 16)),
    "tanh": (lambda: convolutional(nn.Tanh), (8, 3, 16, 16)),
    "residual": (residual, (8, 3, 16, 16)),
    "transformer": (transformer, (8, 16, 64)),
}
DRAWS = 8


def measured_passage(graph, parameters, origin, output, x):
    """``E[g_o^2]`` by autograd, for independent gradients of second moment 1 at the output."""
    values = {}
    for node in graph.nodes:
        if node.parameter is not None:
            value = parameters[node.parameter].detach()
        elif node.kind is NodeKind.INPUT:
            value = x
        elif node.kind is NodeKind.CONSTANT:
            value = node.value
        else:
            arguments = [resolve(argument, values) for argument in node.args]
            value = node.op(*arguments, **{name: resolve(argument, values) for name, argument in node.kwargs.items()})
        if node.name == origin:
            value = value.detach().requires_grad_()
        values[node.name] = value
        if node.name == output:
            break
    (gradient,) = torch.autograd.grad(value, values[origin], torch.randn_like(value))
    return float(gradient.square().mean())


@pytest.mark.parametrize("balance", ["forward", "backward"])
@pytest.mark.parametrize("name", MODELS)
def test_passages_are_those_that_autograd_measures(name, balance):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    plan = gs.plan(model, (x,), balance=balance)
    graph = capture(model, (x,))
    reads = {node.parameter: node.name for node in graph.nodes if node.parameter is not None}
    passages = {n: p.passage for n, p in plan.parameters.items() if p.passage is not None and p.distribution.std > 0.0}
    assert len(passages) >= 5
    sums = dict.fromkeys(passages, 0.0)
    for seed in range(DRAWS):
        gs.apply(model, plan, seed=seed)
        parameters = dict(model.named_parameters())
        for parameter, passage in passages.items():
            origin = re.search(r"(\w+)\)?$", passage.origin)[1]
            output = next(node.name for node in graph.nodes if reads[parameter] in node.operands())
            sums[parameter] += measured_passage(graph, parameters, origin, output, torch.randn(shape)) / DRAWS
    for parameter, passage in passages.items():
        # A head's gradient is made of its 640 weights: the mean of so many squares strays by sqrt(2 / 640) = 5.6 %.
        assert sums[parameter] == pytest.approx(passage.backward, rel=0.17), parameter
        if balance == "backward" and plan.parameters[parameter].role == "hidden":
            assert passage.backward == pytest.approx(1.0, rel=2e-3)


class Gated(nn.Module):
    """A norm by hand, read by two weights of different widths and, through the other's activation, by none."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(24, 48), nn.Linear(16, 48)
        self.scale, self.wide, self.narrow = nn.Parameter(torch.ones(48)), nn.Linear(48, 80), nn.Linear(48, 16)
        self.out = nn.Linear(80, 16)

    def forward(self, x):
        x = self.enter(x)
        y = self.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x + self.leave(torch.tanh(self.out(torch.relu(self.wide(y)))) * self.narrow(y))


def test_a_way_that_two_weights_have_in_common_is_gone_once(monkeypatch):
    x, asked = torch.randn(8, 24), []
    monkeypatch.setattr("gainstage.solve.passage.is_multiple", lambda g, other: asked.append(is_multiple(g, other)) or asked[-1])
    once = gs.plan(Gated(), (x,))
    monkeypatch.setattr("gainstage.solve.passage.is_multiple", lambda g, other: False)
    twice = gs.plan(Gated(), (x,))
    assert any(asked)
    for name, parameter in twice.parameters.items():
        if parameter.passage is not None:
            assert once.parameters[name].passage.backward == pytest.approx(parameter.passage.backward, rel=1e-12), name
