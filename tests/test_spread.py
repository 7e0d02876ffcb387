"""The predicted spread against the deviation over many real draws of weights and inputs."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import gainstage as gs
from gainstage.findings import FindingKind
from gainstage.report.checks import check_report
from gainstage.signal import apply, contract, filter_dim, independent, mean_over, normalise, stray
from gainstage.signal.quadrature import nodes, stray_passed, weights

DRAWS = 400


def chain(width, depth, act):
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width, bias=False), act())])


class StochasticDepth(nn.Module):
    def forward(self, x):
        return x * torch.empty(x.shape[0], 1).bernoulli_(0.7) / 0.7


class Look(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(6, 16)
        self.register_buffer("ids", torch.tensor([[0, 1, 2, 3, 4, 5, 0, 0], [1, 1, 2, 0, 4, 1, 0, 3]]))

    def forward(self, x):
        return self.rows(self.ids) + 0.0 * x[0, 0]


def pooled():
    sizes = [(3, 16), (16, 16), (16, 16)]
    layers = [layer for a, b in sizes for layer in (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))


def depthwise():
    layers = [
        layer
        for _ in range(3)
        for layer in (
            nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False), nn.BatchNorm2d(16), nn.SiLU(),
            nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16),
        )
    ]  # fmt: skip
    stem = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
    return nn.Sequential(*stem, *layers, nn.SiLU(), nn.AdaptiveAvgPool2d(1))


class LastNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.linear(self.norm(x.permute(0, 2, 3, 1)))


def strided(is_normed):
    """Patches without a pixel in common, then a kernel over many of them, each channel for itself."""
    layers = [nn.Conv2d(3, 16, 2, stride=2, bias=False), nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False)]
    return nn.Sequential(*layers, LastNorm() if is_normed else nn.Conv2d(16, 16, 1, bias=False))


def skewed():
    """A norm evens out the channels of a sum of nine terms, but for their shapes."""
    stem = (nn.Conv2d(3, 24, 1, bias=False), nn.SiLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False))
    return nn.Sequential(*stem, nn.BatchNorm2d(24), nn.SiLU())


def narrow():
    """A narrow layer without an activation: all channels behind it are sums of the same terms, as skewed as in it."""
    layers = [nn.Conv2d(64, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(16), nn.Conv2d(16, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU())


class Branch(nn.Module):
    """Without a norm the branch has the level of the stream, whatever that is in this draw."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False))

    def forward(self, x):
        return x + self.branch(x)


class Two(nn.Module):
    """Two branches: of one trunk, both are loud or both quiet; of a trunk each, side by side, one is often as loud as both."""

    def __init__(self, trunks):
        super().__init__()
        self.trunks = nn.ModuleList([nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(4)]) for _ in range(trunks)])
        self.first, self.second = nn.Linear(16, 64, bias=False), nn.Linear(16, 64, bias=False)

    def forward(self, x):
        if len(self.trunks) == 2:
            return torch.cat([self.first(self.trunks[0](x)), self.second(self.trunks[1](x))], -1)
        x = self.trunks[0](x)
        return self.first(x) * F.relu(self.second(x))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rows(batch, width):
    return lambda: (torch.randn(batch, width),)


def maps(batch, channels, size):
    return lambda: (torch.randn(batch, channels, size, size),)


CASES = {
    # name: (model, inputs, tolerance of the log of the deviation beyond the sampling error)
    "linear chain": (lambda: chain(32, 8, nn.Identity), rows(64, 32), 0.1),
    "relu chain": (lambda: chain(48, 6, nn.ReLU), rows(64, 48), 0.1),
    "relu chain, one sample": (lambda: chain(48, 6, nn.ReLU), rows(1, 48), 0.1),
    "tanh chain": (lambda: chain(32, 4, nn.Tanh), rows(32, 32), 0.1),
    "one layer of many inputs": (lambda: nn.Linear(64, 4, bias=False), rows(512, 64), 0.1),
    "convolution": (lambda: nn.Conv2d(4, 8, 3, bias=False), maps(8, 4, 16), 0.1),
    "depthwise convolution": (lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), maps(8, 8, 16), 0.1),
    "strided transposed convolution": (lambda: nn.ConvTranspose2d(4, 8, 4, stride=2, padding=1, bias=False), maps(8, 4, 8), 0.1),
    "dropped channels": (lambda: nn.Dropout2d(0.3), maps(2, 8, 8), 0.1),
    "dropped samples": (lambda: nn.Sequential(nn.Linear(32, 64, bias=False), StochasticDepth()), rows(16, 32), 0.1),
    "embedding": (Look, rows(1, 16), 0.1),
    "pooled": (pooled, maps(4, 3, 12), 0.1),
    "pooled depthwise": (depthwise, maps(2, 3, 12), 0.1),
    "channels of different shapes": (skewed, maps(2, 3, 32), 0.1),
    "channels of the same terms": (narrow, maps(2, 64, 24), 0.1),
    "average of neighbours": (lambda: nn.Sequential(nn.AvgPool2d(9, 1), nn.Conv2d(4, 64, 1, bias=False)), maps(1, 4, 24), 0.1),
    "strided kernel that overlaps": (lambda: strided(False), maps(2, 3, 32), 0.1),
    "kernel over channels_last tokens": (lambda: strided(True), maps(2, 3, 32), 0.1),
    "gate": (Gated, rows(32, 32), 0.1),
    "branches without norms": (lambda: nn.Sequential(*[Branch() for _ in range(6)]), rows(32, 32), 0.1),
    "product of branches": (lambda: Two(1), rows(32, 16), 0.1),
    "side by side": (lambda: Two(2), rows(32, 16), 0.1),
}


