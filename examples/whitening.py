"""A first layer that undoes the correlations of its data: measured in one pass, drawn, and looked at on rows it has not seen.

python examples/whitening.py
"""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import gainstage as gs


def main() -> None:
    """Print how the first layer was planned, and what it makes of data with and without whitening."""
    torch.manual_seed(0)
    data = torch.tensor(load_breast_cancer().data, dtype=torch.float32)  # 30 measures of 569 cells, in units from .001 to 1000
    data = data[torch.randperm(len(data))]
    seen, unseen = data[:400], data[400:]
    model = nn.Sequential(nn.Linear(30, 30), nn.GELU(), nn.Linear(30, 2))

    stats = gs.measure_inputs(seen.split(64))
    print(stats)
    for name, inputs in (("independent weights", None), ("whitened", stats)):
        plan = gs.initialize(model, (seen[:64],), inputs=inputs)
        outputs = model[0](unseen).detach().T
        pairs = torch.corrcoef(outputs)[~torch.eye(30, dtype=torch.bool)]
        spread = outputs.var(1)
        print(
            f"{name}: variances {spread.min():.2g} to {spread.max():.2g}, mean square {outputs.square().mean():.2g}, "
            f"mean correlation {pairs.abs().mean():.2f}"
        )
    print(plan.explain("0.weight"))
    print(plan.explain("0.bias"))


if __name__ == "__main__":
    main()
