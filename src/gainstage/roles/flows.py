"""What makes the log-determinant of a normalizing flow: the last weights of the networks that it is a direct function of."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gainstage.graph import NodeKind
from gainstage.roles.sites import Site
from gainstage.roles.walk import Found, arriving_rows
from gainstage.roles.wiring import Wiring


def find_scales(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]], start: int) -> tuple[Found, ...]:
    """Uses of weights from which an output follows without another contraction between, with the rows that arrive.

    Behind sums over dimensions and layers, logarithms, exponentials, bounded functions and slices lies the last weight of a
    coupling layer's scale network, and of a packed one the rows of the scales. What is added to a flow's output without entering
    its log-determinant, the shift, is not among them; nor is a linear layer that the whole signal passes through: a spline's
    log-determinant depends on where the signal lies, and so on such a layer before it.
    """
    return tuple(found for found, _ in _ends(wiring, sites, start) if _is_passed_by(wiring, found.site.node))


def find_shifts(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]], start: int, scales: Collection[Site]) -> tuple[Found, ...]:
    """Uses of weights whose outputs are added, somewhere before an output, to a signal that does not depend on them.

    So are the shifts of coupling layers, scaled or not. A linear layer that the signal itself passes through is not: what is
    added to its output further on is computed from it. In a weight that makes scales all other rows make shifts.
    """
    shifts = []
    for found, nodes in _ends(wiring, sites, start):
        if found.site in scales:
            shifts.append(found)
            continue
        below = {found.site.node}
        for i in range(found.site.node + 1, len(wiring.nodes)):
            if any(j in below for j in wiring.signals[i]):
                below.add(i)
        sums = (wiring.signals[i] for i in nodes if wiring.names[i] in ("add", "sub"))
        if any(len(parts) == 2 and (parts[0] in below) != (parts[1] in below) for parts in sums):
            shifts.append(found)
    return tuple(shifts)


def _is_passed_by(wiring: Wiring, node: int) -> bool:
    """Whether outputs depend on an input on a way that does not lead through a node."""
    stack = [wiring.number[name] for name in wiring.graph.outputs]
    seen = {node, *stack}
    while stack:
        i = stack.pop()
        if wiring.nodes[i].kind is NodeKind.INPUT:
            return True
        for j in wiring.signals[i]:
            if j not in seen:
                seen.add(j)
                stack.append(j)
    return False


def _ends(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]], start: int) -> list[tuple[Found, frozenset[int]]]:
    """Contractions with a weight behind an output, without another between, and the nodes that were met."""
    ends: list[Site] = []
    seen, stack = {start}, [start]
    while stack:
        i = stack.pop()
        contracted = [site for site in sites.get(i, ()) if site.is_contraction]
        if contracted:
            ends += contracted
            continue
        for j in wiring.signals[i]:
            if j not in seen:
                seen.add(j)
                stack.append(j)
    nodes = frozenset(seen)
    return [
        (Found(site, None if site.rows is None else arriving_rows(wiring, site, start, nodes), 1.0), nodes)
        for site in sorted(ends, key=lambda site: site.node)
    ]
