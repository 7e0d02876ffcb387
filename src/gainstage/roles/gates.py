"""Gates: a factor of a product of two signals that comes through a nonlinearity."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gainstage.roles.coordinates import numbered, values_of
from gainstage.roles.sites import Site
from gainstage.roles.walk import Found, Walked, walk_back
from gainstage.roles.wiring import LINEAR, Wiring


def find_gates(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]]) -> tuple[tuple[int, Walked], ...]:
    """For each gated product its number, and a walk back from the factor that is the gate."""
    found = []
    for i, name in enumerate(wiring.names):
        if name == "glu":
            found.append((i, _second_half(wiring, sites, i)))
        elif name == "mul" and len(wiring.signals[i]) == 2 and not wiring.is_norm_by_hand(i):
            gate, other = sorted(wiring.signals[i], key=lambda j: -wiring.shape_of_gain[j])
            if wiring.shape_of_gain[gate] == LINEAR or wiring.shape_of_gain[gate] == wiring.shape_of_gain[other]:
                continue
            if not wiring.gates_itself(i):
                found.append((i, walk_back(wiring, sites, gate)))
    return tuple(found)


def _second_half(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]], i: int) -> Walked:
    """The half that goes through the sigmoid of ``glu(x) = x_1 sigmoid(x_2)``."""
    source = wiring.signals[i][0]
    walked = walk_back(wiring, sites, source)
    dim = int(wiring.nodes[i].args[1]) if len(wiring.nodes[i].args) > 1 else -1
    return Walked(
        tuple(_halved(wiring, found, source, dim) for found in walked.found), walked.nodes, walked.is_normalised, walked.is_own
    )


def _halved(wiring: Wiring, found: Found, source: int, dim: int) -> Found:
    site = found.site
    if site.node != source or site.rows is None or found.rows is not None:
        return found
    shape = wiring.shape(source)
    if site.axis % len(shape) != dim % len(shape) or len(site.rows) != shape[dim]:
        return found
    half: torch.Tensor = values_of([numbered(shape, dim % len(shape)).narrow(dim, shape[dim] // 2, shape[dim] // 2)])
    return Found(site, site.rows[half], found.power)
