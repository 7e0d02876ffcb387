"""Padding below all entries, in front of maxima over windows: their own padding, which is never the largest.

A tensor that holds minus infinity has no second moment. ``max_pool(pad(x))`` is ``max_pool`` of x with the padding in front, and
with windows that go over the end where those of the padded tensor do. Where they do so along one dimension only, there are more
windows than were asked for along the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from gainstage.graph import Node, Ref, TensorMeta
from gainstage.graph.families import argument

_MAXIMA = frozenset(f"max_pool{rank}d{suffix}" for rank in (1, 2, 3) for suffix in ("", "_with_indices"))
_LOWEST = -1e8  # below all entries


def fold_padding(nodes: Sequence[Node]) -> list[Node]:
    """The same graph, in which maxima over windows pad by themselves. What is no longer read stays.

    Args:
        nodes: a graph without writes, its constants computed.
    """
    known = {node.name: node for node in nodes}
    return [made for node in nodes for made in (_folded(node, known) if node.short_name in _MAXIMA else [node])]


def _folded(node: Node, known: Mapping[str, Node]) -> list[Node]:
    """Maxima of x with its padding in front, on both sides; of the windows that begin at places of x those that are asked for."""
    rank = int(node.short_name.removeprefix("max_pool")[0])
    x, before = _without_padding(known[node.args[0].name], known, rank)
    if x is None or argument(node, 3) not in (None, 0, [0], [0, 0], [0, 0, 0]):
        return [node]
    result = node.meta[0] if isinstance(node.meta, tuple) else node.meta
    if not isinstance(result, TensorMeta) or not isinstance(x.meta, TensorMeta):
        return [node]
    sizes = _each(argument(node, 1), rank)
    strides, dilations = _each(argument(node, 2) or sizes, rank), _each(argument(node, 4) or 1, rank)
    if any(2 * width > size for width, size in zip(before, sizes, strict=True)):
        return [node]
    spans = [
        (n + 2 * width - dilation * (size - 1) - 1) / stride
        for n, width, dilation, size, stride in zip(x.meta.shape[-rank:], before, dilations, sizes, strides, strict=True)
    ]
    wanted = tuple(result.shape[-rank:])
    for ceil_mode, rounded in ((False, math.floor), (True, math.ceil)):
        found = tuple(rounded(span) + 1 for span in spans)
        pooled = dataclasses.replace(node, args=(Ref(x.name), sizes, strides, before, dilations, ceil_mode), kwargs={})
        if found == wanted:
            return [pooled]
        if all(n >= count for n, count in zip(found, wanted, strict=True)) and isinstance(node.meta, TensorMeta):
            return _first_of(pooled, (*result.shape[:-rank], *found))
    return [node]


def _first_of(pooled: Node, shape: tuple[int, ...]) -> list[Node]:
    """The node with this shape, and of it along each dimension as much as the node had."""
    wanted = pooled.meta
    assert isinstance(wanted, TensorMeta)
    made = [dataclasses.replace(pooled, name=f"{pooled.name}_all", meta=dataclasses.replace(wanted, shape=shape))]
    for d, (size, count) in enumerate(zip(shape, wanted.shape, strict=True)):
        if count < size:
            shape = (*shape[:d], count, *shape[d + 1 :])
            args = (Ref(made[-1].name), d, 0, count)
            meta = dataclasses.replace(wanted, shape=shape)
            made.append(
                dataclasses.replace(pooled, name=f"{pooled.name}_{d}", op=torch.ops.aten.slice.Tensor, args=args, meta=meta)
            )
    return [*made[:-1], dataclasses.replace(made[-1], name=pooled.name)]


def _without_padding(padded: Node, known: Mapping[str, Node], rank: int) -> tuple[Node | None, list[int]]:
    """What was padded, by one pad after the other, and the widths in front; None where it was not along the last dimensions."""
    before, is_padded = [0] * rank, False
    while _is_below(padded):
        widths = [*argument(padded, 1)[::2]]
        if len(widths) > rank:
            return None, before
        before = [a + b for a, b in zip(before, [0] * (rank - len(widths)) + widths[::-1], strict=True)]
        padded, is_padded = known[padded.args[0].name], True
    return (padded if is_padded else None), before


def _is_below(node: Node) -> bool:
    """Whether a node pads by a number below all entries."""
    if node.op is not torch.ops.aten.pad.default or argument(node, 2) not in (None, "constant"):
        return False
    value = argument(node, 3)
    return value is not None and value < _LOWEST and min(argument(node, 1)) >= 0


def _each(argument: int | Sequence[int], rank: int) -> list[int]:
    return [argument] * rank if isinstance(argument, int) else [*argument] * (rank // len(argument))