def redraw(model):
    """Normal weights of He's deviation: what the predicted spread is about; uniform entries stray less."""
    for parameter in (p for p in model.parameters() if p.dim() > 1):
        fan_in = 1 if isinstance(model, Look) else parameter[0].numel()
        nn.init.normal_(parameter, std=math.sqrt(2.0 / fan_in))


def strayed(model, inputs):
    logs = []
    with torch.no_grad():
        for _ in range(DRAWS):
            redraw(model)
            logs.append(math.log(float(model(*inputs()).square().mean())))
    return float(np.std(logs, ddof=1))


def test_uniform_weights_stray_less_than_normal_ones():
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16, bias=False), torch.randn(256, 16)
    levels = []
    with torch.no_grad():
        for _ in range(1000):
            layer.reset_parameters()
            levels.append(math.log(float(layer(x).square().mean())))
    predicted = gs.inspect(layer, (x,), gradients=False).calls[-1].outputs[0].spread
    assert abs(math.log(predicted / np.std(levels))) <= 0.05 + 4.0 / math.sqrt(2.0 * 1000)
    nn.init.normal_(layer.weight, std=0.25)
    normal = gs.inspect(layer, (x,), gradients=False).calls[-1].outputs[0].spread
    assert normal > 1.4 * predicted  # 2 / n against 0.8 / n


@pytest.mark.parametrize("function", [torch.relu, F.gelu, torch.tanh])
@pytest.mark.parametrize("variance", [0.04, 4.0])
def test_a_stray_level_is_passed_on_by_the_whole_of_the_function(function, variance):
    torch.manual_seed(0)
    z, t = torch.randn(1, 20001, dtype=torch.float64), torch.randn(4000, 1, dtype=torch.float64)
    scale = torch.exp(0.5 * (variance**0.5 * t - variance / 2.0))
    found = torch.cat([function(part * z).square().mean(1).log() for part in scale.split(500)]).var()
    with torch.no_grad():
        after = function(torch.from_numpy(nodes())).numpy()
    passed = stray_passed(nodes(), after, variance)
    assert passed == pytest.approx(float(found), rel=4.0 * (2.0 / 4000) ** 0.5 + 0.05)  # sampling; nine points of a bent curve
    assert function is not torch.relu or passed == pytest.approx(variance)


@pytest.mark.parametrize("function", [F.silu, torch.relu])
def test_averages_stray_by_what_all_entries_have_in_common(function):
    """Of entries that are known to a factor only: averages over many go with their mean, rows that sum to 0 see the rest."""
    torch.manual_seed(0)
    x = independent((2, 256, 64, 64), 0.0, 1.0, stray=stray.of(9e-4))
    y = apply(function, x)
    levels = torch.exp(0.015 * torch.randn(2000, dtype=torch.float64))[:, None] * torch.from_numpy(nodes())
    mass = torch.from_numpy(weights())
    mean, second = (function(levels) ** power @ mass for power in (1, 2))
    pooled = filter_dim(filter_dim(y, 2, np.full((1, 64), 1 / 64)), 3, np.full((1, 64), 1 / 64))
    at_once = mean_over(y, [y.axes[2], y.axes[3]])
    rows = independent((256, 64), 0.0, 1.0, is_weight=True)
    rows = normalise(rows, rows.axes[:1], 0.0)
    seen = contract(y, rows, "bcij", "co", "boij")
    seen_pooled = contract(filter_dim(y, 2, np.kron(np.eye(32), np.full((1, 2), 0.5))), rows, "bcij", "co", "boij")
    for value, level in (
        (y, second), (pooled, mean**2), (at_once, mean**2), (seen, second - mean**2), (seen_pooled, second - mean**2),
    ):  # fmt: skip
        assert value.log_variance == pytest.approx(float(level.log().var()), rel=4.0 * (2.0 / 2000) ** 0.5)


