"""Branches that merge: who is heard, by the usual rule, by a plan, and as asked.

python examples/branches.py
"""

import torch
from torch import nn

import gainstage as gs


class Paths(nn.Module):
    """Three paths of unequal widths that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Sequential(nn.Linear(128, n), nn.ReLU(), nn.Linear(n, 128)) for n in (32, 128, 512))
        self.paths[2].append(nn.ReLU())
        self.last = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        found = [path(x) for path in self.paths]
        logits: torch.Tensor = self.last(sum(found[1:], found[0]))
        return logits


def main() -> None:
    """Shares of the summed second moments."""
    torch.manual_seed(0)
    model, x = Paths(), torch.randn(1024, 128)
    report("as torch draws it", model, x)
    plan = gs.initialize(model, (x,))
    report("planned", model, x)
    print(plan.explain("paths.2.2.weight"))
    gs.initialize(model, (x,), policy=gs.policies.unit(branch_shares={"paths.0.*": 2.0}))
    report("the first twice as loud", model, x)


def report(title: str, model: Paths, x: torch.Tensor) -> None:
    """Measured on one draw."""
    with torch.no_grad():
        levels = [float(path(x).square().mean()) for path in model.paths]
    print(f"{title}: " + ", ".join(f"{level / sum(levels):.0%}" for level in levels))


if __name__ == "__main__":
    main()
