"""Density estimation with a flow of zuko: its own initialization against a log-determinant that starts at a stated deviation.

python examples/flows.py
"""

import torch
import zuko
from sklearn.datasets import load_breast_cancer

import gainstage as gs

STEPS, SEEDS = 150, 3


def train(flow: torch.nn.Module, seen: torch.Tensor, unseen: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood of rows that were not seen, now and then."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    found = []
    for step in range(STEPS + 1):
        if step in (0, 10, 50, STEPS):
            with torch.no_grad():
                found.append(-float(flow().log_prob(unseen).mean()))
        loss = -flow().log_prob(seen[torch.randint(len(seen), (128,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def main() -> None:
    """Train both on ten measures of cells, over three seeds."""
    data = torch.tensor(load_breast_cancer().data[:, :10], dtype=torch.float32)
    data = (data - data.mean(0)) / data.std(0)
    seen, unseen = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))].split([400, len(data) - 400])
    results: dict[str, list[list[float]]] = {"zuko's own": [], "logdet_std=0.1": []}
    for seed in range(SEEDS):
        for name, found in results.items():
            torch.manual_seed(seed)
            flow = zuko.flows.MAF(10, transforms=5, hidden_features=(64, 64))
            if name != "zuko's own":
                wrapped = gs.Flow(flow)
                plan = gs.initialize(wrapped, (seen,), logdet_std=0.1, seed=seed)
                gs.calibrate(wrapped, plan, (seen,))
            with torch.no_grad():
                determinant = gs.Flow(flow)(unseen)[1]
            print(f"{name}, seed {seed}: log det {determinant.mean():.2f} +- {determinant.std():.2f} at the start")
            found.append(train(flow, seen, unseen))
    print("negative log-likelihood of unseen rows before steps 0, 10, 50 and at the end, mean over seeds")
    for name, found in results.items():
        print(f"{name}: {', '.join(f'{value:.2f}' for value in torch.tensor(found).mean(0).tolist())}")


if __name__ == "__main__":
    main()