@pytest.mark.parametrize("name", CASES)
def test_the_spread_is_the_deviation_of_the_log_over_draws(name):
    make, inputs, tolerance = CASES[name]
    torch.manual_seed(0)
    model = make()
    redraw(model)
    predicted = gs.inspect(model, inputs(), gradients=False).calls[-1].outputs[0].spread
    found = strayed(model, inputs)
    sampling = 4.0 / math.sqrt(2.0 * DRAWS)  # four standard errors of the log of a standard deviation
    assert abs(math.log(predicted / found)) <= tolerance + sampling


def test_what_a_whole_draw_has_in_common():
    """Where levels stray, the square of the mean over all entries is on average more than the square of its average."""

    def net():
        return nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(48, 48, bias=False), nn.SiLU())])

    def drawn(seed):
        torch.manual_seed(seed)
        made = net()
        for layer in made[::2]:
            nn.init.normal_(layer.weight, std=(1.0 if layer is made[0] else 2.81) ** 0.5 / 48**0.5)
        return made, torch.randn(32, 48)

    signals = [gs.inspect(model, (x,), gradients=False).calls[-1].outputs[0].value for model, x in map(drawn, range(4))]
    predicted = np.mean([signal.table[0, 0] / signal.mean**2 for signal in signals])
    with torch.no_grad():
        means = np.array([float(model(x).double().mean()) for model, x in map(drawn, range(DRAWS))])
    found = np.mean(means**2) / np.mean(means) ** 2
    parts = [np.mean(part**2) / np.mean(part) ** 2 for part in np.split(means, 10)]
    error = np.std(parts, ddof=1) / 10**0.5
    assert abs(predicted - found) < 0.5 * (found - 1.0) + 2 * error, (predicted, found, error)  # levels are not quite log-normal
    assert found - 1.0 > 5 * error


def test_a_spread_without_bounds_leaves_levels_finite():
    """A hundred layers of GELU: draws differ by more than any law of small deviations says, and the plan is one all the same."""
    layers = [layer for _ in range(100) for layer in (nn.Linear(32, 32), nn.GELU())]
    plan = gs.plan(nn.Sequential(*layers, nn.Linear(32, 4)), (torch.randn(64, 32),))
    assert all(0.0 < part.std < 1.0 for name, p in plan.parameters.items() if "weight" in name for part in p.distributions)
    assert all(np.isfinite(spread).all() for spread in plan.spreads.values())


def test_levels_that_no_draw_has_are_no_numbers_to_go_by():
    """Sixty narrow layers of ReLU: draws stray by factors of 70; of four layers by 3."""
    torch.manual_seed(0)
    deep, shallow = chain(16, 60, nn.ReLU), chain(16, 4, nn.ReLU)
    for model, is_lost in ((deep, True), (shallow, False)):
        x, last = torch.randn(64, 16), str(len(model) - 2)
        plan = gs.initialize(model, (x,), seed=1, policy="unit")
        check = gs.verify(model, (x,), plan=plan)
        shown = rendered(check_report(check))
        assert check.ok
        assert any("large spread" in note for note in plan.notes) is is_lost
        assert ("draws that stray by factors beyond 20" in plan.explain(f"{last}.weight")) is is_lost
        assert ("any: draws stray" in shown and "> 3" in shown) is is_lost
        found = [finding for finding in gs.inspect(model, (x,)).findings if finding.kind is FindingKind.LARGE_SPREAD]
        assert [finding.where != "" and not finding.kind.is_fault for finding in found] == [True] * is_lost
    assert "draws that stray" not in plan.explain("2.weight")


def rendered(report):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report)
    return console.export_text()


def test_what_hardly_grows_with_a_level_strays_by_nothing_not_by_less():
    for variance in (0.01, 0.1, 0.5):
        assert 0.0 <= stray_passed(nodes(), 1.0 / (1.0 + np.exp(-1e-6 * nodes())), variance) < 1e-12


def test_a_patch_of_a_smooth_map_is_read_as_fewer_numbers():
    """What neighbouring taps have in common makes patches alike by chance: their mean square cosine is no longer one over n."""
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        patches = F.unfold(F.avg_pool2d(torch.randn(8, 3, 34, 34).double(), 3, 1), 8, stride=8).transpose(1, 2)
        products = torch.einsum("apc,bqc->apbq", patches, patches)
        apart = ~torch.eye(8, dtype=torch.bool)
        found.append(float((products.permute(0, 2, 1, 3)[apart] ** 2).mean() / patches.square().sum(-1).mean() ** 2))
    model = nn.Sequential(nn.AvgPool2d(3, 1), nn.Conv2d(3, 16, 8, 8, bias=False))
    overlap = gs.inspect(model, (torch.randn(8, 3, 34, 34),), gradients=False).modules["1"][0].value.overlap
    assert np.std(found) / len(found) ** 0.5 < 0.01 * np.mean(found)
    assert overlap.variance == pytest.approx(np.mean(found), rel=0.03)  # 1/192, a quarter of it, of independent ones
