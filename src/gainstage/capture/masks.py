"""Masks that are written out: a product with zeros and ones, and a number where it is zero.

``x b + c``, with c zero where b is one and some number elsewhere, is x with that number where b is zero. So the first GPT masks
its logits, ``w b - 10^4 (1 - b)``. The product by itself has zeros for logits that no softmax sees, and is too quiet by these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from gainstage.graph import Node, NodeKind, Ref, TensorMeta

aten = torch.ops.aten


def name_masks(nodes: Sequence[Node]) -> list[Node]:
    """The same graph, in which such sums are masks. What is no longer read stays.

    Args:
        nodes: a graph without writes, its constants computed.
    """
    known = {node.name: node for node in nodes}
    return [made for node in nodes for made in _named(node, known)]


def _named(node: Node, known: Mapping[str, Node]) -> list[Node]:
    """``masked_fill`` in the place of a product with a mask plus, or minus, a constant."""
    if node.short_name not in ("add", "sub") or node.kwargs or not all(isinstance(read, Ref) for read in node.args):
        return [node]
    sign = -1.0 if node.short_name == "sub" else 1.0
    first, second = (known[read.name] for read in node.args)
    pairs = [(first, second)] if node.short_name == "sub" else [(first, second), (second, first)]
    for product, added in pairs:
        if product.short_name != "mul" or not _is_known(added):
            continue
        factors = [known[read.name] for read in product.args if isinstance(read, Ref)]
        for x, mask in (factors, factors[::-1]) if len(factors) == 2 else ():
            number = _number(mask, added) if _is_known(mask) and x.meta == node.meta else None
            if number is not None:
                return _filled(node, x, mask, sign * number)
    return [node]


def _is_known(node: Node) -> bool:
    return node.kind is NodeKind.CONSTANT and node.value is not None and not node.value.is_meta


def _number(mask: Node, added: Node) -> float | None:
    """What is added where the mask is zero, if it is one number, and nothing where the mask is one."""
    assert mask.value is not None
    assert added.value is not None
    inside, given = torch.broadcast_tensors(mask.value, added.value)  # type: ignore[no-untyped-call]
    outside = given[inside == 0]
    if outside.numel() == 0 or not bool(((inside == 0) | (inside == 1)).all()) or bool(given[inside == 1].any()):
        return None
    return float(outside[0]) if bool((outside == outside[0]).all()) and float(outside[0]) != 0.0 else None


def _filled(node: Node, x: Node, mask: Node, number: float) -> list[Node]:
    assert mask.value is not None
    outside = mask.value == 0
    meta = TensorMeta(tuple(outside.shape), torch.bool)
    held = dataclasses.replace(mask, name=f"{node.name}_mask", value=outside, meta=meta)
    return [held, dataclasses.replace(node, op=aten.masked_fill.Scalar, args=(Ref(x.name), Ref(held.name), number))]
