"""Parameters that start with the same values: a layer that was copied, values and all, is one draw that is used several times."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch.nn.parameter import is_lazy

from gainstage.graph.model import Graph
from gainstage.graph.real import is_sharded
from gainstage.graph.reuse import followed_uses

FEWEST_ENTRIES = 16  # below this equal values say nothing


def with_copies(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> Graph:
    """The graph of a model with these values, in which parameters of equal values are uses of one.

    Where nothing random that is trained is there twice, the graph as it is. Where something is, equal constants are one as
    well: a layer and its copy are then the same operations on the same weights.
    """
    groups = equal_values(tensors, graph.parameters)
    if not any(graph.parameters[names[0]].requires_grad and is_random(tensors[names[0]]) for names in groups):
        return graph
    copies = {name: names[0] for names in groups for name in names[1:]}
    uses, remark = followed_uses(graph.nodes, copies)
    before = followed_uses(graph.nodes)[1]
    return replace(graph, copies=copies, uses=uses, assumptions=(*(a for a in graph.assumptions if a not in before), *remark))


def equal_values(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> list[list[str]]:
    """Those of these tensors that have the same shape, type and values as another, together with it, in order."""
    groups: dict[object, list[str]] = {}
    for name in names:
        tensor = tensors[name]
        if not (bool(is_lazy(tensor)) or tensor.is_meta or is_sharded(tensor)) and tensor.numel():
            groups.setdefault((tensor.shape, tensor.dtype, tensor.device, digest(tensor)), []).append(name)
    return [
        found
        for found in groups.values()
        if len(found) > 1 and all(torch.equal(tensors[found[0]], tensors[name]) for name in found[1:])
    ]


def digest(tensor: torch.Tensor) -> bytes:
    """Of at most a thousand entries: equal tensors have equal digests, and others hardly ever."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(flat.numel() // 1024, 1)].to("cpu", torch.float64).contiguous()
    return hashlib.blake2b(sample.numpy().tobytes(), digest_size=16).digest()


def is_random(tensor: torch.Tensor) -> bool:
    """Neither constant nor of repeated rows or columns, nor mostly zeros and ones (an identity)."""
    if tensor.dim() == 0 or tensor.numel() < FEWEST_ENTRIES:
        return False
    matrix = tensor.detach().reshape(tensor.shape[0], -1)
    if len(matrix) > 1 and torch.equal(matrix[0], matrix[1]):
        return False
    if matrix.shape[1] > 1 and torch.equal(matrix[:, 0], matrix[:, 1]):
        return False
    flat = matrix.reshape(-1)
    values: int = torch.unique(flat[: 2**14]).numel()
    return values > min(flat.numel(), 2**14) // 64  # bfloat16 has few values


def copied_layers(groups: Iterable[Sequence[str]]) -> dict[tuple[str, ...], list[Sequence[str]]]:
    """Groups of equal parameters by the layers that they belong to: what is left of their names without their common end."""
    found: dict[tuple[str, ...], list[Sequence[str]]] = {}
    for group in groups:
        parts = [name.split(".") for name in group]
        shortest, same = min(map(len, parts)), 0
        while same < shortest - 1 and len({part[-1 - same] for part in parts}) == 1:
            same += 1
        layers = tuple(".".join(part[: len(part) - same]) for part in parts)
        found.setdefault(layers, []).append(group)
    return found
