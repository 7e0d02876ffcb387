"""ActNorm layers of nflows and normflows: affine maps of channels that the first batch normalises (Kingma & Dhariwal 2018).

Until that batch has come they are taken for what they will be then, a normalisation over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_LEAST = 1e-6  # deviation over the root mean square: below it a channel of single-precision numbers does not vary


@dataclass(frozen=True, slots=True)
class ActNorm:
    """One such layer.

    ``step``: the method that goes from data to noise. ``plain``: the same without a first batch. ``flag``: the buffer that
    says whether it came. ``write``: takes means and deviations, [channels].
    """

    layer: Any
    step: str
    plain: Step
    flag: str
    write: Callable[[torch.Tensor, torch.Tensor], None]

    @property
    def is_waiting(self) -> bool | None:
        """Whether the first batch is still to come; None where the values of buffers are not to be had, as in a capture."""
        flag = getattr(self.layer, self.flag)
        return None if type(flag) is not torch.Tensor or flag.is_meta else not bool(flag)

    def set_from(self, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what normalises this batch, and do the step."""
        mean, deviation = _moments(x)
        with torch.no_grad():
            self.write(mean, deviation)
            getattr(self.layer, self.flag).fill_(1)
        return self.plain(x, *rest)

    def as_norm(self, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The step after a normalisation over this batch.

        What that adds to the log-determinant is the data's, the same for all samples and draws; a capture leaves it out.
        """
        mean, deviation = _moments(x)
        shape = (1, -1, *(1,) * (x.dim() - 2))
        z, determinant = self.plain((x - mean.view(shape)) / deviation.view(shape), *rest)
        return z, determinant if torch.compiler.is_exporting() else determinant - x[0, 0].numel() * deviation.log().sum()


def find_act_norms(flow: nn.Module) -> tuple[ActNorm, ...]:
    """All layers of these kinds, in the order of the flow's modules."""
    return tuple(_KINDS[kind](layer) for layer in flow.modules() if (kind := _kind(layer)) in _KINDS)


@contextmanager
def replaced(layers: Iterable[tuple[ActNorm, Step]]) -> Iterator[None]:
    """Have the layers do another step."""
    known = list(layers)
    try:
        for found, step in known:
            found.layer.__dict__[found.step] = step
        yield
    finally:
        for found, _ in known:
            found.layer.__dict__.pop(found.step, None)


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel; 1 for one that does not vary, whose logarithm would be infinite."""
    dims = (0, *range(2, x.dim()))
    mean, deviation = x.mean(dims), x.std(dims)
    size = (mean.square() + deviation.square()).sqrt()
    return mean, torch.where(deviation > _LEAST * size, deviation, torch.ones_like(deviation))


def _kind(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _nflows(layer: Any) -> ActNorm:
    """``exp(log_scale) x + shift``."""

    def plain(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scale, shift = layer._broadcastable_scale_shift(x)
        determinant = x[0, 0].numel() * layer.log_scale.sum() * x.new_ones(len(x))
        return scale * x + shift, determinant

    def write(mean: torch.Tensor, deviation: torch.Tensor) -> None:
        layer.log_scale.copy_(-deviation.log())
        layer.shift.copy_(-mean / deviation)

    return ActNorm(layer, "forward", plain, "initialized", write)


def _normflows(layer: Any) -> ActNorm:
    """``(x - t) exp(-s)``."""

    def write(mean: torch.Tensor, deviation: torch.Tensor) -> None:
        layer.s.copy_(deviation.log().view_as(layer.s))
        layer.t.copy_(mean.view_as(layer.t))

    return ActNorm(layer, "inverse", partial(super(type(layer), layer).inverse), "data_dep_init_done", write)


_KINDS: dict[str, Callable[[Any], ActNorm]] = {
    "nflows.transforms.normalization.ActNorm": _nflows,
    "normflows.flows.normalization.ActNorm": _normflows,
}
