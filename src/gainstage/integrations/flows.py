"""Normalizing flows of other libraries as modules that return what there is to plan: (z, log_determinant)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import nn

from gainstage.errors import InputError
from gainstage.integrations.actnorm import ActNorm, find_act_norms, replaced
from gainstage.integrations.continuous import first_order

Transform = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@final
class Flow(nn.Module):
    """A flow from data to noise, as one call: ``x -> (z, log |det dz/dx|)``, [batch, features] and [batch].

    It adds nothing to the flow and shares its parameters, under names that begin with ``flow.``: draw them through it,
    train the flow. A continuous flow it follows to first order in its velocity, which is all of it where it starts quietly.
    ActNorm layers that wait for a first batch count as what they will be then; :meth:`normalize` gives them one.

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
        self.waiting: tuple[bool, ...] = tuple(layer.is_waiting is not False for layer in find_act_norms(flow))

    def forward(self, x: torch.Tensor, *context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and the log-determinant of each sample."""
        with replaced((layer, layer.as_norm) for layer in self._waiting()):
            return self.transform(self.flow, x, *context)

    def normalize(self, x: torch.Tensor, *context: torch.Tensor) -> int:
        """Set the ActNorm layers from data, one after the other: each channel of their outputs gets mean 0 and variance 1.

        A channel that does not vary gets mean 0 and keeps its scale. Layers that were set before are set anew.

        Args:
            x: [batch, features], best many hundreds of samples of the data.
            context: as for the flow.

        Returns:
            How many layers there are.

        Raises:
            InputError: a batch of one, or values that are not finite.

        Example::

            plan = gs.initialize(flow, (x,), logdet_std=0.1)
            flow.normalize(x)
        """
        if len(x) < 2 or not bool(torch.isfinite(x).all()):
            raise InputError(f"normalize: two samples or more are needed, all of them finite; given was a batch of {len(x)}")
        layers = find_act_norms(self.flow)
        with torch.no_grad(), replaced((layer, layer.set_from) for layer in layers):
            self.transform(self.flow, x, *context)
        return len(layers)

    def _waiting(self) -> list[ActNorm]:
        """ActNorm layers whose first batch is still to come, as far as was last known where this is a capture.

        In training the first batch comes now, and the layers do themselves what they do with it.
        """
        layers = find_act_norms(self.flow)
        known = [layer.is_waiting for layer in layers]
        if None not in known:
            self.waiting = tuple(map(bool, known))
            if self.training:
                return []
        return [layer for layer, is_waiting in zip(layers, self.waiting, strict=True) if is_waiting]


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
