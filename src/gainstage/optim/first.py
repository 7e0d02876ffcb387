"""What a law of a first update is, and what it may know of a parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# A float32 backward pass leaves up to a tenth of this, relative to the largest entries, where the gradient is zero: at
# the biases of attention's keys, and in front of norms.
ROUNDING = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """One parameter before its first step.

    Args:
        shape: of the parameter.
        dtype: its element type.
        rms: root mean square of its entries, as planned; 0 where it starts from zeros.
        gradient_rms: that of the first gradient, predicted or measured; None where it is not known or is zero.
        gradient: the first gradient itself, where it was measured. Both include the decay that is added to gradients.
        settings: those of the optimizer that the law depends on.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rms: float
    gradient_rms: float | None = None
    gradient: torch.Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> torch.Tensor | None:
        """Where the measured gradient is more than a rounding error."""
        if self.gradient is None:
            return None
        sizes = self.gradient.abs()
        return sizes > ROUNDING * sizes.max()


def unchanged(start: Start) -> Mapping[str, Any]:
    """The settings as they were given."""
    return start.settings


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstUpdate:
    """How far one optimizer moves a parameter in its first step.

    Args:
        name: of the optimizer, as ``param_groups`` takes it.
        magnitude: rms of the first update at learning rate 1, over the entries that the gradient reaches, without weight decay.
        derivation: the formula, and where it is from.
        settings: options of the optimizer that the magnitude depends on, with the optimizer's own defaults.
        settings_for: changes them for one parameter.
        needs_gradient: nothing can be said without the size of the first gradient.
        is_decay_decoupled: decay takes ``lr * weight_decay`` of the parameter; otherwise it is added to the gradient.
        largest_rate: beyond which the first update does not grow.
        rest: the optimizer of the parameters that are no hidden matrices, where this one takes no others.

    Example::

        law = gs.FirstUpdate(name="tiger", magnitude=lambda start: 1.0, derivation="sign of an average", is_decay_decoupled=True)
        groups = gs.param_groups(model, plan, optimizer=law)
    """

    name: str
    magnitude: Callable[[Start], float]
    derivation: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    settings_for: Callable[[Start], Mapping[str, Any]] = unchanged
    needs_gradient: bool = False
    is_decay_decoupled: bool = False
    largest_rate: float = math.inf
    rest: str | None = None
