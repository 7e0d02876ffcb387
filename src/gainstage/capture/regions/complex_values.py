"""Regions of complex numbers: tables are those of real entries, and one complex entry is two dependent ones.

A complex parameter enters as its real form, with a last dimension of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import torch

from gainstage.capture.regions.dataflow import Dataflow
from gainstage.capture.regions.region import is_complex, with_region
from gainstage.graph import Node, NodeKind, Ref, TensorMeta


def with_real_ends(nodes: Sequence[Node], outputs: Sequence[str]) -> tuple[list[Node], list[str]]:
    """The same graph with real inputs, parameters and outputs, and the names of the outputs."""
    complex_outputs = {node.name for node in nodes if node.name in outputs and is_complex(node)}
    made = [each for node in nodes for each in _with_real_ends(node, complex_outputs)]
    return made, [f"{name}_real" if name in complex_outputs else name for name in outputs]


def complex_regions(dataflow: Dataflow) -> list[set[str]]:
    """Sets of operations that complex values connect."""
    found = {name for name, node in dataflow.nodes.items() if is_complex(node) and node.kind is NodeKind.OP}
    regions: list[set[str]] = []
    for name, node in dataflow.nodes.items():
        read = found.intersection(dataflow.operands[name])
        if node.kind is NodeKind.OP and (read or name in found):
            regions = with_region(regions, {name, *read})
    return regions


def _with_real_ends(node: Node, complex_outputs: Collection[str]) -> Iterator[Node]:
    """A complex input or parameter in its real form, and the operation that makes it complex; an output the other way."""
    assert not isinstance(node.meta, tuple) or node.kind is NodeKind.OP
    if node.kind in (NodeKind.INPUT, NodeKind.PARAMETER) and isinstance(node.meta, TensorMeta) and node.meta.dtype.is_complex:
        value = None if node.value is None else torch.view_as_real(node.value.resolve_conj())
        real = TensorMeta((*node.meta.shape, 2), node.meta.dtype.to_real())
        yield dataclasses.replace(node, name=f"{node.name}_real", meta=real, value=value)
        op, args = torch.ops.aten.view_as_complex.default, (Ref(f"{node.name}_real"),)
        yield dataclasses.replace(node, kind=NodeKind.OP, op=op, args=args, value=None, parameter=None)
        return
    yield node
    if node.name in complex_outputs and isinstance(node.meta, TensorMeta):
        meta = TensorMeta((*node.meta.shape, 2), node.meta.dtype.to_real())
        op = torch.ops.aten.view_as_real.default
        yield dataclasses.replace(node, name=f"{node.name}_real", op=op, args=(Ref(node.name),), kwargs={}, meta=meta)
