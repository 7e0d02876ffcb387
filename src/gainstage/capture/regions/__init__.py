"""Regions that are one operation, because tables say too little of what lies between their operations.

Each module says where one kind of them begins and how far it goes; :func:`fuse` makes operations of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gainstage.capture.regions.complex_values import complex_regions, with_real_ends
from gainstage.capture.regions.dataflow import Dataflow
from gainstage.capture.regions.decays import decays
from gainstage.capture.regions.exponentials import exponentials
from gainstage.capture.regions.factors import factors
from gainstage.capture.regions.parametrizations import fuse_parametrizations
from gainstage.capture.regions.picks import fuse_picks
from gainstage.capture.regions.region import fuse
from gainstage.capture.regions.sizes import resized, unsized
from gainstage.capture.regions.stabilised import stabilised
from gainstage.graph import Node

__all__ = ["Dataflow", "fuse_parametrizations", "fuse_regions", "resized", "unsized"]


def fuse_regions(nodes: Sequence[Node], outputs: Sequence[str], marked: Collection[str]) -> tuple[list[Node], list[str]]:
    """The same graph with one operation for each region.

    Args:
        nodes: a graph without writes, its softmaxes named and its parametrized weights computed by one operation each.
        outputs: names of the outputs.
        marked: names that are wanted after it (what modules return), if they are real.

    Returns:
        The nodes, and the names of the outputs: for a complex one that of its real form.
    """
    wanted = {*outputs, *marked}
    found = list(nodes)
    for regions in (factors, stabilised, decays, exponentials):
        found = fuse(found, wanted, regions)
    found, names = with_real_ends(found, outputs)
    wanted = {*names, *marked}
    return fuse_picks(fuse(found, wanted, complex_regions), wanted), names
