"""Walks back from a tensor to the parameters that set its level."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gainstage.graph import NodeKind
from gainstage.graph.families import (
    ATTENTION,
    CONTRACTIONS,
    EXPONENTIALS,
    JOINING,
    LOOKUP,
    NORMS,
    RECURRENT,
    SELECTING,
    SOFTMAX,
    argument,
)
from gainstage.roles.coordinates import arriving, distinct, last_selections, numbered, pattern, values_of
from gainstage.roles.model import Role
from gainstage.roles.sites import Site
from gainstage.roles.wiring import Wiring

_WITH_LEVELS_OF_THEIR_OWN = SOFTMAX | RECURRENT | LOOKUP | EXPONENTIALS


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A use that a walk ended at, with the rows that matter (None: all of them) and the power of the level in the scale."""

    site: Site
    rows: torch.Tensor | None
    power: float


@dataclass(frozen=True, slots=True)
class Walked:
    """What a walk met: uses that set the level, all nodes on the way, and whether it ended in something other than its barrier.

    ``is_normalised``: it met a norm. ``is_own``: some computation with a level of its own lies on the way.
    """

    found: tuple[Found, ...]
    nodes: frozenset[int]
    is_normalised: bool
    is_own: bool


def walk_back(
    wiring: Wiring,
    sites: Mapping[int, tuple[Site, ...]],
    start: int,
    *,
    through_norms: bool = False,
    barrier: frozenset[int] = frozenset(),
    with_rows: bool = True,
) -> Walked:
    """Walk from a tensor back to the nearest uses that set its level.

    Through movement, noise, pooling, activations and constant scalings; through a product into the factor that is not
    squashed; through sums and concatenations into all parts; through an attention average into the values. Not through an
    exponential: a level asked of that, as of the sizes of boxes, would be met by a few huge entries,
    ``E[exp(u)^2] = exp(2 E[u^2])``.

    Args:
        wiring: the graph.
        sites: uses of parameters by node.
        start: the tensor.
        through_norms: go on behind norms and scales, to the contractions.
        barrier: nodes to stop at.
        with_rows: find out which rows of a projection arrive; otherwise all are said to.
    """
    return _Walk(wiring, sites, through_norms, barrier, with_rows).run(start)


@dataclass(slots=True)
class _Walk:
    wiring: Wiring
    sites: Mapping[int, tuple[Site, ...]]
    through_norms: bool
    barrier: frozenset[int]
    with_rows: bool

    def run(self, start: int) -> Walked:
        powers: dict[int, float] = {start: 1.0}
        ends: list[tuple[Site, float]] = []
        stack = [start]
        is_normalised = is_own = False
        while stack:
            i = stack.pop()
            if i in self.barrier:
                continue
            setting = self.ending(i)
            is_norm = self.wiring.names[i] in NORMS or self.wiring.is_norm_by_hand(i)
            is_normalised |= is_norm
            goes_on = self.next(i)
            if setting or (is_norm and not self.through_norms) or not goes_on:
                is_own |= self.wiring.nodes[i].kind is NodeKind.OP
                ends += [(site, powers[i] * site.degree) for site in setting]
                if not (self.through_norms and (is_norm or any(not s.is_contraction for s in setting))):
                    continue
            for j in goes_on:
                if j not in powers:
                    powers[j] = powers[i] * self.factor(i)
                    stack.append(j)
        nodes = frozenset(powers)
        found = tuple(Found(site, self.rows(site, start, nodes), power) for site, power in ends)
        return Walked(found, nodes, is_normalised, is_own)

    def ending(self, i: int) -> list[Site]:
        """Uses at this node that set its level."""
        setting = [site for site in self.sites.get(i, ()) if site.sets_level]
        gains = [site for site in setting if site.role is Role.NORM_SCALE]
        return gains or setting

    def next(self, i: int) -> tuple[int, ...]:
        """Operands that the level comes from; none where the node has a level of its own."""
        wiring, name = self.wiring, self.wiring.names[i]
        if name in _WITH_LEVELS_OF_THEIR_OWN or wiring.nodes[i].kind is not NodeKind.OP:
            return ()
        if name in ATTENTION:
            return tuple(j for j in (wiring.at(i, 2),) if j >= 0 and wiring.is_signal[j])
        if name in CONTRACTIONS:
            if not wiring.is_product_of_signals(i):
                return ()
            first, second, _ = wiring.factors(i)
            return self.less_squashed(first, second)
        if wiring.main[i] >= 0:
            return (wiring.main[i],)
        read = wiring.signals[i]
        if name == "mul" and len(read) == 2:
            return self.less_squashed(*read)
        if name == "div" and len(read) == 2:
            return read[:1]
        return read

    def less_squashed(self, first: int, second: int) -> tuple[int, ...]:
        one, other = self.wiring.shape_of_gain[first], self.wiring.shape_of_gain[second]
        if one == other:
            return (first, second) if first != second else (first,)
        return (first,) if one < other else (second,)

    def factor(self, i: int) -> float:
        """Degree of a node in its main operand."""
        name = self.wiring.names[i]
        if name == "square":
            return 2.0
        if name == "pow" and isinstance(power := argument(self.wiring.nodes[i], 1), (int, float)):
            return float(power)
        if name == "sqrt":
            return 0.5
        squares = name == "mul" and len(set(map(str, self.wiring.nodes[i].args))) == 1
        return 2.0 if squares else 1.0

    def rows(self, site: Site, start: int, nodes: frozenset[int]) -> torch.Tensor | None:
        """Coordinates of the parameter whose outputs reach the start; None: all of them."""
        if (
            not self.with_rows
            or site.rows is None
            or not any(self.wiring.names[j] in SELECTING or self.wiring.names[j] in JOINING for j in nodes)
        ):
            return None
        return arriving_rows(self.wiring, site, start, nodes)


def arriving_rows(wiring: Wiring, site: Site, start: int, nodes: frozenset[int]) -> torch.Tensor | None:
    """Which rows of a parameter arrive at a tensor, among the nodes between; None: all of them."""
    assert site.rows is not None
    shape = wiring.shape(site.node)
    axis = site.axis % len(shape)
    if shape[axis] != len(site.rows):
        return None
    below = _between(wiring, site.node, nodes)
    rows = hashlib.blake2b(site.rows.contiguous().numpy().tobytes()).digest()
    key = (axis, rows, pattern(wiring, site.node, start, below))
    if key not in wiring.arrived:  # once for all blocks that repeat
        arrived = arriving(wiring, site.node, numbered(shape, axis), last_selections(wiring, start, below), below)
        reached = distinct(site.rows[values_of(arrived)]) if arrived else None
        is_all = reached is None or len(reached) == len(distinct(site.rows))
        wiring.arrived[key] = None if is_all else reached
    return wiring.arrived[key]


def _between(wiring: Wiring, source: int, nodes: frozenset[int]) -> set[int]:
    """Nodes of a walk that depend on its source."""
    below = {source}
    for i in sorted(nodes):
        if i > source and any(j in below for j in wiring.operands[i]):
            below.add(i)
    return below
