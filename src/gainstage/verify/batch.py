"""A batch of which every process holds its part, and what was measured on the parts put together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gainstage.errors import RankError
from gainstage.graph import Graph, TensorMeta, whole
from gainstage.verify.measure import CallKey, Measurement, Pass, samples_in

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The whole batch.

    Args:
        args: positional arguments of forward.
        kwargs: keyword arguments of forward.
        parts: for each part of the batch, its number of samples and the ranks that were given it: processes with equal
            inputs hold parts of the model, or the same model, and count once.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    parts: tuple[tuple[int, tuple[int, ...]], ...]


def ranks_at_work() -> range:
    """All processes that verify together; none where there is only this one."""
    distributed = torch.distributed
    is_shared = distributed.is_available() and distributed.is_initialized()
    return range(distributed.get_world_size()) if is_shared and distributed.get_world_size() > 1 else range(0)


def gathered(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """The parts of all processes one after the other, in the order of their ranks.

    Raises:
        RankError: the parts do not fit together.
    """
    samples, ranks = samples_in(args, kwargs), ranks_at_work()
    if not ranks:
        return Batch(args=args, kwargs=kwargs, parts=((samples, (0,)),))
    leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    own = [whole(leaves[place].detach()) for place in places]
    said = _from_all([tensor.cpu() for tensor in own])
    groups: list[list[int]] = []
    for rank in ranks:
        alike = next((group for group in groups if _are_equal(said[group[0]], said[rank])), None)
        if alike is None:
            groups.append([rank])
        else:
            alike.append(rank)
    held = [said[group[0]] for group in groups]
    sizes = [next((tensor.shape[0] for tensor in tensors if tensor.dim()), 1) for tensors in held]
    for rank, tensors in enumerate(said):
        if [_kind(tensor) for tensor in tensors] != [_kind(tensor) for tensor in said[0]]:
            raise RankError(f"Rank {rank} was given other inputs than rank 0: other shapes beyond the first dimension, or types.")
    for number, place in enumerate(places):
        pieces = [tensors[number] for tensors in held]
        if len(held) > 1 and all(piece.shape[:1] == (size,) for piece, size in zip(pieces, sizes, strict=True)):
            leaves[place] = torch.cat(pieces).to(own[number].device)
    found: Inputs = pytree.tree_unflatten(leaves, structure)
    return Batch(args=found[0], kwargs=found[1], parts=tuple(zip(sizes, map(tuple, groups), strict=True)))


def _from_all(value: Any) -> list[Any]:
    found: list[Any] = [None] * len(ranks_at_work())
    torch.distributed.all_gather_object(found, value)
    return found


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dim(), tensor.shape[1:], tensor.dtype


def _are_equal(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def put_together(found: Pass, batch: Batch, graph: Graph) -> Pass:
    """What one process would have measured on the whole batch, up to rounding.

    Args:
        found: in this process, on its part.
        batch: which process was given what.
        graph: of the model in one piece at the whole batch.
    """
    types = {(call.path, call.call): call.module_type for call in graph.calls}  # not those that sharding makes of them
    found = replace(found, types=found.types | types)
    if not ranks_at_work():
        return found
    passes: list[Pass] = _from_all(found)
    samples = sum(size for size, _ in batch.parts)
    shapes = _shapes(graph)
    calls: dict[CallKey, dict[int, Measurement]] = {}
    for key in dict.fromkeys(key for one in passes for key in one.calls):
        for place in dict.fromkeys(place for one in passes for place in one.calls.get(key, {})):
            pieces = []
            for _, ranks in batch.parts:
                peers = [passes[rank].calls[key][place] for rank in ranks if place in passes[rank].calls.get(key, {})]
                pieces += [_of_peers(peers, shapes.get((key, place), peers[0].shape))] if peers else []
            calls.setdefault(key, {})[place] = _joined(pieces, shapes.get((key, place)), samples)
    first = passes[batch.parts[0][1][0]]  # a pass looks at the attention of its first sample
    losses = {
        place: (sum(size * passes[ranks[0]].first_losses[place][0] for size, ranks in batch.parts) / samples, chance)
        for place, (_, chance) in first.first_losses.items()
        if all(place in passes[ranks[0]].first_losses for _, ranks in batch.parts)
        and first.calls["", 0][place].shape[1:] == shapes.get((("", 0), place), ())[1:]  # not a slice of the classes
    }
    return replace(first, calls=calls, first_losses=losses)


def _shapes(graph: Graph) -> dict[tuple[CallKey, int], tuple[int, ...]]:
    """Of what every module call returns."""
    return {
        ((call.path, call.call), place): tuple(meta.shape)
        for call in graph.calls
        for place, name in zip(call.positions, call.outputs, strict=True)
        if isinstance(meta := graph.by_name[name].meta, TensorMeta)
    }


def _of_peers(peers: Sequence[Measurement], shape: tuple[int, ...]) -> Measurement:
    """One tensor, of which all processes with the same inputs have the whole, or each a slice of the other dimensions."""
    first = peers[0]
    if first.shape[1:] == shape[1:] or any(len(one.squares) != len(first.squares) for one in peers):
        return first
    entries = sum(math.prod(one.shape[1:]) for one in peers)  # copies of a slice count as often as they are summed
    squares = torch.stack([one.squares for one in peers]).sum(0) * (math.prod(shape[1:]) / entries)
    return replace(first, shape=(first.shape[0], *shape[1:]), squares=squares)


def _joined(pieces: Sequence[Measurement], shape: tuple[int, ...] | None, samples: int) -> Measurement:
    """The tensor for the whole batch."""
    first = pieces[0]
    if len(pieces) == 1 or (shape is not None and shape[:1] == first.shape[:1] != ()):  # the same for any batch
        return replace(first, samples=samples)
    squares = torch.cat([one.squares for one in pieces])
    return Measurement((len(squares), *first.shape[1:]), samples, squares)
