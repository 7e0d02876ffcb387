"""Levels of some channels of a tensor, measured and planned, and the factor that takes the one to the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gainstage.calibrate.sites import Ranges, channel_dim
from gainstage.graph import Node, Ref
from gainstage.propagate.execution import Execution
from gainstage.signal import Value, take


def planned_level(value: Value, dim: int, channels: Ranges) -> float:
    """``E[x^2]`` over some channels (empty: all) of a predicted tensor; over draws, inputs and positions."""
    if not channels:
        return value.second_moment
    total = sum((stop - start) * take(value, dim, start, stop).second_moment for start, stop in channels)
    return total / sum(stop - start for start, stop in channels)


def channels_of(x: torch.Tensor, dim: int, channels: Ranges) -> torch.Tensor:
    """Some channels (empty: all) of a tensor."""
    if not channels:
        return x
    if len(channels) == 1:
        return x.narrow(dim, channels[0][0], channels[0][1] - channels[0][0])
    index = torch.cat([torch.arange(start, stop, device=x.device) for start, stop in channels])
    return x.index_select(dim, index)


def level(x: torch.Tensor) -> float:
    """Mean of the squares, in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 / x.numel()


def settled(execution: Execution, node: Node, output: torch.Tensor, channels: Ranges) -> torch.Tensor:
    """Of a node's output what its level is taken over: some channels (empty: all), without the table's row of zeros."""
    part = channels_of(output, channel_dim(node, output.dim()), channels)
    indices = indices_of(node)
    return part if indices is None else without_padding(node, part, execution.read(indices))


def without_padding(node: Node, output: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """What a look-up returned for indices other than the table's row of zeros, ``padding_idx``."""
    row = node.args[2] if len(node.args) > 2 else node.kwargs.get("padding_idx", -1)
    if indices is None or not isinstance(row, int) or row < 0 or bool((indices == row).all()):
        return output
    return output[indices != row]


def indices_of(node: Node) -> str | None:
    """The node that holds the indices of an embedding, None for any other operation."""
    if node.op is not torch.ops.aten.embedding.default or not isinstance(node.args[1], Ref):
        return None
    return node.args[1].name


def solve_factor(found: float, planned: float, output: torch.Tensor, rest: torch.Tensor | None) -> float:
    """``s`` with ``E[(s (y - c) + c)^2] = planned``: ``sqrt(planned / found)`` where c, what no scale acts on, is None.

    The larger root of ``A s^2 + 2 B s + C = planned`` with ``A = E[(y - c)^2]``, ``B = E[(y - c) c]``, ``C = E[c^2]``; means over
    this tensor. NaN where there is none: c alone is louder than planned, or the scale does nothing.
    """
    if rest is None:
        return math.sqrt(planned / found)
    c = rest.to(torch.float64)
    y = output.to(torch.float64) - c
    a, b, constant = float(y.square().mean()), float((y * c).mean()), float(c.square().mean())
    inside = b * b - a * (constant - planned)
    factor = (math.sqrt(inside) - b) / a if a > 0.0 and inside >= 0.0 else math.nan
    return factor if factor > 0.0 else math.nan


def spread_out(
    shape: Sequence[int], dim: int, parts: Sequence[tuple[Ranges, float | torch.Tensor]], like: torch.Tensor
) -> torch.Tensor | float:
    """The factors of some channels each (empty: all), as a number or as a tensor to multiply with.

    A factor is a number, or a tensor: of one entry, or of one for each of these channels.
    """
    if len(parts) == 1 and not parts[0][0] and isinstance(parts[0][1], float):
        return parts[0][1]
    dtype = torch.promote_types(like.dtype, torch.float32)
    factors = torch.ones([size if d == dim else 1 for d, size in enumerate(shape)], dtype=dtype, device=like.device)
    for channels, factor in parts:
        done = 0
        for start, stop in channels or ((0, shape[dim]),):
            own = factor if isinstance(factor, float) or factor.numel() == 1 else factor[done : done + stop - start]
            factors.view(-1)[start:stop] = own
            done += stop - start
    return factors
