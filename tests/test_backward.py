"""Gradients: predicted second moments against autograd over many draws of weights and inputs, and against closed forms."""

import math

import pytest
import torch
from gradients import assert_gradients_agree, measured_gradients, predicted_gradients
from torch import nn
from torch.nn import functional as F

import gainstage as gs
from gainstage.errors import InputError

WIDTH = 96


class Residual(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


class Attention(nn.Module):
    def __init__(self, width=WIDTH, heads=4, *, causal=False):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (part.reshape(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class WrittenAttention(Attention):
    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, c))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("ids", torch.arange(48).reshape(4, 12) % 17)

    def forward(self, x):
        return self.head(self.table(self.ids)) * x


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 192), nn.Linear(WIDTH, 192), nn.Linear(192, WIDTH)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 24, 1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x):
        return torch.cat([self.a(x).relu(), self.b(x)], dim=1)[:, 4:28].mean((2, 3))


class Dense(nn.Module):
    """A pooled part, most of which is the channel's mean, beside a fresh one: what a norm leaves of them differs."""

    def __init__(self):
        super().__init__()
        self.old, self.new = nn.Conv2d(32, 24, 1, bias=False), nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(48), nn.Conv2d(48, 32, 1)

    def forward(self, x):
        old = F.max_pool2d(self.old(x).relu(), 2)
        return self.head(self.norm(torch.cat([old, self.new(old)], dim=1)).relu())


class ZeroBranch(nn.Module):
    """Half the entries of x are zeros that a ReLU left, and the branch adds nothing to them."""

    def __init__(self):
        super().__init__()
        self.first, self.branch, self.norm = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        x = self.first(x).relu()
        return (x + self.norm(self.branch(x))).relu()


def transition():
    """The gradient is the same for the four places of a window."""
    return nn.Sequential(
        nn.Conv2d(32, 32, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 32, 1),
    )


def conv_chain():
    layers = []
    for _ in range(3):
        layers += [nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers)


def mlp(activation):
    return nn.Sequential(nn.Linear(WIDTH, 256), activation(), nn.Linear(256, 256), activation(), nn.Linear(256, 8))


def convolutions(first, second, activation=nn.ReLU):
    return nn.Sequential(first, activation(), second)


def feed_forward():
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 192), nn.GELU(), nn.Linear(192, WIDTH))


