"""Learning rates that move every parameter by a thousandth of its size in the first step, whatever the optimizer.

python examples/learning_rates.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import gainstage as gs


def main() -> None:
    """Print the groups, take one step, and print how far each parameter moved."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10)
    )
    x, labels = torch.randn(256, 64), torch.randint(0, 10, (256,))
    plan = gs.initialize(model, (x,))

    groups = gs.param_groups(model, plan, relative_update=1e-3, optimizer="adamw", weight_decay=0.1)
    for group in groups:
        names = ", ".join(name for name, _ in group["params"])
        print(f"lr {group['lr']:.3g}, weight decay {group['weight_decay']:g}: {names}")

    optimizer = torch.optim.AdamW(groups)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        size = before[name].square().mean().sqrt() or size_of_output(plan, name)
        moved = (parameter.detach() - before[name]).square().mean().sqrt() / size
        print(f"{name} moved by {moved:.2e}")


def size_of_output(plan: gs.Plan, bias: str) -> float:
    """A bias that starts from zeros is compared with the planned level of what it is added to."""
    return float(plan.predictions[bias.removesuffix(".bias") + "@0"][0] ** 0.5)


if __name__ == "__main__":
    main()
