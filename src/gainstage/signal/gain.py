"""The gain of an activation, ``1 / sqrt(E[f(z)^2])`` for z standard normal, for any function of one tensor.

The integral is taken by bisection: an interval is halved until two halves say the same as the whole. Smooth stretches are done
at once, while kinks and jumps are closed in on from both sides, so that nothing has to be known about the function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import nn

from gainstage.errors import InputError

Function = Callable[[torch.Tensor], torch.Tensor]

# Normal variables beyond 12 have probability 4e-33; a function that grows fast enough to matter there is followed to 36, where
# the density is 1e-282 and float64 still has digits for the product of both.
_DOMAIN, _LARGE_DOMAIN = 12.0, 36.0
_TOLERANCE = 1e-8  # of one interval, relative to the whole: a thousand such errors are 1e-5
_REFUSED = 1e-3  # a result whose estimated error is larger is none: the gain would be off by half of it
_WIDTH = 0.125  # of the intervals at first: what is wider than 0.01 is seen; common kinks (0, 1/2, 3, 6) are between two of them
_DEPTH = 40  # halvings: closer to a jump float64 has no more points
_INTERVALS = 2**14  # a function with more kinks than that is noise


def gain(f: Function | nn.Module, *, backward: bool = False) -> float:
    """``1 / sqrt(E[f(z)^2])``, z standard normal: what the following layer's standard deviation is to be multiplied with.

    A layer with fan-in n whose weights have deviation ``gain / sqrt(n)`` then keeps the second moment of its input before the
    activation at 1 (He et al. 2015, arXiv:1502.01852, eq. 10, for ReLU). Over z; nothing else is random.

    Args:
        f: entry by entry: a tensor to a tensor of the same shape. A module is used with its present parameters and mode.
        backward: return ``1 / sqrt(E[f'(z)^2])``, which keeps the gradient's second moment; f' as autograd has it.

    Returns:
        the gain: sqrt 2 for ReLU, 1.5335 for GELU, 1.5925 for tanh (1.4673 backward). The relative error is below 1e-4.

    Raises:
        InputError: f has no finite, positive gain, is random, or is no function of one entry; the message says which.

    Example:
        >>> round(gain(torch.relu), 4)
        1.4142
    """
    if not callable(f):
        raise InputError(f"gain takes a function of a tensor or a module, not {type(f).__name__}")
    with torch.device("cpu"):  # whatever the caller made the default
        evaluate = _entrywise(f, backward=backward)
        total = _integrate(evaluate, _DOMAIN)
        if total is None:
            total = _integrate(evaluate, _LARGE_DOMAIN)
    what = "f'(z)" if backward else "f(z)"
    if total is None:
        raise InputError(f"{_name(f)} has no finite gain: E[{what}^2] is infinite, or {what} too irregular to be integrated")
    if total <= 0.0:
        raise InputError(f"{_name(f)} has no finite gain: {what} is 0 for every z")
    return 1.0 / math.sqrt(total)


def _name(f: Function | nn.Module) -> str:
    return str(getattr(f, "__name__", "") or type(f).__name__)


def _entrywise(f: Function | nn.Module, *, backward: bool) -> Function:
    """``f`` or its derivative in float64, after a look whether it is one at all."""
    call = _in_float64(f)
    points = torch.linspace(-5.0, 5.0, 64, dtype=torch.float64) + 0.0123  # off the places where kinks are usually put
    with torch.random.fork_rng(devices=[]):
        first, again, part = call(points), call(points), call(points[:23])
    if not torch.equal(first, again) and not bool(first.isnan().any()):
        raise InputError(f"{_name(f)} is random: it has a gain only with its mask or noise turned off (module.eval())")
    if not torch.allclose(first[:23], part, rtol=1e-6, atol=1e-9, equal_nan=True):
        raise InputError(f"{_name(f)} is no function of one entry: its value depends on the other entries of the tensor")
    if not backward:
        return lambda z: call(z).detach()

    def slope(z: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = z.clone().requires_grad_()
            value = call(leaf)
            if not value.requires_grad:
                raise InputError(f"{_name(f)} has no derivative: autograd does not follow it")
            return torch.autograd.grad(value.sum(), leaf)[0]

    return slope


def _in_float64(f: Function | nn.Module) -> Function:
    """Call ``f`` on float64; where it insists on another type, as a closure over float32 tensors does, on float32."""
    raw: Function = f
    if isinstance(f, nn.Module):
        state: Mapping[str, torch.Tensor] = {
            name: tensor.detach().double() if tensor.is_floating_point() else tensor.clone()
            for name, tensor in (*f.named_parameters(), *f.named_buffers())
        }
        module = f
        raw = lambda z: torch.func.functional_call(module, dict(state), (z,))  # noqa: E731

    def call(z: torch.Tensor) -> torch.Tensor:
        try:
            value = raw(z.clone())
        except Exception as error:  # noqa: BLE001  (a user's function raises what it likes)
            try:
                value = raw(z.to(torch.float32))
            except Exception:  # noqa: BLE001  (the first refusal is the one to tell)
                raise InputError(f"{_name(f)} cannot be called on a tensor of shape {list(z.shape)}: {error}") from error
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{_name(f)} returns {type(value).__name__}; a gain is that of a function from tensor to tensor")
        if value.shape != z.shape:
            raise InputError(f"{_name(f)} changes the shape {list(z.shape)} to {list(value.shape)}; a gain is of one entry")
        if value.is_complex():
            raise InputError(f"{_name(f)} returns complex values, which have no gain")
        return value.double()

    return call


@cache
def _rule() -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Legendre points and weights on [0, 1]."""
    points, weights = np.polynomial.legendre.leggauss(8)
    return torch.from_numpy((points + 1.0) / 2.0), torch.from_numpy(weights / 2.0)


def _integrate(f: Function, domain: float) -> float | None:
    """``E[f(z)^2]`` over [-domain, domain]; None where the ends still matter or the intervals get too many."""
    width = _WIDTH
    starts = torch.arange(-domain / width, domain / width, dtype=torch.float64) * width
    wholes = _parts(f, starts, width)
    ends = float(wholes[[0, 1, -2, -1]].abs().sum())
    total, unsettled = 0.0, 0.0
    for _ in range(_DEPTH):
        width /= 2.0
        halves = torch.stack([starts, starts + width], dim=1)
        parts = _parts(f, halves.reshape(-1), width).reshape(-1, 2)
        error = (parts.sum(1) - wholes).abs()
        scale = total + float(parts.sum())
        if not math.isfinite(scale):
            return None
        settled = error <= _TOLERANCE * scale
        total += float(parts[settled].sum())
        starts, wholes, unsettled = halves[~settled].reshape(-1), parts[~settled].reshape(-1), float(error[~settled].sum())
        if starts.numel() == 0 or starts.numel() > _INTERVALS:
            break
    total += float(wholes.sum())
    if ends > _TOLERANCE * total or (starts.numel() and unsettled > _REFUSED * total):
        return None
    return total


def _parts(f: Function, starts: torch.Tensor, width: float) -> torch.Tensor:
    """Integral of ``f(z)^2`` with the normal density over [start, start + width] for each start.

    Raises:
        InputError: f is not a number somewhere.
    """
    points, weights = _rule()
    z = starts[:, None] + width * points
    values = f(z.reshape(-1)).reshape(z.shape)
    if bool(values.isnan().any()):
        raise InputError(f"the function has no gain: it is not a number at z = {float(z[values.isnan()][0]):.4g}")
    root_density = (0.25 * z**2).neg().exp() * (2.0 * math.pi) ** -0.25  # on f, so that its square does not overflow first
    squares: torch.Tensor = (values * root_density).square()
    return width * torch.mv(squares, weights)
