"""Weights that are used again on what they made: tied layers of an autoencoder, a block that is applied several times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from gainstage.graph.model import Node, NodeKind, TensorMeta

_LOOKUPS = frozenset({torch.ops.aten.embedding.default, torch.ops.aten.embedding_bag.default})


def reused_weights(nodes: Sequence[Node]) -> Iterator[str]:
    """Names of the matrices of which one use reads, as data, what depends on another use; a look-up of rows does not count."""
    weights = {
        node.name: node.parameter
        for node in nodes
        if node.kind is NodeKind.PARAMETER and isinstance(node.meta, TensorMeta) and len(node.meta.shape) > 1 and node.parameter
    }
    held: dict[str, set[str]] = {}  # node -> the weights that it is a form of (a transposed one)
    made_by: dict[str, set[str]] = {}  # node -> the weights that it depends on
    found: set[str] = set()
    for node in nodes:
        operands = list(dict.fromkeys(node.operands()))
        if node.name in weights:
            held[node.name] = {weights[node.name] or ""}
            continue
        data = [name for name in operands if name not in held]
        before = set().union(*(made_by.get(name, set()) for name in data))
        used = set().union(*(held[name] for name in operands if name in held))
        if used and not data:
            held[node.name] = used
        elif node.op not in _LOOKUPS:
            found |= used & before
            made_by[node.name] = before | used
        else:
            made_by[node.name] = before
    return (name for name in dict.fromkeys(weights.values()) if name in found and name is not None)