class Windows(nn.Module):
    """A layer on windows that overlap."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(4 * WIDTH, 32)

    def forward(self, x):
        return self.last(self.first(x).relu().unfold(1, 4, 2).flatten(2))


def pooled_head():
    return nn.Sequential(nn.Conv2d(32, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 9))


rows, tokens, image = (32, WIDTH), (4, 12, WIDTH), (8, 32, 10, 10)
# name: module, shape of the input, largest log error of a parameter's gradient moment beyond 3.5 standard errors. The rules
# are of leading order in the width: what is left is a few times 1/32 for the narrow maps, 1/96 for the tokens.
CASES = {
    "relu mlp": (lambda: mlp(nn.ReLU), rows, 0.03),
    "tanh mlp": (lambda: mlp(nn.Tanh), rows, 0.03),
    "dropout": (lambda: nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 64)), rows, 0.03),
    "prelu": (lambda: nn.Sequential(nn.Linear(WIDTH, 128), nn.PReLU(), nn.Linear(128, 64)), rows, 0.03),
    "strided": (lambda: convolutions(nn.Conv2d(32, 48, 3, 2, 1), nn.Conv2d(48, 64, 3), nn.GELU), image, 0.04),
    "grouped": (lambda: convolutions(nn.Conv2d(32, 64, 3, 1, 1, groups=4), nn.Conv2d(64, 64, 3, groups=64)), image, 0.05),
    "transposed": (lambda: convolutions(nn.ConvTranspose2d(32, 24, 4, 2, 1), nn.Conv2d(24, 8, 1)), image, 0.05),
    "batch norm": (conv_chain, image, 0.05),
    "max pool": (lambda: nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 1)), image, 0.05),
    "pooled head": (pooled_head, image, 0.05),
    "layer norm": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32)), rows, 0.04),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(32, 32, 1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 8, 1)), image, 0.05),
    "residual": (lambda: nn.Sequential(*[Residual(feed_forward()) for _ in range(3)]), tokens, 0.05),
    "attention": (Attention, tokens, 0.06),
    "causal attention": (lambda: Attention(causal=True), tokens, 0.08),
    "attention, written out": (WrittenAttention, tokens, 0.06),
    "look-up": (Tokens, tokens, 0.04),
    "windows": (Windows, tokens, 0.04),
    "gated": (SwiGLU, tokens, 0.05),
    "branches": (Branches, (8, 16, 7, 7), 0.06),
    "concatenation": (Dense, image, 0.06),
    "zero branch": (ZeroBranch, image, 0.05),
    "transition": (transition, image, 0.05),
    "strided, normalised": (
        lambda: nn.Sequential(nn.Conv2d(32, 48, 3, 2, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 32, 1)),
        image,
        0.05,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_parameters(case):
    build, shape, tolerance = CASES[case]
    assert_gradients_agree(predicted_gradients(build, shape), measured_gradients(build, shape, 40), tolerance)


def test_a_wrong_prediction_is_noticed():
    build, shape, tolerance = CASES["relu mlp"]
    wrong = {name: 1.3 * value for name, value in predicted_gradients(build, shape).items()}
    with pytest.raises(AssertionError):
        assert_gradients_agree(wrong, measured_gradients(build, shape, 40), tolerance)


LABELS = torch.arange(32) % 10
TARGETS = torch.randn(32, 10, generator=torch.Generator().manual_seed(5))
LOSSES = {
    "cross-entropy": lambda y: F.cross_entropy(y, LABELS),
    "smoothed": lambda y: F.cross_entropy(y, LABELS, label_smoothing=0.1),
    "ignored": lambda y: F.cross_entropy(y, LABELS.masked_fill(LABELS < 3, -100)),
    "likelihood": lambda y: F.nll_loss(y.log_softmax(-1), LABELS),
    "mean square": lambda y: F.mse_loss(y, torch.ones(32, 10)),
    "binary": lambda y: F.binary_cross_entropy_with_logits(y, F.one_hot(LABELS, 10).float()),
    "by hand": lambda y: (y - TARGETS).pow(2).mean(),
    "alignment": lambda y: F.ctc_loss(
        y.view(8, 4, 10).log_softmax(-1), LABELS[1:13].view(4, 3), torch.full((4,), 8), torch.full((4,), 3)
    ),
    "without a rule": lambda y: F.smooth_l1_loss(y, 3.0 * TARGETS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_start_from_the_loss(name):
    def build():
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    predicted = predicted_gradients(build, (32, 64), LOSSES[name])
    assert_gradients_agree(predicted, measured_gradients(build, (32, 64), 60, LOSSES[name]), 0.05)


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(InputError, match=r"a tensor of shape \(4, 3\).*not a single number"):
        gs.inspect(nn.Linear(5, 3), (torch.randn(4, 5),), loss=lambda y: y)


def gradient_of(trace, path):
    return trace.modules[path][0].gradient.second_moment


def test_relu_layers_keep_the_gradient_at_he_initialization():
    model = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(512, 512, bias=False), nn.ReLU())])
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(2 / 512) ** 0.5)
    trace = gs.inspect(model, (torch.randn(8, 512),))
    # 0.5 n Var(w) = 1 per layer; Var(w) is that of one draw of 512 x 512, so it strays by (2 / 512^2)^0.5 = 0.3 % per layer.
    assert gradient_of(trace, "2") / gradient_of(trace, "22") == pytest.approx(1.0, abs=0.04)


def test_batch_norm_grows_gradients_by_1_47_per_relu_layer():
    # G. Yang et al. 2019, arXiv:1902.08129: (pi / (pi - 1)) = 1.467 for ReLU and large batches.
    model = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(400, 400, bias=False), nn.BatchNorm1d(400), nn.ReLU())])
    trace = gs.inspect(model, (torch.randn(512, 400),))
    growth = (gradient_of(trace, "6") / gradient_of(trace, "24")) ** (1 / 6)
    assert growth == pytest.approx(math.pi / (math.pi - 1), rel=0.02)


def test_layer_norm_divides_the_gradient_by_its_inputs_deviation():
    model = nn.Sequential(nn.Identity(), nn.LayerNorm(256))
    x = 7.0 * torch.randn(16, 256)
    trace = gs.inspect(model, (x,))
    # The mean and the part along the output go: 2 of 256 directions; E[1 / s^2] is 2 / 256 above 1 / E[s^2].
    expected = (1 - 2 / 256) * (1 + 2 / 256) / float(x.var())
    found = next(signal for name, signal in trace.nodes.items() if trace.graph.by_name[name].kind.value == "input")
    assert found.gradient.second_moment == pytest.approx(expected, rel=0.01)


def test_gradients_are_left_out_on_request():
    model, args = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), (torch.randn(8, 16),)
    whole, forward = gs.inspect(model, args), gs.inspect(model, args, gradients=False)
    assert {name: signal.second_moment for name, signal in forward.nodes.items()} == {
        name: signal.second_moment for name, signal in whole.nodes.items()
    }
    assert all(signal.gradient is None for signal in forward.nodes.values())
    assert all(statistics.gradient_second_moment is None for statistics in forward.parameters.values())
    assert forward.depth is None
    assert whole.depth is not None


def test_gradients_end_at_detach_and_unused_parameters_have_none():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(self.first(x).detach())

    trace = gs.inspect(Detached(), (torch.randn(4, 8),))
    assert trace.parameters["second.weight"].gradient_second_moment > 0
    assert trace.parameters["first.weight"].gradient_second_moment is None
