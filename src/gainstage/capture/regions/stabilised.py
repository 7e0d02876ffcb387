"""Exponentials of differences from a running maximum, as one operation with all that they are weighed against.

``exp(a - max(a, m))`` is 1 at most, which its factors do not know of each other: the tables of ``a`` and of the maximum alone
would have it overflow. Where such terms are added up and divided by a sum of like ones (linear attention of RWKV), numerator
and denominator are of one draw as well. A maximum over a dimension is none of this: it is a statistic of its own operand.
"""

from __future__ import annotations

import operator

import torch
from torch._ops import OpOverload

from gainstage.capture.regions.dataflow import Dataflow
from gainstage.capture.regions.region import with_region
from gainstage.graph import Node, NodeKind

_MAXIMA = frozenset({"maximum", "fmax"})
_MOVES = frozenset(
    {"select", "slice", "narrow", "unsqueeze", "squeeze", "view", "reshape", "expand", "permute", "transpose", "chunk", "split",
     "split_with_sizes", "unbind", "cat", "stack", "select_scatter", "slice_scatter", "flatten", "contiguous", "clone", "to"}
)  # fmt: skip


def stabilised(dataflow: Dataflow) -> list[set[str]]:
    """Sets of exponentials that maxima keep from growing, with what they are weighed against."""
    entrywise = {name for name, node in dataflow.nodes.items() if _is_entrywise(node)}
    regions: list[set[str]] = []
    for node in dataflow.nodes.values():
        if node.short_name == "exp" and _is_stabilised(node, dataflow, entrywise):
            regions = with_region(regions, dataflow.behind([node.name], entrywise))
    return [_with_ratios(region, dataflow, entrywise) for region in regions]


def _is_stabilised(node: Node, dataflow: Dataflow, entrywise: set[str]) -> bool:
    """Whether an exponential is one of a difference from an entrywise maximum of what the first term is made of."""
    difference = _before_moves(node.operands()[0], dataflow)
    names = difference.operands()
    if difference.short_name != "sub" or len(names) != 2:
        return False
    first, largest = (_before_moves(name, dataflow) for name in names)
    if not _is_maximum(largest):
        return False
    behind = [dataflow.behind([each.name], entrywise) | {each.name} for each in (first, largest)]
    return bool(behind[0] & behind[1] or _read_by(behind[0], dataflow) & _read_by(behind[1], dataflow))


def _is_maximum(node: Node) -> bool:
    is_of_two = len([argument for argument in node.args if hasattr(argument, "name")]) == 2
    return is_of_two and (node.short_name in _MAXIMA or str(node.op) == "aten.max.other")


def _with_ratios(region: set[str], dataflow: Dataflow, entrywise: set[str]) -> set[str]:
    """A region with quotients of which both parts depend on it, what puts these together, and where its operands are picked."""
    made = {name for name in region if dataflow.nodes[name].short_name == "exp"}  # and what depends on them, entry by entry
    for name, read in dataflow.operands.items():
        if name in entrywise and not made.isdisjoint(read):
            made.add(name)
    ratios = [
        name for name, read in dataflow.operands.items() if dataflow.nodes[name].short_name == "div" and made.issuperset(read)
    ]
    grown = region | dataflow.behind(ratios, made | region)
    moves = {name for name, node in dataflow.nodes.items() if _is_move(node)}
    for name in dataflow.nodes:
        if name in moves and name not in grown and _depends_only_on(name, grown, dataflow):
            grown.add(name)
    return grown | dataflow.behind(_read_by(grown, dataflow), moves)


def _depends_only_on(name: str, names: set[str], dataflow: Dataflow) -> bool:
    varying = [other for other in dataflow.operands[name] if dataflow.nodes[other].kind is not NodeKind.CONSTANT]
    return bool(varying) and names.issuperset(varying)


def _read_by(inside: set[str], dataflow: Dataflow) -> set[str]:
    """What some nodes read that is none of them, and no constant."""
    read = {name for each in inside for name in dataflow.operands[each]}
    return {name for name in read - inside if dataflow.nodes[name].kind is not NodeKind.CONSTANT}


def _before_moves(name: str, dataflow: Dataflow) -> Node:
    node = dataflow.nodes[name]
    while _is_move(node):
        node = dataflow.nodes[node.operands()[0]]
    return node


def _is_move(node: Node) -> bool:
    return node.op is operator.getitem or node.short_name in _MOVES


def _is_entrywise(node: Node) -> bool:
    if not isinstance(node.op, OpOverload):
        return node.op is operator.getitem
    if node.may_draw:
        return False
    name = node.short_name
    return torch.Tag.pointwise in node.op.tags or name in _MOVES or name in {"cumsum", "max", "amax", "log_sigmoid"} | _MAXIMA
