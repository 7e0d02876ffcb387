"""The networks of the comparison with neural-tangents in PyTorch, and their tables at a width that no memory would hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from benchmarks.neural_tangents import WIDTH, Layer, inputs
from torch import nn

from gainstage.capture import capture
from gainstage.graph import ParameterInfo
from gainstage.propagate import Signal, parameter_value, propagate
from gainstage.signal import Value, measured


class Erf(nn.Module):
    """The error function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Entry by entry."""
        return torch.erf(x)


class Residual(nn.Module):
    """A branch that is added to its input."""

    def __init__(self, branch: nn.Module) -> None:
        """Hold the branch."""
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add."""
        y: torch.Tensor = x + self.branch(x)
        return y


def predicted(layers: Sequence[Layer], *, is_map: bool, width: int = WIDTH) -> tuple[float, float]:
    """Ours: second moment and cosine between the two samples."""
    x = torch.tensor(inputs(is_map=is_map), dtype=torch.float64)
    x = x.permute(0, 3, 1, 2) if is_map else x
    variances: dict[str, float] = {}
    with torch.device("meta"):
        model = built(layers, x.shape[1], width, variances, "").double()
    graph = capture(model, (x,))
    index = {name: position for position, name in enumerate(graph.parameters)}

    def parameter(info: ParameterInfo) -> Value:
        mean = 1.0 if info.name not in variances else 0.0  # scales of norms
        return parameter_value(info, index[info.name], mean, variances.get(info.name, 0.0))

    signal = Signal(propagate(graph, parameter, lambda node: measured(node.value))[graph.outputs[0]])
    return signal.second_moment, signal.cosine(0)


def built(layers: Sequence[Layer], features: int, width: int, variances: dict[str, float], prefix: str) -> nn.Module:
    """The network in PyTorch; the variances of its parameters by name."""
    simple = {
        "relu": nn.ReLU, "gelu": nn.GELU, "erf": Erf, "norm": lambda: nn.LayerNorm(width, eps=0.0, elementwise_affine=False),
        "pool": lambda: nn.AvgPool2d(2), "global": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    }  # fmt: skip
    modules: list[nn.Module] = []
    for kind, *numbers in layers:
        name = f"{prefix}{len(modules)}"
        if kind in ("dense", "conv"):
            fan_in = features * (numbers[2] ** 2 if kind == "conv" else 1)
            variances[f"{name}.weight"], variances[f"{name}.bias"] = numbers[0] ** 2 / fan_in, numbers[1] ** 2
            modules.append(nn.Conv2d(features, width, numbers[2]) if kind == "conv" else nn.Linear(features, width))
            features = width
        elif kind == "residual":
            modules.append(Residual(built(numbers[0], features, width, variances, f"{name}.branch.")))
        else:
            modules.append(simple[kind]())
    return nn.Sequential(*modules)
