"""Networks of 100 layers without norms and without skips, trained on the digits that scikit-learn ships.

python examples/deep_plain.py [--steps 200] [--only relu,gelu,conv] [--json FILE]

Three starts for each network, each at the best of a few learning rates: PyTorch's default, the plan "unit", and the plan
"isometric" after gs.tailor, which the user asks for. Printed are the mean training loss of every tenth of the steps and the test
accuracy.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import gainstage as gs

DEPTH = 100
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def connected(activation: Callable[[], nn.Module], depth: int = DEPTH, width: int = 64) -> nn.Sequential:
    """Fully connected."""
    layers = [layer for n in [64] + [width] * (depth - 1) for layer in (nn.Linear(n, width), activation())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


def convolutional(depth: int = DEPTH, channels: int = 16) -> nn.Sequential:
    """Convolutions 3 x 3 on maps of 8 x 8."""
    layers = [
        layer
        for n in [1] + [channels] * (depth - 1)
        for layer in (nn.Conv2d(n, channels, 3, padding=1, padding_mode="circular"), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * channels, 10))


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "relu": lambda: connected(nn.ReLU),
    "gelu": lambda: connected(nn.GELU),
    "conv": convolutional,
}


def digits() -> Data:
    """Images [1, 8, 8] of mean 0 and deviation 1, three quarters of them for training."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float().reshape(-1, 1, 8, 8), torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = ((x - x.mean()) / x.std())[order], y[order]
    cut = 3 * len(x) // 4
    return x[:cut], y[:cut], x[cut:], y[cut:]


def started(network: Callable[[], nn.Sequential], start: str, x: torch.Tensor) -> nn.Sequential:
    """The network with its first weights; "isometric" changes its activations as well."""
    torch.manual_seed(0)
    model = network()
    if start == "unit":
        gs.initialize(model, (x,), policy="unit")
    elif start == "isometric":
        gs.tailor(model, gs.plan(model, (x,), policy="isometric"))
        gs.initialize(model, (x,), policy="isometric")
    return model


def trained(model: nn.Sequential, data: Data, rate: float, steps: int) -> tuple[list[float], float]:
    """Adam; the training loss of every step, and the test accuracy at the end."""
    x, y, test_x, test_y = data
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        batch = torch.randint(0, len(x), (64,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, (model(test_x).argmax(1) == test_y).double().mean().item()


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    data, rows = digits(), []
    for name in options.only.split(","):
        for start in ("default", "unit", "isometric"):
            model, runs = started(NETWORKS[name], start, data[0][:256]), []
            for rate in RATES:
                losses, accuracy = trained(copy.deepcopy(model), data, rate, options.steps)
                tenth = max(options.steps // 10, 1)
                curve = [sum(losses[i : i + tenth]) / tenth for i in range(0, len(losses) - tenth + 1, tenth)]
                runs.append({"rate": rate, "curve": curve, "accuracy": accuracy})
            best = min(runs, key=lambda run: run["curve"][-1])
            rows.append({"network": name, "start": start, "steps": options.steps, **best})
            curve = " ".join(f"{loss:.2f}" for loss in best["curve"])
            print(f"{name:5} {start:10} rate {best['rate']:<6g} accuracy {best['accuracy']:.1%}  loss {curve}", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
