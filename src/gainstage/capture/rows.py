"""Rows that are written into a tensor one set after another, as index-based experts do: a choice among rows instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from gainstage.graph import Node, NodeKind, Ref, TensorMeta

aten = torch.ops.aten


def choose_rows(nodes: Sequence[Node]) -> list[Node]:
    """The same graph where writes of whole rows at known places are a selection from what was written, side by side.

    ``base[i] = v`` shows, at each place, a row of ``v`` or of ``base``; so does a chain of writes. Which rows are overwritten is
    then known: an average over the rows of what lies between could not tell the rows that are still to come from the others.
    """
    found: list[Node] = []
    known = {node.name: node for node in nodes}
    written: dict[
        str, list[tuple[str, int]]
    ] = {}  # result of a write -> for each row, the tensor that it comes from and the place
    for node in nodes:
        rows = _written_rows(node, known)
        if rows is None:
            found.append(node)
            continue
        base, values = node.args[0].name, node.args[2].name
        assert isinstance(node.meta, TensorMeta)
        shown = list(written.get(base, [(base, row) for row in range(node.meta.shape[0])]))
        for place, row in enumerate(rows):
            shown[row] = values, place
        written[node.name] = shown
        found += _selection(node, shown, known)
    return found


def _written_rows(node: Node, known: dict[str, Node]) -> list[int] | None:
    """Places that a write of whole rows goes to; None for anything else."""
    if node.op is not aten.index_put.default or len(node.args[1]) != 1 or (*node.args[3:], *node.kwargs.values(), False)[0]:
        return None
    index, values = known[node.args[1][0].name], known[node.args[2].name]
    if index.kind is not NodeKind.CONSTANT or index.value is None or index.value.dim() != 1 or index.value.dtype != torch.int64:
        return None
    assert isinstance(node.meta, TensorMeta)
    if not isinstance(values.meta, TensorMeta) or values.meta.shape != (len(index.value), *node.meta.shape[1:]):
        return None
    return [int(row) % node.meta.shape[0] for row in index.value]


def _selection(node: Node, shown: Sequence[tuple[str, int]], known: dict[str, Node]) -> list[Node]:
    """Nodes that show these rows: the tensors that they come from in one, and a selection from it."""
    assert isinstance(node.meta, TensorMeta)
    pieces = list(dict.fromkeys(name for name, _ in shown))
    starts, start = {}, 0
    for name in pieces:
        meta = known[name].meta
        assert isinstance(meta, TensorMeta)
        starts[name], start = start, start + meta.shape[0]
    whole = TensorMeta((start, *node.meta.shape[1:]), node.meta.dtype)
    places = torch.tensor([starts[name] + row for name, row in shown])
    index, joined = f"{node.name}_rows", f"{node.name}_pieces"
    joining: tuple[Any, ...] = ([Ref(name) for name in pieces],)
    return [
        dataclasses.replace(
            node, name=index, kind=NodeKind.CONSTANT, op=None, args=(), kwargs={}, value=places,
            meta=TensorMeta((len(shown),), torch.int64),
        ),
        dataclasses.replace(node, name=joined, op=aten.cat.default, args=joining, kwargs={}, meta=whole),
        dataclasses.replace(node, op=aten.index_select.default, args=(Ref(joined), 0, Ref(index)), kwargs={}),
    ]  # fmt: skip
