"""Exponentials of differences from a running maximum, as one operation with all that they are weighed against.

``exp(a - max(a, m))`` is 1 at most, which its factors do not know of each other: the tables of ``a`` and of the maximum alone
would have it overflow. Where such terms are added up and divided by a sum of like ones (linear attention of RWKV), numerator
and denominator are of one draw as well. A maximum over a dimension is none of this: it is a statistic of its own operand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
from torch._ops import OpOverload

from gainstage.capture.regions.region import with_region
from gainstage.capture.regions.wiring import Wiring
from gainstage.graph import Node, NodeKind

_MAXIMA = frozenset({"maximum", "fmax"})
_MOVES = frozenset(
    {"select", "slice", "narrow", "unsqueeze", "squeeze", "view", "reshape", "expand", "permute", "transpose", "chunk", "split",
     "split_with_sizes", "unbind", "cat", "stack", "select_scatter", "slice_scatter", "flatten", "contiguous", "clone", "to"}
)  # fmt: skip


def stabilised(wiring: Wiring) -> list[set[str]]:
    """Sets of exponentials that maxima keep from growing, with what they are weighed against."""
    by_name = wiring.nodes
    regions: list[set[str]] = []
    for node in by_name.values():
        if node.short_name == "exp" and _is_stabilised(node, by_name):
            regions = with_region(regions, _behind([node.name], by_name, _is_entrywise))
    return [_with_ratios(region, by_name) for region in regions]


def _is_stabilised(node: Node, by_name: dict[str, Node]) -> bool:
    """Whether an exponential is one of a difference from an entrywise maximum of what the first term is made of."""
    difference = _before_moves(node.operands()[0], by_name)
    names = difference.operands()
    if difference.short_name != "sub" or len(names) != 2:
        return False
    first, largest = (_before_moves(name, by_name) for name in names)
    if not _is_maximum(largest):
        return False
    behind = [_behind([each.name], by_name, _is_entrywise) | {each.name} for each in (first, largest)]
    return bool(behind[0] & behind[1] or _read_by(behind[0], by_name) & _read_by(behind[1], by_name))


def _is_maximum(node: Node) -> bool:
    is_of_two = len([argument for argument in node.args if hasattr(argument, "name")]) == 2
    return is_of_two and (node.short_name in _MAXIMA or str(node.op) == "aten.max.other")


def _with_ratios(region: set[str], by_name: dict[str, Node]) -> set[str]:
    """A region with quotients of which both parts depend on it, what puts these together, and where its operands are picked."""
    made = {name for name in region if by_name[name].short_name == "exp"}  # and what depends on them, entry by entry
    for node in by_name.values():
        if _is_entrywise(node) and any(name in made for name in node.operands()):
            made.add(node.name)
    ratios = [node.name for node in by_name.values() if node.short_name == "div" and made.issuperset(node.operands())]
    grown = region | _behind(ratios, by_name, lambda node: node.name in made | region)
    for node in by_name.values():
        if _is_move(node) and node.name not in grown and _depends_only_on(node, grown, by_name):
            grown.add(node.name)
    return grown | _behind(_read_by(grown, by_name), by_name, _is_move)


def _depends_only_on(node: Node, names: set[str], by_name: dict[str, Node]) -> bool:
    varying = [name for name in node.operands() if by_name[name].kind is not NodeKind.CONSTANT]
    return bool(varying) and all(name in names for name in varying)


def _read_by(names: Iterable[str], by_name: dict[str, Node]) -> set[str]:
    """What some nodes read that is none of them, and no constant."""
    inside = set(names)
    read = {name for each in inside for name in by_name[each].operands()}
    return {name for name in read - inside if by_name[name].kind is not NodeKind.CONSTANT}


def _behind(ends: Iterable[str], by_name: dict[str, Node], is_inside: Callable[[Node], bool]) -> set[str]:
    """All that leads to some nodes through operations of a kind, these nodes included if they are of it."""
    waiting, found = [name for name in ends if is_inside(by_name[name])], set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other in by_name[name].operands() if is_inside(by_name[other])]
    return found


def _before_moves(name: str, by_name: dict[str, Node]) -> Node:
    node = by_name[name]
    while _is_move(node):
        node = by_name[node.operands()[0]]
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
