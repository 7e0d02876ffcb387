"""What makes the log-determinant of a normalizing flow: the last weights of the networks that it is a direct function of."""

from __future__ import annotations

from collections.abc import Mapping

from gainstage.roles.sites import Site
from gainstage.roles.walk import Found, arriving_rows
from gainstage.roles.wiring import Wiring


def find_scales(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]], start: int) -> tuple[Found, ...]:
    """Uses of weights from which an output follows without another contraction between, with the rows that arrive.

    Behind sums over dimensions and layers, logarithms, exponentials, bounded functions and slices lies the last weight of a
    coupling layer's scale network, and of a packed one the rows of the scales. What is added to a flow's output without entering
    its log-determinant, the shift, is not among them.
    """
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
    return tuple(
        Found(site, None if site.rows is None else arriving_rows(wiring, site, start, nodes), 1.0)
        for site in sorted(ends, key=lambda site: site.node)
    )
