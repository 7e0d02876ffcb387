"""What stands in branches of residual streams or layers of a flow, and how many of them there are beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gainstage.graph import Graph
from gainstage.roles.model import Roles, Stream


def branches_beside(graph: Graph, roles: Roles) -> Mapping[str, int]:
    """For each parameter how many branches its stream has: 1 outside of branches, and a product where streams are nested.

    A node is inside of a branch if what the branch adds is computed from it, and what it is added to is not. The layers of a flow
    are the branches of one stream, whether they add or scale, and all parameters of a flow are in one of them.
    """
    number = {node.name: position for position, node in enumerate(graph.nodes)}
    above: list[int] = []  # one bit for each node that a node is computed from, itself included
    for position, node in enumerate(graph.nodes):
        found = 1 << position
        for name in node.operands():
            found |= above[number[name]]
        above.append(found)
    layers, ends = _layers(roles)
    streams = [
        (len(stream.branches), _inside(stream, graph, number, above))
        for stream in roles.streams
        if not any(setter.use.node in ends for branch in stream.branches for setter in branch.setters)
    ]
    counts = {}
    for parameter, uses in roles.uses.items():
        counts[parameter] = layers if uses else 1
        for count, inside in streams:
            if any(inside >> number[use.node] & 1 for use in uses):
                counts[parameter] *= count
    return counts


def _layers(roles: Roles) -> tuple[int, frozenset[str]]:
    """How many layers a flow has, 1 for all other models, and the nodes of its last weights."""
    if roles.log_determinant is None:
        return 1, frozenset()
    scales, shifts = (
        {setter.use.node for setter in setters} for setters in (roles.log_determinant.setters, roles.log_determinant.shifts)
    )
    return max(1, len(scales), len(shifts)), frozenset(scales | shifts)


def _inside(stream: Stream, graph: Graph, number: Mapping[str, int], above: list[int]) -> int:
    """Bits of the nodes inside of its branches."""
    inside = 0
    for add, branch in zip(stream.adds, stream.branches, strict=True):
        end = number[branch.operand]
        skips = (above[number[name]] for name in graph.by_name[add].operands() if not above[number[name]] >> end & 1)
        inside |= above[end] & ~_union(skips)
    return inside


def _union(sets: Iterable[int]) -> int:
    found = 0
    for each in sets:
        found |= each
    return found
