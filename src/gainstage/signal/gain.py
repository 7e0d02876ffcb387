"""The gain of an activation, ``1 / sqrt(E[f(z)^2])`` for z standard normal, for any function of one tensor.

The integral is taken by division: an interval is cut until its parts say the same as the whole. Smooth stretches are done at
once, while kinks and jumps are closed in on from both sides, so that nothing has to be known about the function. The fewer
intervals are left, the more parts each is cut into: a call of the function costs more than the points that it is called on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import nn

from gainstage.errors import InputError
from gainstage.signal.quadrature import Array

Function = Callable[[torch.Tensor], torch.Tensor]

# Normal variables beyond 12 have probability 4e-33; a function that grows fast enough to matter there is followed to 36, where
# the density is 1e-282 and float64 still has digits for the product of both.
_DOMAIN, _LARGE_DOMAIN = 12.0, 36.0
_TOLERANCE = 1e-8  # of one interval, relative to the whole: a thousand such errors are 1e-5
_REFUSED = 1e-3  # a result whose estimated error is larger is none: the gain would be off by half of it
_WIDTH = 0.125  # of the intervals at first: what is wider than 0.01 is seen; common kinks (0, 1/2, 3, 6) are between two of them
_LEAST_WIDTH = _WIDTH * 2.0**-40  # closer to a jump float64 has no more points
_AT_ONCE, _PARTS = 2**8, 2**4  # of all intervals together, as far as 2 of each allow it, and of one
_STRATA, _REPEATS = 2**16, 48  # of z, and draws of a random function: 3e6 values, whose mean square is known to 1e-3
_INTERVALS = 2**14  # a function with more kinks than that is noise


def gain(f: Function | nn.Module, *, backward: bool = False, inputs: torch.Tensor | None = None) -> float:
    """``1 / sqrt(E[f(z)^2])``, z standard normal: what the following layer's standard deviation is to be multiplied with.

    A layer with fan-in n whose weights have deviation ``gain / sqrt(n)`` then keeps the second moment of its input before the
    activation at 1 (He et al. 2015, arXiv:1502.01852, eq. 10, for ReLU). Over z, over the channels of a module with a parameter
    for each, and over what f itself draws (RReLU, dropout).

    Args:
        f: entry by entry: a tensor to a tensor of the same shape. A module is used with its present parameters and mode.
        backward: return ``1 / sqrt(E[f'(z)^2])``, which keeps the gradient's second moment; f' as autograd has it.
        inputs: take these entries, brought to second moment 1, in the place of z: what is not normal, as after a narrow norm.

    Returns:
        the gain: sqrt 2 for ReLU, 1.5335 for GELU, 1.5925 for tanh (1.4673 backward). The relative error is below 1e-4; 1e-3
        where f is random.

    Raises:
        InputError: f has no finite, positive gain, or is no function of one entry; the message says which.

    Example:
        >>> round(gain(torch.relu), 4)
        1.4142
    """
    if not callable(f):
        raise InputError(f"gain takes a function of a tensor or a module, not {type(f).__name__}")
    with torch.device("cpu"), np.errstate(over="ignore", invalid="ignore"):  # whatever the caller made the default
        evaluate, is_random = _entrywise(f, backward=backward)
        total = _second_moment(evaluate, inputs, is_random=is_random)
    what = "f'(z)" if backward else "f(z)"
    if total is None:
        raise InputError(f"{_name(f)} has no finite gain: E[{what}^2] is infinite, or {what} too irregular to be integrated")
    if total <= 0.0:
        raise InputError(f"{_name(f)} has no finite gain: {what} is 0 for every z")
    return 1.0 / math.sqrt(total)


def _second_moment(f: Function, inputs: torch.Tensor | None, *, is_random: bool) -> float | None:
    if inputs is not None:
        return _averaged(f, inputs)
    if is_random:
        return _simulated(f)
    total = _integrate(f, _DOMAIN)
    return _integrate(f, _LARGE_DOMAIN) if total is None else total


def _name(f: Function | nn.Module) -> str:
    return str(getattr(f, "__name__", "") or type(f).__name__)


def _entrywise(f: Function | nn.Module, *, backward: bool) -> tuple[Function, bool]:
    """``f`` or its derivative in float64, after a look whether it is one at all; and whether it is random.

    Of a module with parameters for each channel, the values in all channels: [n] -> [n, channels].
    """
    whole = _in_float64(f)
    with torch.random.fork_rng(devices=[]):
        width = _channels(f, whole)

    def spread(z: torch.Tensor) -> torch.Tensor:
        return z.unsqueeze(1).repeat(1, width) if width else z.clone()

    def call(z: torch.Tensor) -> torch.Tensor:
        return whole(spread(z))

    points = torch.linspace(-5.0, 5.0, 64, dtype=torch.float64) + 0.0123  # off the places where kinks are usually put
    with torch.random.fork_rng(devices=[]):
        first, again, part = call(points), call(points), call(points[:23])
    is_random = not torch.equal(first, again) and not bool(first.isnan().any())
    if not is_random and not torch.allclose(first[:23], part, rtol=1e-6, atol=1e-9, equal_nan=True):
        raise InputError(f"{_name(f)} is no function of one entry: its value depends on the other entries of the tensor")
    if not backward:
        return lambda z: call(z).detach(), is_random

    def slope(z: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = spread(z).requires_grad_()
            value = whole(leaf)
            if not value.requires_grad:
                raise InputError(f"{_name(f)} has no derivative: autograd does not follow it")
            return torch.autograd.grad(value.sum(), leaf)[0]

    return slope, is_random


def _channels(f: Function | nn.Module, call: Function) -> int:
    """How many channels a module insists on, that has a parameter for each of them; 0 for what takes any shape."""
    sizes = sorted({parameter.numel() for parameter in f.parameters()} - {1}) if isinstance(f, nn.Module) else []
    for size in (0, *sizes):
        try:
            call(torch.zeros((3, size) if size else 3, dtype=torch.float64))
        except InputError:
            continue
        return size
    return 0


def _no_tensor(f: Function | nn.Module, value: object) -> str:
    name = _name(f)
    if isinstance(f, type):
        return f"{name} is a class; a gain is that of a module: {name}()"
    return f"{name} returns {type(value).__name__}; a gain is that of a function from tensor to tensor"


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
            raise InputError(_no_tensor(f, value))
        if value.shape != z.shape:
            raise InputError(f"{_name(f)} changes the shape {list(z.shape)} to {list(value.shape)}; a gain is of one entry")
        if value.is_complex():
            raise InputError(f"{_name(f)} returns complex values, which have no gain")
        return value.double()

    return call


@cache
def _rule() -> tuple[Array, Array]:
    """Gauss-Legendre points and weights on [0, 1]."""
    points, weights = np.polynomial.legendre.leggauss(8)
    return (points + 1.0) / 2.0, weights / 2.0


def _integrate(f: Function, domain: float) -> float | None:
    """``E[f(z)^2]`` over [-domain, domain]; None where the ends still matter or the intervals get too many."""
    width = _WIDTH
    starts = np.arange(-domain / width, domain / width) * width
    wholes = _parts(f, starts, width)
    ends = float(wholes[[0, 1, -2, -1]].sum())
    total, unsettled = 0.0, 0.0
    while starts.size and width > _LEAST_WIDTH:
        count = min(max(_AT_ONCE >> (starts.size - 1).bit_length(), 2), _PARTS)
        width /= count
        places = starts[:, None] + width * np.arange(count)
        parts = _parts(f, places.ravel(), width).reshape(-1, count)
        error = np.abs(parts.sum(1) - wholes)
        scale = total + float(parts.sum())
        if not math.isfinite(scale):
            return None
        left = error > _TOLERANCE * scale
        total += float(parts[~left].sum())
        starts, wholes, unsettled = places[left].ravel(), parts[left].ravel(), float(error[left].sum())
        if starts.size > _INTERVALS:
            break
    total += float(wholes.sum())
    if ends > _TOLERANCE * total or (starts.size and unsettled > _REFUSED * total):
        return None
    return total


def _parts(f: Function, starts: Array, width: float) -> Array:
    """Integral of ``f(z)^2`` with the normal density over [start, start + width] for each start.

    Raises:
        InputError: f is not a number somewhere.
    """
    points, weights = _rule()
    z = starts[:, None] + width * points
    values = _numbers(f, torch.from_numpy(z.ravel())).numpy().reshape(*z.shape, -1)
    root_density = np.exp(-0.25 * z**2) * (2.0 * math.pi) ** -0.25  # on f, so that its square does not overflow first
    squares = np.square(values * root_density[..., None]).mean(-1)
    return np.asarray(width * (squares @ weights))


def _numbers(f: Function, z: torch.Tensor) -> torch.Tensor:
    values = f(z)
    if bool(values.isnan().any()):
        where = values.isnan().reshape(len(z), -1).any(1)
        raise InputError(f"the function has no gain: it is not a number at z = {float(z[where][0]):.4g}")
    return values


def _averaged(f: Function, inputs: torch.Tensor) -> float:
    """``E[f(x)^2]`` over given entries, brought to second moment 1."""
    entries = inputs.detach().double().reshape(-1)
    level = float(entries.square().mean()) if len(entries) else math.nan
    if not 0.0 < level < math.inf:
        raise InputError("inputs of a gain are finite numbers, not all of them 0")
    return float(_numbers(f, entries / level**0.5).square().mean())


def _simulated(f: Function) -> float:
    """``E[f(z)^2]`` over z and over what f draws: each stratum of z once in each of many draws, with a fixed seed."""
    below = (torch.arange(_STRATA, dtype=torch.float64) + 0.5) / _STRATA
    z = math.sqrt(2.0) * torch.special.erfinv(2.0 * below - 1.0)
    z = z / z.square().mean().sqrt()  # the outermost strata are wide: their middles are not their root mean squares
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(np.mean([float(_numbers(f, z).square().mean()) for _ in range(_REPEATS)]))
