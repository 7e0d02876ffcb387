"""What depth does to the difference between two inputs: against mean-field recursions and real networks."""

import json
import math
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from scipy.integrate import quad
from torch import nn

import gainstage as gs
from gainstage.cli import main
from gainstage.findings import FindingKind
from gainstage.report.traces import trace_report

WIDTH = 256
X = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))


def plain(activation, depth, gain=None):
    """Default initialization, or weights of deviation ``gain / sqrt(n)`` without biases."""
    layers = []
    for _ in range(depth):
        linear = nn.Linear(WIDTH, WIDTH)
        if gain is not None:
            nn.init.normal_(linear.weight, 0.0, gain / WIDTH**0.5)
            nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers)


def linears(depth):
    return [station for station in depth.stations if station.module]


def measured_apart(model, x, draws=4):
    """``1 - cosine`` after every linear layer, in double precision, over draws."""
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        for module in model:
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        y, row = x.double(), []
        for module in model.double():
            y = module(y)
            if isinstance(module, nn.Linear):
                pairs = torch.cdist(y, y).square()
                row.append(float(pairs.sum() / (len(y) * (len(y) - 1)) / y.square().sum(1).mean() / 2.0))
        found.append(row)
    return torch.tensor(found, dtype=torch.float64).log().mean(0).exp().tolist()


def test_default_linear_layers_with_relu_cannot_tell_inputs_apart():
    torch.manual_seed(0)
    model = plain(nn.ReLU, 20)
    trace = gs.inspect(model, (X,))
    (finding,) = trace.findings
    assert finding.kind is FindingKind.INDISTINGUISHABLE
    predicted = [station.apart for station in linears(trace.depth)]
    with torch.no_grad():
        measured = measured_apart(plain(nn.ReLU, 20), X)
    for place in (2, 5, 8, 10):  # the log of one draw of this width strays by about a tenth a layer; four draws are averaged
        assert math.log(predicted[place]) == pytest.approx(math.log(measured[place]), abs=0.7), place
    assert predicted[19] < 1e-12
    assert measured[19] < 1e-12
    gone = next(station.module for station in linears(trace.depth) if station.apart < math.exp(-6))
    assert finding.where == gone
    assert "these 20 layers cannot tell inputs apart" in finding.evidence
    assert trace.depth.scale == pytest.approx(1.0 / math.log(6.0), rel=0.25)  # each layer leaves a sixth, when biases are small


def gaussian_mean(f):
    return quad(lambda z: f(z) * math.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi), -12.0, 12.0, limit=200)[0]


def tanh_growth(gain, depth):
    """Schoenholz et al. 2017, eq. 3 and 5: ``q' = w^2 E[tanh(sqrt(q) z)^2]``, ``chi = w^2 E[tanh'(sqrt(q) z)^2]``."""
    q, total = gain**2, 0.0
    for _ in range(depth - 1):
        chi = gain**2 * gaussian_mean(lambda z, q=q: (1.0 - math.tanh(math.sqrt(q) * z) ** 2) ** 2)
        after = gain**2 * gaussian_mean(lambda z, q=q: math.tanh(math.sqrt(q) * z) ** 2)
        total += math.log(chi * q / after)
        q = after
    return total


@pytest.mark.parametrize("gain", [1.5, 2.5, 4.0])
def test_differences_grow_through_tanh_as_mean_field_theory_says(gain):
    trace = gs.inspect(plain(nn.Tanh, 20, gain), (X,))
    grown = trace.depth.grown[-1]
    assert grown == pytest.approx(tanh_growth(gain, 20), rel=0.02)  # the weights' own second moments are 1/256 apart
    kinds = [finding.kind for finding in trace.findings]
    assert kinds == ([FindingKind.CHAOTIC] if grown > 6.0 else [])


def test_chaos_is_measured_on_the_real_network():
    torch.manual_seed(0)
    model = plain(nn.Tanh, 10, 2.5).double()
    trace = gs.inspect(model, (X.double(),))
    logs = []
    for _ in range(16):
        for module in model:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 2.5 / WIDTH**0.5)
        x = torch.randn(16, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            y, z = (model[:-1](v) for v in (x, x + 1e-7 * torch.randn_like(x)))
        logs.append(float(((z - y).square().mean() / y.square().mean()).log()) + 14.0 * math.log(10.0))
    assert sum(logs) / 16 == pytest.approx(trace.depth.grown[-1], abs=0.25)  # one draw strays by 0.4


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        return torch.relu(x + self.layers(x))


def residual():
    blocks = [Residual(16) for _ in range(8)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


HEALTHY = {
    "residual, training": (lambda: residual().train(), (8, 3, 16, 16)),
    "residual, evaluation": (lambda: residual().eval(), (8, 3, 16, 16)),
    "transformer": (
        lambda: nn.Sequential(*(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(6))),
        (4, 16, 64),
    ),
    "He, 20 layers": (lambda: plain(nn.ReLU, 20, math.sqrt(2.0)), (16, WIDTH)),
    "tanh on the edge": (lambda: plain(nn.Tanh, 20, 1.05), (16, WIDTH)),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_networks_that_train_have_no_finding(name):
    build, shape = HEALTHY[name]
    trace = gs.inspect(build(), (torch.randn(shape),))
    assert trace.depth is not None
    assert trace.findings == ()


def test_relu_at_its_own_gain_makes_inputs_alike_in_the_end():
    trace = gs.inspect(plain(nn.ReLU, 100, math.sqrt(2.0)), (X,))
    (finding,) = trace.findings
    assert finding.kind is FindingKind.INDISTINGUISHABLE
    assert "gs.tailor" in finding.remedy


def test_one_sample_says_nothing_of_two():
    trace = gs.inspect(plain(nn.ReLU, 20), (X[:1],))
    assert trace.depth is None
    assert trace.findings == ()


def test_findings_are_printed_and_in_the_plain_data(tmp_path):
    file = tmp_path / "dark.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n"
        "    layers = [m for _ in range(12) for m in (nn.Linear(32, 32), nn.ReLU())]\n"
        "    return nn.Sequential(*layers), (torch.randn(8, 32),)\n"
    )
    shown = CliRunner().invoke(main, ["inspect", f"{file}:build"])
    assert shown.exit_code == 0
    assert "inputs indistinguishable" in shown.output
    assert "depth scale" in shown.output
    data = json.loads(CliRunner().invoke(main, ["inspect", f"{file}:build", "--json"]).output)
    assert data["findings"][0]["kind"] == "inputs indistinguishable"
    assert all(a["erased"] <= b["erased"] for a, b in pairwise(data["depth"]["stations"]))
    console = Console(record=True, width=100)
    console.print(trace_report(gs.inspect(plain(nn.Tanh, 4, 1.0), (X,))))
    assert "the main path has 4" in console.export_text()
