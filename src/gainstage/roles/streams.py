"""Residual streams: additions of which one operand is computed from the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gainstage.graph.families import (
    ATTENTION,
    CONCATENATION,
    CONTRACTIONS,
    LOOKUP,
    MOVEMENT,
    NOISE,
    NORMS,
    POOLING,
    RECURRENT,
    SOFTMAX,
)
from gainstage.roles.model import Role
from gainstage.roles.sites import Site
from gainstage.roles.walk import walk_back
from gainstage.roles.wiring import Wiring

_FOURIER = frozenset({"_fft_c2c", "_fft_r2c", "_fft_c2r", "fft_fft", "fft_fft2", "fft_rfft", "fft_rfft2", "fft_irfft2"})
_CHANGING = CONTRACTIONS | ATTENTION | NORMS.keys() | RECURRENT | SOFTMAX | LOOKUP | _FOURIER
_SUMS = frozenset({"add", "sub"})
_KEEPING = MOVEMENT | NOISE | POOLING | {"mul", "div", "add"}


@dataclass(frozen=True, slots=True)
class Residual:
    """One addition to a stream: skip plus branch."""

    add: int
    skip: int
    branch: int


def find_residuals(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]], excluded: frozenset[int]) -> Mapping[int, Residual]:
    """All residual additions, by the number of the addition, but for those excluded: a bias that logits share is no stream."""
    changed = changed_since(wiring, sites)
    found: dict[int, Residual] = {}
    for i, name in enumerate(wiring.names):
        if name not in _SUMS or len(wiring.signals[i]) != 2 or i in excluded:
            continue
        first, second = wiring.signals[i]
        chains = {first: list(skip_chain(wiring, first, found)), second: list(skip_chain(wiring, second, found))}
        options = [
            (distance, skip, branch)
            for skip, branch in ((first, second), (second, first))[: 1 if name == "sub" else 2]
            if (distance := _meeting(wiring, chains[skip], branch)) >= 0
        ]
        for distance, skip, branch in sorted(options):
            way = chains[skip][: distance + 1]
            if _is_changed(wiring, changed[branch], way[-1]) and not _is_state_space(wiring, sites, way, branch):
                found[i] = Residual(i, skip, branch)
                break
    return found


def _is_changed(wiring: Wiring, changed: int, source: int) -> bool:
    sources = (source, *(wiring.signals[source] if wiring.names[source] in CONCATENATION else ()))
    return any(changed & wiring.marks[j] for j in sources)


def _is_state_space(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]], way: list[int], branch: int) -> bool:
    """Tell whether a skip with a learned scale goes around a product of signals: ``D x + C(x) h(x)`` has no branch to set."""
    if not any(site.role is Role.LAYER_SCALE for i in way for site in sites.get(i, ())):
        return False
    walked = walk_back(wiring, sites, branch, with_rows=False).nodes
    products = (i for i in walked if len(wiring.signals[i]) > 1 and (wiring.names[i] == "mul" or wiring.names[i] in CONTRACTIONS))
    return any(not wiring.is_norm_by_hand(i) for i in products)


def changed_since(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]]) -> list[int]:
    """For each node the marks that it is computed from by more than movement, constants, and products of themselves.

    A rotation of queries and a centred tensor are sums of copies of one tensor, no residual branches.
    """
    found = [0] * len(wiring.nodes)
    for i, read in enumerate(wiring.operands):
        changes = wiring.names[i] in _CHANGING or wiring.is_norm_by_hand(i) or any(site.sets_level for site in sites.get(i, ()))
        for j in read:
            found[i] |= found[j] | (wiring.sources[j] if changes else 0)
    return found


def _meeting(wiring: Wiring, chain: list[int], branch: int) -> int:
    """How far along a skip's chain the first node stands that the branch is computed from; -1: nowhere."""
    return next((k for k, node in enumerate(chain) if _is_source(wiring, node, branch)), -1)


def _is_source(wiring: Wiring, node: int, branch: int) -> bool:
    """Tell whether a branch is computed from a node, or from all that the node puts together."""
    if wiring.names[node] in CONCATENATION:
        return wiring.is_computed_from(branch, node) or all(wiring.is_computed_from(branch, j) for j in wiring.signals[node])
    return wiring.is_computed_from(branch, node)


def skip_chain(wiring: Wiring, start: int, residuals: Mapping[int, Residual]) -> list[int]:
    """A tensor and what it is a copy of: through movement, noise, pooling, constant scalings, and back along its stream.

    An activation that the stream itself passes is part of it, as between blocks; and so is each term of a sum that it starts
    from: streams side by side that are added up once are of one origin in all later sums.
    """
    chain: list[int] = []
    stack, seen, is_stream = [start], {start}, False
    while stack:
        i = stack.pop()
        chain.append(i)
        is_stream |= i in residuals
        before = [j for j in _carried(wiring, i, residuals, is_stream=is_stream) if j not in seen]
        seen.update(before)
        stack += reversed(before)
    return chain


def _carried(wiring: Wiring, i: int, residuals: Mapping[int, Residual], *, is_stream: bool) -> tuple[int, ...]:
    """What a tensor is a copy of, up to its scale, if of anything; or what it is the sum of, where a stream starts from it."""
    if i in residuals:
        return (residuals[i].skip,)
    root = wiring.roots[i]
    if root in residuals or (is_stream and root != i and wiring.names[root] == "add"):
        return (root,)
    if is_stream and wiring.names[i] == "add" and len(wiring.signals[i]) == 2:
        return wiring.signals[i]
    if wiring.main[i] >= 0 and wiring.names[i] in _KEEPING and not wiring.is_norm_by_hand(i):
        return (wiring.main[i],)
    return ()


@dataclass(frozen=True, slots=True)
class Chain:
    """Residual additions one after the other."""

    first: int
    steps: tuple[Residual, ...]


def link(wiring: Wiring, residuals: Mapping[int, Residual]) -> tuple[Chain, ...]:
    """Join residual additions into streams: the skip of one comes from another through norms, activations and movement."""
    continued: dict[int, int] = {}  # addition -> the one that goes on from it
    starts: list[int] = []
    for i in sorted(residuals):
        before = _previous(wiring, residuals[i].skip, residuals)
        if before >= 0 and before not in continued:
            continued[before] = i
        else:
            starts.append(i)
    chains = []
    for start in starts:
        steps, i = [residuals[start]], start
        while i in continued:
            i = continued[i]
            steps.append(residuals[i])
        chains.append(Chain(residuals[start].skip, tuple(steps)))
    return tuple(chains)


def _previous(wiring: Wiring, i: int, residuals: Mapping[int, Residual]) -> int:
    """The residual addition that a skip comes from; -1: none."""
    while i >= 0 and i not in residuals:
        i = wiring.main[i]
    return i
