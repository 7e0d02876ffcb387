"""A change to an activation that a plan proposes, and the module that makes it. Nothing changes before the user asks for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import nn

from gainstage.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationPlan:
    """``gamma f(alpha x + beta) + delta`` in the place of f, for one activation module.

    ``negative_slope``: f is then LeakyReLU of this slope, in the place of a ReLU or of another slope.

    Raises:
        InputError: numbers that are not finite.
    """

    module: str
    module_type: str
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 1.0
    delta: float = 0.0
    negative_slope: float | None = None
    derivation: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no function."""
        for name, number in self.numbers.items():
            if not math.isfinite(number):
                raise InputError(f"{name} of the activation {self.module!r} is {number}; it must be finite")

    @property
    def numbers(self) -> Mapping[str, float]:
        """What the change consists of, by name."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in given.items() if isinstance(value, float)}

    @property
    def formula(self) -> str:
        """The change in one line."""
        kind = self.module_type.rpartition(".")[2]
        name = kind if self.negative_slope is None else f"LeakyReLU[{self.negative_slope:.4g}]"
        inner = "x" if (self.alpha, self.beta) == (1.0, 0.0) else f"{self.alpha:.4g} x {self.beta:+.4g}"
        outer = f" {self.delta:+.4g}" if self.delta else ""
        return f"{self.gamma:.4g} {name}({inner}){outer}"

    def __str__(self) -> str:
        """Header and derivation, as :meth:`Plan.explain` shows them."""
        head = f"{self.module}  {self.module_type}\n{self.formula}, if you ask for it: gainstage.tailor(model, plan)"
        return "\n".join([head, *(f"  {line}" for line in self.derivation)])


class TailoredActivation(nn.Module):
    """``gamma f(alpha x + beta) + delta`` for an activation f.

    The numbers stand in the state dict, so that weights are not loaded silently into a network with another activation.
    """

    def __init__(self, activation: nn.Module, *, alpha: float, beta: float, gamma: float, delta: float) -> None:
        """Hold the activation and the four numbers."""
        super().__init__()
        self.activation = activation
        self.alpha, self.beta, self.gamma, self.delta = alpha, beta, gamma, delta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Entry by entry."""
        y: torch.Tensor = self.gamma * self.activation(self.alpha * x + self.beta) + self.delta
        return y

    def extra_repr(self) -> str:
        """The four numbers."""
        return f"alpha={self.alpha:.6g}, beta={self.beta:.6g}, gamma={self.gamma:.6g}, delta={self.delta:.6g}"

    def get_extra_state(self) -> torch.Tensor:
        """The four numbers, for the state dict."""
        return torch.tensor([self.alpha, self.beta, self.gamma, self.delta], dtype=torch.float64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Compare with those of a state dict.

        Raises:
            InputError: they are others; the weights belong to another network.
        """
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise InputError(
                f"the state dict holds weights for an activation with alpha, beta, gamma, delta = {state.tolist()}, but this one "
                f"has {self.extra_repr()}: tailor the model with the plan that those weights were trained with"
            )
