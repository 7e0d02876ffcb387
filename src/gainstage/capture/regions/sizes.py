"""What has as many entries as a condition holds for, and what fills parts of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from gainstage.capture.regions.dataflow import Dataflow
from gainstage.graph import Node, NodeKind, Ref, TensorMeta
from gainstage.graph.families import INDEXED, INTO

aten = torch.ops.aten

_VIEWS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.select_scatter.default: aten.select.int,
    aten.slice_scatter.default: aten.slice.Tensor,
}


def unsized(dataflow: Dataflow) -> set[str]:
    """Nodes that have as many entries as a condition holds for."""
    found: set[str] = set()
    for node in dataflow.nodes.values():
        if _is_unsized(dataflow, node, found):
            found.add(node.name)
    return found


def resized(nodes: Sequence[Node]) -> list[Node]:
    """The same graph, in which a number that is written to a part of what has no fixed size has no fixed size either."""
    found: list[Node] = []
    dataflow = Dataflow(nodes)
    loose, by_name = unsized(dataflow), dataflow.nodes
    for node in nodes:
        view = None if node.op is None else _VIEWS.get(node.op)
        base, source, *place = (*node.args[:2], *node.args[2:]) if view is not None else (None, None)
        if isinstance(base, Ref) and isinstance(source, Ref) and base.name in loose and source.name not in loose:
            filling = by_name[source.name]
            part = dataclasses.replace(filling, name=f"{node.name}_part", op=view, args=(base, *place), kwargs={})
            made = dataclasses.replace(filling, name=f"{node.name}_filling")
            if filling.op is aten.full.default:
                made = dataclasses.replace(made, op=aten.full_like.default, args=(Ref(part.name), filling.args[1]), kwargs={})
            elif filling.op is aten.expand.default:
                made = dataclasses.replace(made, op=aten.expand_as.default, args=(filling.args[0], Ref(part.name)), kwargs={})
            found += [part, made]
            node = dataclasses.replace(node, args=(base, Ref(made.name), *place))  # noqa: PLW2901
        elif node.op is aten.view.default and not node.args[1] and isinstance(of := node.args[0], Ref) and of.name in loose:
            # torch writes a single entry as a number: here it stands for as many as there are
            node = dataclasses.replace(node, op=aten.clone.default, args=(of,), meta=by_name[of.name].meta)  # noqa: PLW2901
        found.append(node)
    return found


def _is_unsized(dataflow: Dataflow, node: Node, unsized: Collection[str]) -> bool:
    """Whether a result has as many entries as a condition holds for."""
    name, read = node.short_name, dataflow.operands[node.name]
    if not isinstance(node.op, OpOverload):
        return any(other in unsized for other in read)
    if (name in INTO and read[0] not in unsized) or (isinstance(node.meta, TensorMeta) and not node.meta.shape):
        return False
    conditions = [other for other in read if dataflow.is_condition(other) and dataflow.nodes[other].kind is NodeKind.OP]
    is_of_values = torch.Tag.dynamic_output_shape in node.op.tags or name == "nonzero_numpy"  # which lacks the tag
    if is_of_values and (name not in INDEXED or conditions):
        return True
    return any(other in unsized for other in read)
