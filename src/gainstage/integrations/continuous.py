"""Continuous flows of zuko to first order in their velocity: what a graph can hold, and all that counts where they start quietly.

A flow ``dx/dt = f(t, x)`` has ``d log det/dt = tr df/dx``. Its solver looks at values to choose its steps, and differentiates.
Along a path that hardly moves, x(t) = x to first order, and with the mean over times t_k that lie evenly between both ends

    z = x + T mean of f(t_k, x),      log det = T mean of tr df/dx(t_k, x)

The trace is carried forward, one direction for each feature, beside the network's own values: through a linear layer by its
weight, through an activation times its slope, a central difference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import activation

from gainstage.errors import InputError

_TIMES = 16  # cosines of up to three half turns, as zuko has them, have a mean that is exact
_STEP = 1e-2  # of the central difference


def first_order(transform: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and the log-determinant of each sample.

    Args:
        transform: a ``FreeFormJacobianTransform`` of zuko, as its ``FFJTransform`` makes it.
        x: [batch, features].

    Raises:
        InputError: a network with layers that are neither linear nor activations.
    """
    module, context = transform.f.func.__self__, transform.f.keywords["c"]
    span = transform.t1 - transform.t0
    times = transform.t0 + span * (torch.arange(_TIMES, device=x.device, dtype=x.dtype) + 0.5) / _TIMES
    angles = module.freqs * times[:, None]
    shape = (len(x), _TIMES)
    parts = [torch.cat([angles.cos(), angles.sin()], -1).expand(*shape, -1), x[:, None].expand(*shape, -1)]
    if context is not None:
        parts.append(context[:, None].expand(*shape, -1))
    eye = torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
    before = parts[0].shape[-1]
    velocity, moved = _carried(
        module.ode, torch.cat(parts, -1), F.pad(eye, (before, module.ode.in_features - before - x.shape[-1]))
    )
    return x + span * velocity.mean(1), span * (moved * eye).sum((-1, -2)).mean(1)


def _carried(network: nn.Module, h: torch.Tensor, moved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a network makes of its input, and of small moves of it, one for each row of ``moved``."""
    for layer in network.children():
        weight = getattr(layer, "weight", None)
        if type(layer).__name__ == "Linear" and isinstance(weight, torch.Tensor):
            h = layer(h)  # first: it is the values that a weight is planned for
            moved = F.linear(moved, weight)
        elif type(layer).__module__ == activation.__name__:
            slope = (layer(h + _STEP) - layer(h - _STEP)) / (2.0 * _STEP)
            h, moved = layer(h), moved * slope[..., None, :]
        else:
            raise InputError(
                f"{type(layer).__name__} in the network of a continuous flow is neither linear nor an activation: say with "
                "transform= how z and the log-determinant are computed"
            )
    return h, moved
