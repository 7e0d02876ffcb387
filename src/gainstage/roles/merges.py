"""Sums and concatenations of siblings: none of the operands is computed from another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gainstage.graph.families import CONCATENATION, MOVEMENT, NOISE
from gainstage.roles.streams import Residual
from gainstage.roles.wiring import Wiring


@dataclass(frozen=True, slots=True)
class Siblings:
    """The operands of one sum (nested sums flattened) or concatenation."""

    node: int
    is_sum: bool
    operands: tuple[int, ...]


def summands(wiring: Wiring, start: int, residuals: Mapping[int, Residual]) -> list[int]:
    """Operands of a sum, those of sums inside of it that nothing else reads in their place; the start where it is no sum."""
    i = _through_noise(wiring, start)
    if wiring.names[i] != "add" or i in residuals or len(wiring.signals[i]) != 2:
        return [start]
    parts = []
    for j in wiring.signals[i]:
        inner = _through_noise(wiring, j)
        parts += summands(wiring, j, residuals) if len(wiring.readers[inner]) == 1 else [j]
    return parts


def _copied(wiring: Wiring, i: int) -> list[int]:
    """A tensor and what it is a copy of, value by value, if scaled."""
    chain = [i]
    keeps = MOVEMENT | NOISE | {"mul", "div"}
    while wiring.names[i] in keeps and wiring.main[i] >= 0 and not wiring.is_norm_by_hand(i):
        i = wiring.main[i]
        chain.append(i)
    return chain


def _through_noise(wiring: Wiring, i: int) -> int:
    while (wiring.names[i] in MOVEMENT or wiring.names[i] in NOISE) and wiring.main[i] >= 0 and len(wiring.readers[i]) == 1:
        i = wiring.main[i]
    return i


def find_siblings(wiring: Wiring, residuals: Mapping[int, Residual], excluded: Iterable[int]) -> tuple[Siblings, ...]:
    """All merges of siblings, but not those inside of queries and keys, nor those that are branches of a stream."""
    covered = set(excluded)
    found = []
    for i in range(len(wiring.nodes) - 1, -1, -1):
        name = wiring.names[i]
        if i in covered or i in residuals or wiring.shape(i) == ():  # a sum of losses
            continue
        if name == "add" and len(wiring.signals[i]) == 2:
            operands = summands(wiring, i, residuals)
            covered |= _inner(wiring, i, set(operands))
        elif name in CONCATENATION and len(wiring.signals[i]) > 1:
            operands = list(wiring.signals[i])
        else:
            continue
        copies = [_copied(wiring, j) for j in operands]
        related = any(
            wiring.is_computed_from(other, node)
            for copy, j in zip(copies, operands, strict=True)
            for node in copy
            for other in operands
            if other != j
        )
        if not related:
            found.append(Siblings(i, name == "add", tuple(operands)))
    return tuple(reversed(found))


def _inner(wiring: Wiring, i: int, operands: set[int]) -> set[int]:
    """The sums that a flattened sum is made of."""
    found, stack = {i}, [i]
    while stack:
        for j in wiring.signals[stack.pop()]:
            if j not in operands and j not in found:
                found.add(j)
                stack.append(j)
    return found
