"""Queries, keys and values, in whatever form the attention is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gainstage.graph.families import ATTENTION, CONCATENATION, CONTRACTIONS, MOVEMENT, NOISE, SOFTMAX
from gainstage.roles.sites import Site
from gainstage.roles.walk import Walked, walk_back
from gainstage.roles.wiring import Wiring

_EASY = MOVEMENT | NOISE | {"add", "sub", "mul", "div", "where", "masked_fill", "tanh", "clamp", "clamp_min", "neg", "float"}


@dataclass(frozen=True, slots=True)
class Attention:
    """One product of queries and keys on its way to a softmax.

    ``node``: its last scaling, or the fused operation; ``value``: None where the softmax averages nothing. ``path``: nodes
    between the product and the softmax.
    """

    node: int
    softmax: int
    query: Walked
    key: Walked
    value: Walked | None
    path: frozenset[int] = frozenset()


def find_attentions(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]]) -> tuple[Attention, ...]:
    """All attentions of a model, fused or written out."""
    found: list[Attention] = []
    for i, name in enumerate(wiring.names):
        if name in ATTENTION:
            query, key, value = (wiring.at(i, place) for place in range(3))
            walks = [walk_back(wiring, sites, j, through_norms=True) for j in (query, key)]
            found.append(Attention(i, i, walks[0], walks[1], walk_back(wiring, sites, value)))
        elif name in SOFTMAX and wiring.signals[i]:
            averaged = _averaged(wiring, i)
            value_walk = walk_back(wiring, sites, averaged) if averaged >= 0 else None
            products, path = products_above(wiring, wiring.signals[i][0])
            for product in products:
                walks = [walk_back(wiring, sites, j, through_norms=True) for j in wiring.factors(product)[:2]]
                found.append(Attention(_last_scaling(wiring, product), i, walks[0], walks[1], value_walk, path))
    return tuple(found)


def products_above(wiring: Wiring, start: int) -> tuple[tuple[int, ...], frozenset[int]]:
    """Products of two signals that reach a node by masks, scalings, movement, and mixing of heads alone; what lies between."""
    found, seen, stack = [], {start}, [start]
    while stack:
        i = stack.pop()
        name = wiring.names[i]
        if name in CONTRACTIONS and wiring.is_product_of_signals(i):
            found.append(i)
            continue
        if name in CONTRACTIONS and _mixes_heads(wiring, i):
            nexts: tuple[int, ...] = (wiring.factors(i)[0],)
        elif name in _EASY or name in CONCATENATION:  # blocks of logits, or sinks: logits of keys that are parameters
            nexts = wiring.signals[i]
        else:
            continue
        for j in nexts:
            if j not in seen:
                seen.add(j)
                stack.append(j)
    return tuple(sorted(found)), frozenset(seen)


def _mixes_heads(wiring: Wiring, i: int) -> bool:
    """Talking heads: a square contraction, few wide, between the logits and the softmax or after it."""
    data, weight, _ = wiring.factors(i)
    if weight < 0 or wiring.is_signal[weight]:
        return False
    shape = wiring.shape(weight)
    return len(shape) >= 2 and shape[0] == shape[1] and len(wiring.shape(data)) == 4


def _last_scaling(wiring: Wiring, i: int) -> int:
    """From a product down through constant scalings, and a cap between them (Gemma's tanh), that alone read it."""
    while len(wiring.readers[i]) == 1:
        reader = wiring.readers[i][0]
        is_scaling = wiring.names[reader] in ("mul", "div", "tanh") and wiring.main[reader] == i
        if not is_scaling:
            break
        i = reader
    return i


def _averaged(wiring: Wiring, softmax: int) -> int:
    """The other factor of the first product that reads a softmax; -1 if there is none."""
    seen, stack = {softmax}, [softmax]
    while stack:
        i = stack.pop(0)
        for reader in wiring.readers[i]:
            name = wiring.names[reader]
            if name in CONTRACTIONS and wiring.is_product_of_signals(reader):
                first, second, _ = wiring.factors(reader)
                return second if first == i else first
            passes = name in _EASY or (name in CONTRACTIONS and _mixes_heads(wiring, reader))
            if passes and reader not in seen and len(seen) < 64:
                seen.add(reader)
                stack.append(reader)
    return -1
