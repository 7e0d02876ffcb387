"""Which part of every parameter this process holds: all of it, or the shard of a DTensor or of a flattened parameter."""

from __future__ import annotations

import sys
from collections.abc import Container
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gainstage.apply.box import grid_boxes, whole_box
from gainstage.apply.flattened import flat_views, flattened_holdings
from gainstage.apply.parts import Holding, fsdp_version, join, walk
from gainstage.errors import InputError, PlanMismatchError
from gainstage.graph import as_real


def holdings_of(model: nn.Module, known: Container[str] = ()) -> dict[str, Holding]:
    """Every parameter once, under its first name, in the model's order.

    The names are those of the model that wrappers contain: ``torch.compile``, activation checkpointing, DDP and FSDP add
    nothing to them. A name that is ``known`` with the wrapper's part stays as it is.

    Raises:
        PlanMismatchError: a parameter that is not initialised yet.
        InputError: a placement that does not say which entries a process holds.
    """
    names: dict[int, list[str]] = {}
    found: dict[int, Holding] = {}
    flattened: set[int] = set()
    for path, clean, module in walk(model):
        version = fsdp_version(module)
        if version == 2:
            cast("Any", module).reshard()  # what was gathered for a pass does not count; the shards do
        if version == 1:
            for name, holding in flattened_holdings(module, clean).items():
                names[id(holding)] = [name, *holding.aliases]
                found[id(holding)] = holding
                flattened.add(id(holding.parameter))
            flattened.update(map(id, flat_views(module)))
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in flattened:
                continue
            raw, name = join(path, key), join(clean, key)
            if bool(is_lazy(parameter)):
                raise PlanMismatchError(f"{name} is not initialised yet; run one forward pass first.")
            names.setdefault(id(parameter), []).append(raw if raw in known else name)
            if id(parameter) not in found:
                found[id(parameter)] = _holding(name, parameter)
    return {name: replace(found[key], aliases=tuple(aliases)) for key, (name, *aliases) in names.items()}


def _holding(name: str, parameter: nn.Parameter) -> Holding:
    tensor: Any = sys.modules.get("torch.distributed.tensor")
    shape = tuple(parameter.shape)
    if tensor is None or not isinstance(parameter, tensor.DTensor):
        memory = as_real(parameter.detach())
        shape = tuple(memory.shape)
        return Holding(
            shape=shape,
            dtype=memory.dtype,
            aliases=(),
            parameter=parameter,
            memory=memory,
            boxes=(whole_box(shape),),
        )
    with torch.no_grad():  # the local tensor itself, not a copy that autograd knows
        memory = parameter.to_local()
    ranges = _held_ranges(name, parameter)
    held = tuple(sum(stop - start for start, stop in along) for along in ranges)
    if memory.numel() and held != (tuple(memory.shape) or (1,)):
        raise InputError(f"{name}: a shard of shape {list(memory.shape)} is not what {parameter.placements} gives this process")
    return Holding(
        shape=shape,
        dtype=parameter.dtype,
        aliases=(),
        parameter=parameter,
        memory=memory,
        boxes=tuple(grid_boxes(ranges)) if memory.numel() else (),
        ranks=frozenset(parameter.device_mesh.mesh.flatten().tolist()),
    )


def _held_ranges(name: str, parameter: Any) -> list[list[tuple[int, int]]]:
    """For each dimension of the whole, the ranges of its indices that this process holds, in the order of its memory."""
    mesh, shape = parameter.device_mesh, tuple(parameter.shape) or (1,)
    coordinate = mesh.get_coordinate()
    indices = [torch.arange(size) for size in shape]
    for along, placement in enumerate(parameter.placements):
        if placement.is_partial():
            raise InputError(f"{name} is a sum over processes ({placement}); no single process holds its values.")
        if placement.is_replicate():
            continue
        dim = placement.dim
        column = indices[dim].view([-1 if other == dim else 1 for other in range(len(shape))])
        pieces, _ = placement._split_tensor(column, mesh.size(along), with_padding=False, contiguous=False)
        indices[dim] = pieces[coordinate[along]].reshape(-1) if coordinate is not None else indices[dim][:0]
    return [_ranges(along) for along in indices]


def _ranges(indices: torch.Tensor) -> list[tuple[int, int]]:
    if not indices.numel():
        return []
    breaks = (torch.diff(indices) != 1).nonzero().flatten() + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in torch.tensor_split(indices, breaks.tolist())]
