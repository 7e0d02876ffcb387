"""Padding below all entries, in front of maxima over windows: their own padding, which is never the largest.

A tensor that holds minus infinity has no second moment. ``max_pool(pad(x))`` is ``max_pool`` of x with the padding in front, and
with windows that go over the end where those of the padded tensor do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from gainstage.graph import Node, TensorMeta
from gainstage.graph.families import argument

_MAXIMA = frozenset(f"max_pool{rank}d{suffix}" for rank in (1, 2, 3) for suffix in ("", "_with_indices"))
_LOWEST = -1e8  # below all entries


def fold_padding(nodes: Sequence[Node]) -> list[Node]:
    """The same graph, in which maxima over windows pad by themselves. What is no longer read stays.

    Args:
        nodes: a graph without writes, its constants computed.
    """
    known = {node.name: node for node in nodes}
    return [_folded(node, known) if node.short_name in _MAXIMA else node for node in nodes]


def _folded(node: Node, known: Mapping[str, Node]) -> Node:
    padded = known[node.args[0].name]
    if not _is_below(padded) or argument(node, 3) not in (None, 0, [0], [0, 0], [0, 0, 0]):
        return node
    result, x = node.meta, known[padded.args[0].name].meta
    result = result[0] if isinstance(result, tuple) else result
    if not isinstance(result, TensorMeta) or not isinstance(x, TensorMeta):
        return node
    rank = int(node.short_name.removeprefix("max_pool")[0])
    sizes = _each(argument(node, 1), rank)
    strides, dilations = _each(argument(node, 2) or sizes, rank), _each(argument(node, 4) or 1, rank)
    before = [*reversed(argument(padded, 1)[::2])]
    before = [0] * (rank - len(before)) + before
    if len(before) > rank or any(2 * width > size for width, size in zip(before, sizes, strict=True)):
        return node
    spans = [
        (n + 2 * width - dilation * (size - 1) - 1) / stride
        for n, width, dilation, size, stride in zip(x.shape[-rank:], before, dilations, sizes, strides, strict=True)
    ]
    for ceil_mode, rounded in ((False, math.floor), (True, math.ceil)):
        if tuple(rounded(span) + 1 for span in spans) == tuple(result.shape[-rank:]):
            return dataclasses.replace(node, args=(padded.args[0], sizes, strides, before, dilations, ceil_mode), kwargs={})
    return node


def _is_below(node: Node) -> bool:
    """Whether a node pads by a number below all entries."""
    if node.op is not torch.ops.aten.pad.default or argument(node, 2) not in (None, "constant"):
        return False
    value = argument(node, 3)
    return value is not None and value < _LOWEST and min(argument(node, 1)) >= 0


def _each(argument: int | Sequence[int], rank: int) -> list[int]:
    return [argument] * rank if isinstance(argument, int) else [*argument] * (rank // len(argument))
