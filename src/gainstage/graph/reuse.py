"""Weights that are used more than once: tied layers of an autoencoder, an embedding that is the head, a repeated block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gainstage.graph.families import LOOKUP
from gainstage.graph.model import Node, NodeKind, TensorMeta

FOLLOWED = 24  # uses of one weight, at most, of which it is followed what they have in common: pairs of them grow with the square


def followed_uses(nodes: Sequence[Node], copies: Mapping[str, str] | None = None) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Those of the repeated uses that are followed; and a sentence for those that are too many, where it makes a difference."""
    uses = repeated_uses(nodes, copies or {})
    names = used_on_own(nodes, {weight: found for weight, found in uses.items() if len(found) > FOLLOWED})
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    remark = f"Used more than {FOLLOWED} times, also on what it made, and taken to be independent of that: {shown}."
    return {weight: found for weight, found in uses.items() if len(found) <= FOLLOWED}, [remark] if names else []


def repeated_uses(nodes: Sequence[Node], copies: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Matrices that meet data in several operations, not in look-ups alone -> these operations, in order.

    ``copies``: parameter -> another one with the same values, of which it is one more use.
    """
    lookups = {node.name for node in nodes if node.short_name in LOOKUP}
    held: dict[str, frozenset[str]] = {}  # node -> the weights that it is a form of (a transposed one)
    uses: dict[str, list[str]] = {}
    for node in nodes:
        if node.kind is NodeKind.PARAMETER and isinstance(node.meta, TensorMeta) and len(node.meta.shape) > 1 and node.parameter:
            held[node.name] = frozenset({copies.get(node.parameter, node.parameter)})
            continue
        operands = set(node.operands())
        weights = frozenset().union(*(held[name] for name in operands if name in held))
        if weights and all(name in held for name in operands):
            held[node.name] = weights
        else:
            for weight in weights:
                uses.setdefault(weight, []).append(node.name)
    return {weight: tuple(found) for weight, found in uses.items() if len(found) > 1 and not lookups.issuperset(found)}


def used_on_own(nodes: Sequence[Node], uses: dict[str, tuple[str, ...]]) -> list[str]:
    """Those of these weights of which one use reads what depends on another."""
    used_at: dict[str, int] = {}  # bit masks: weights that an operation uses, and weights that its result depends on
    for bit, names in enumerate(uses.values()):
        for name in names:
            used_at[name] = used_at.get(name, 0) | 1 << bit
    made_by: dict[str, int] = {}
    found = 0
    for node in nodes:
        before = 0
        for name in node.operands():
            before |= made_by.get(name, 0)
        found |= before & used_at.get(node.name, 0)
        made_by[node.name] = before | used_at.get(node.name, 0)
    return [weight for bit, weight in enumerate(uses) if found >> bit & 1]
