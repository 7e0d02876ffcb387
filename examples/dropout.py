"""Twenty layers of dropout: where the second moment goes by the usual rule, and by a plan.

python examples/dropout.py
"""

import torch
from torch import nn

import gainstage as gs


def main() -> None:
    """He's rule keeps the level without dropout; with it every layer multiplies by 1/(1 - p)."""
    for p in (0.1, 0.5, 0.75):
        torch.manual_seed(0)
        layers = [layer for _ in range(20) for layer in (nn.Linear(512, 512), nn.ReLU(), nn.Dropout(p))]
        model = nn.Sequential(*layers, nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)).train()
        x = torch.randn(512, 512)
        for policy in ("he", "unit"):
            plan = gs.initialize(model, (x,), policy=policy)
            with torch.no_grad():
                level = float(model[:61](x).square().mean())
            print(f"p = {p}, {policy}: second moment after 20 layers {level:.3g}")
        print(plan.explain("3.weight"))


if __name__ == "__main__":
    main()
