"""Two tasks on one trunk: whose gradient the trunk follows, what the loss weights make of it, and class priors in a head's bias.

python examples/tasks.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import gainstage as gs


class Digits(nn.Module):
    """Reads digits; says which one it is, and how much ink there is in each quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU())
        self.digit, self.ink = nn.Linear(128, 10), nn.Linear(128, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and ink."""
        h = self.trunk(x)
        return self.digit(h), self.ink(h)


def main() -> None:
    """Plan, draw, and look at the gradients of both tasks under two choices of loss weights."""
    data = load_digits()
    x, digits = torch.tensor(data.images, dtype=torch.float32)[:, None], torch.tensor(data.target)
    ink = F.avg_pool2d(x, 4).flatten(1)
    x = (x.flatten(1) - x.mean()) / x.std()
    keep = (digits < 2) | (torch.arange(len(x)) % 5 == 0)  # zeros and ones are five times as frequent as the others
    x, digits, ink = x[keep], digits[keep], ink[keep]

    model = Digits()
    plan = gs.initialize(model, (x[:256],), priors={"digit.bias": digits})
    print(plan.explain("digit.bias"))
    print(f"first loss: {F.cross_entropy(model(x)[0], digits):.3f}")
    losses = {"digit": lambda y: F.cross_entropy(y[0], digits[:256]), "ink": lambda y: F.mse_loss(y[1], ink[:256])}
    plain = gs.task_gradients(model, (x[:256],), losses=losses)
    print(plain)
    print(gs.task_gradients(model, (x[:256],), losses=losses, weights={row.task: row.balanced for row in plain.rows}))


if __name__ == "__main__":
    main()
