"""Density estimation with a flow of zuko: its own initialization against a log-determinant that starts at a stated deviation.

python examples/flows.py [--steps 150]
"""

import argparse
from collections.abc import Callable

import torch
import zuko
from sklearn.datasets import load_breast_cancer

import gainstage as gs

SEEDS = 3

Start = Callable[[torch.nn.Module, torch.Tensor, int, float], torch.optim.Optimizer]


def from_library(flow: torch.nn.Module, seen: torch.Tensor, seed: int, rate: float) -> torch.optim.Optimizer:  # noqa: ARG001
    """As zuko starts it, with one rate."""
    return torch.optim.Adam(flow.parameters(), lr=rate)


def from_plan(flow: torch.nn.Module, seen: torch.Tensor, seed: int, rate: float) -> torch.optim.Optimizer:
    """Planned, calibrated, and with a rate for each parameter."""
    wrapped = gs.Flow(flow)
    plan = gs.initialize(wrapped, (seen,), logdet_std=0.1, seed=seed)
    gs.calibrate(wrapped, plan, (seen,))
    return torch.optim.Adam(gs.param_groups(wrapped, plan, relative_update=rate, norm="spectral", optimizer="adam"))


# Three rates each, so that neither start is measured at one that does not suit it.
STARTS: dict[str, tuple[Start, tuple[float, ...]]] = {
    "zuko's own": (from_library, (3e-3, 1e-2, 3e-2)),
    "logdet_std=0.1": (from_plan, (0.03, 0.1, 0.3)),
}


def train(
    flow: torch.nn.Module, optimizer: torch.optim.Optimizer, seen: torch.Tensor, unseen: torch.Tensor, looks: list[int]
) -> list[float]:
    """Mean negative log-likelihood of rows that were not seen, before these steps."""
    found = []
    for step in range(looks[-1] + 1):
        if step in looks:
            with torch.no_grad():
                found.append(-float(flow().log_prob(unseen).mean()))
        loss = -flow().log_prob(seen[torch.randint(len(seen), (128,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def main() -> None:
    """Train both on ten measures of cells, over three seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    looks = [*(step for step in (0, 10, 50, 100) if step < steps), steps]
    data = torch.tensor(load_breast_cancer().data[:, :10], dtype=torch.float32)
    data = (data - data.mean(0)) / data.std(0)
    seen, unseen = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))].split([400, len(data) - 400])
    print(f"negative log-likelihood of unseen rows before steps {looks}, mean over {SEEDS} seeds")
    for name, (start, rates) in STARTS.items():
        for rate in rates:
            found = []
            for seed in range(SEEDS):
                torch.manual_seed(seed)
                flow = zuko.flows.MAF(10, transforms=5, hidden_features=(64, 64))
                optimizer = start(flow, seen, seed, rate)
                if rate == rates[0]:
                    with torch.no_grad():
                        determinant = gs.Flow(flow)(unseen)[1]
                    print(f"{name}, seed {seed}: log det {determinant.mean():.2f} +- {determinant.std():.2f} at the start")
                found.append(train(flow, optimizer, seen, unseen, looks))
            print(f"{name}, {rate:g}: {', '.join(f'{value:.2f}' for value in torch.tensor(found).mean(0).tolist())}")


if __name__ == "__main__":
    main()
