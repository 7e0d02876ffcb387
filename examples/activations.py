"""Gains of activations that have no entry in any table.

python examples/activations.py
"""

import torch
from torch import nn

import gainstage as gs


def main() -> None:
    """Functions, modules, slopes of channels, noise; then a network of one of them, kept at level 1."""
    torch.manual_seed(0)
    slopes = nn.PReLU(3)
    with torch.no_grad():
        slopes.weight.copy_(torch.tensor([0.25, -0.5, 2.0]))
    for name, f in {"x sin x": snake, "slopes .25, -.5 and 2": slopes, "RReLU": nn.RReLU(), "GELU": nn.functional.gelu}.items():
        print(f"{name}: gain {gs.gain(f):.4f}, backward {gs.gain(f, backward=True):.4f}")
    try:
        gs.gain(lambda z: 1 / z)
    except gs.InputError as error:
        print(f"1/x: {error}")

    model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(256, 256), Snake())), nn.Linear(256, 10))
    x = torch.randn(512, 256)
    for title, draw in {"torch": lambda: None, "planned": lambda: gs.initialize(model, (x,))}.items():
        draw()
        with torch.no_grad():
            level = float(model[:39](x).square().mean())
        print(f"{title}: second moment before the 20th activation {level:.3g}")


class Snake(nn.Module):
    """``x sin x``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Entry by entry."""
        return snake(x)


def snake(x: torch.Tensor) -> torch.Tensor:
    """``x sin x``."""
    return x * torch.sin(x)


if __name__ == "__main__":
    main()
