"""Normalizing flows of other libraries as modules that return what there is to plan: (z, log_determinant)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn

from gainstage.errors import InputError
from gainstage.integrations.continuous import first_order

Transform = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@final
class Flow(nn.Module):
    """A flow from data to noise, as one call: ``x -> (z, log |det dz/dx|)``, [batch, features] and [batch].

    It adds nothing to the flow and shares its parameters, under names that begin with ``flow.``: draw them through it,
    train the flow. A continuous flow it follows to first order in its velocity, which is all of it where it starts quietly.

    Args:
        flow: of zuko (a lazy distribution), nflows (a flow or a transform) or normflows (a flow).
        transform: for any other: a function of the flow, the data and the context that returns both.

    Raises:
        InputError: a flow of another library, without ``transform``.

    Example::

        flow = zuko.flows.MAF(8, transforms=3)
        gs.initialize(gs.Flow(flow), (x,), logdet_std=0.1)
    """

    def __init__(self, flow: nn.Module, transform: Transform | None = None) -> None:
        super().__init__()
        library = type(flow).__module__.partition(".")[0]
        if transform is None and library not in _TRANSFORMS:
            raise InputError(
                f"{type(flow).__name__} is no flow of {', '.join(_TRANSFORMS)}; say with transform= how it is called: "
                "lambda flow, x: flow.forward_and_log_det(x)"
            )
        self.flow = flow
        self.transform = transform or _TRANSFORMS[library]

    def forward(self, x: torch.Tensor, *context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and the log-determinant of each sample."""
        return self.transform(self.flow, x, *context)


def _zuko(flow: Any, x: torch.Tensor, *context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from zuko.transforms import FreeFormJacobianTransform  # noqa: PLC0415  (an extra)

    transform = flow(*context).transform
    z, determinant = first_order(transform, x) if isinstance(transform, FreeFormJacobianTransform) else transform.call_and_ladj(x)
    return z, determinant


def _nflows(flow: Any, x: torch.Tensor, *context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from nflows.flows import Flow as NFlow  # noqa: PLC0415  (an extra)

    transform = flow._transform if isinstance(flow, NFlow) else flow
    z, determinant = transform(x, *context)
    return z, determinant


def _normflows(flow: Any, x: torch.Tensor, *context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z, determinant = flow.inverse_and_log_det(x, *context)
    return z, determinant


_TRANSFORMS: dict[str, Transform] = {"zuko": _zuko, "nflows": _nflows, "normflows": _normflows}
