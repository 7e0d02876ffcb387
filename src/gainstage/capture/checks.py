"""What a model checks is as it should be at step zero: what it does where a signal overflows is not what it does here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from gainstage.capture.lowered import Lowered
from gainstage.graph import Node, NodeKind

aten = torch.ops.aten

_ANSWERS: dict[Any, bool] = {
    aten.isfinite.default: True,
    aten.isinf.default: False,
    aten.isnan.default: False,
    aten._is_all_true.default: True,  # what torch._check_tensor_all asks
}


def passing(lowered: Lowered) -> Lowered:
    """The same nodes, where checks have their answers; but not those of a signal that infinities are written into."""
    infinite: set[str] = set()
    nodes: list[Node] = []
    for node in lowered.nodes:
        if any(name in infinite for name in node.operands()) or _brings_infinity(node):
            infinite.add(node.name)
        is_answered = node.op in _ANSWERS and node.name not in infinite
        nodes.append(_answered(node) if is_answered else node)
    return dataclasses.replace(lowered, nodes=nodes)


def _answered(node: Node) -> Node:
    return dataclasses.replace(node, op=aten.full_like.default, args=(*node.args, _ANSWERS[node.op]))


def _brings_infinity(node: Node) -> bool:
    if node.kind is NodeKind.CONSTANT:
        value = node.value
        return value is not None and not value.is_meta and not bool(value.isfinite().all())
    return any(math.isinf(number) for number in _numbers((*node.args, *node.kwargs.values())))


def _numbers(argument: Any) -> Iterator[float]:
    if isinstance(argument, float):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _numbers(item)
