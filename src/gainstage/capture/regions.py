"""Regions that are one operation, because tables say too little of what lies between their operations.

Complex numbers: tables are those of real entries, and one complex entry is two dependent ones. A complex parameter enters as its
real form, with a last dimension of two. Parametrizations: a weight that is contracted with what was computed from it (its
spectral norm, its orthogonal factor) depends on that entry by entry. Decays: exponentials of differences of a running sum, as
state-space models have them. The difference of two sums of negative terms is negative, and that is what keeps them below one.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterator, Sequence

import torch

from gainstage.capture.views import packet_name
from gainstage.graph import Node, NodeKind, Ref, Region, TensorMeta

_WEIGHTED = frozenset({"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
_LOOKUPS = frozenset({"embedding", "embedding_bag", "index", "index_select", "gather"})
_BETWEEN = frozenset(
    {"cumsum", "add", "sub", "neg", "masked_fill", "where", "tril", "triu", "clamp", "pad", "select", "slice", "narrow",
     "unsqueeze", "squeeze", "view", "reshape", "expand", "permute", "transpose", "to", "_to_copy", "contiguous", "clone", "flip"}
)  # fmt: skip
_CONTRACTIONS = frozenset({"mv", "vdot", "dot", "mm", "bmm", "matmul", "addmm", "einsum", "linear"})


def fuse_complex(nodes: Sequence[Node], outputs: Sequence[str], marked: Collection[str]) -> tuple[list[Node], list[str]]:
    """The same graph with no complex value between its operations.

    Args:
        nodes: a graph without writes, its constants computed.
        outputs: names of the outputs.
        marked: names that are wanted after it (what modules return), if they are real.

    Returns:
        The nodes, and the names of the outputs: for a complex one that of its real form.
    """
    if not any(_is_complex(node) and node.kind is not NodeKind.CONSTANT for node in nodes):
        return list(nodes), list(outputs)
    complex_outputs = {node.name for node in nodes if node.name in outputs and _is_complex(node)}
    nodes = [made for node in nodes for made in _with_real_ends(node, complex_outputs)]
    outputs = [f"{name}_real" if name in complex_outputs else name for name in outputs]
    found = list(nodes)
    for names in _regions(nodes):
        found = fused(found, names, {*outputs, *marked})
    return in_order(found), outputs


def fuse_parametrizations(nodes: Sequence[Node]) -> list[Node]:
    """The same graph, with one operation for each weight that is computed by contracting a parameter with functions of itself.

    Args:
        nodes: a graph without writes, its constants computed.
    """

    def is_data(node: Node) -> bool:
        return node.may_draw or packet_name(node.op) in _LOOKUPS

    made_of: dict[str, set[str]] = {}  # weights -> the parameters that they are computed from
    entangled: set[str] = set()  # weights on the way to which a parameter met itself
    for node in nodes:
        operands = list(dict.fromkeys(node.operands()))
        if node.kind is NodeKind.PARAMETER:
            made_of[node.name] = {node.name}
        elif node.kind is NodeKind.CONSTANT:
            made_of[node.name] = set()
        elif node.kind is NodeKind.OP and not is_data(node) and all(name in made_of for name in operands):
            made_of[node.name] = set().union(*(made_of[name] for name in operands))
            parts = [made_of[name] for name in operands]
            meets = len(set().union(*parts)) < sum(len(part) for part in parts) and packet_name(node.op) in _CONTRACTIONS
            if meets or packet_name(node.op).startswith("linalg_") or any(name in entangled for name in operands):
                entangled.add(node.name)
    weights = [node for node in nodes if node.name in made_of and node.kind is NodeKind.OP]
    read = {node.args[1].name for node in nodes if packet_name(node.op) in _WEIGHTED and isinstance(node.args[1], Ref)}
    found = list(nodes)
    for result in [node for node in weights if node.name in read & entangled and isinstance(node.meta, TensorMeta)]:
        inside = _leading_to(result.name, weights)
        found[found.index(result)] = as_one(inside, [result])[0]
    return found


def fuse_decays(nodes: Sequence[Node], outputs: Sequence[str], marked: Collection[str]) -> list[Node]:
    """The same graph, with one operation for each running sum and the exponentials of what is made of it and constants.

    Args:
        nodes: a graph without writes, its constants computed.
        outputs: names of the outputs.
        marked: names that are wanted after it: what modules return.
    """
    constants = {node.name for node in nodes if node.kind is NodeKind.CONSTANT}
    sums: dict[str, str] = {}  # what is made of a running sum -> the sum
    decays: dict[str, list[Node]] = {}  # running sum -> exponentials
    for node in nodes:
        read = {sums[name] for name in node.operands() if name in sums}
        if len(read) == 1 and all(name in sums or name in constants for name in node.operands()):
            if packet_name(node.op) in _BETWEEN:
                sums[node.name] = next(iter(read))
            elif packet_name(node.op) == "exp":
                decays.setdefault(next(iter(read)), []).append(node)
        elif packet_name(node.op) == "cumsum" and isinstance(node.meta, TensorMeta) and node.meta.dtype.is_floating_point:
            sums[node.name] = node.name
    found = list(nodes)
    for first, ends in decays.items():
        among = [node for node in nodes if sums.get(node.name) == first] + ends
        inside = {each.name for end in ends for each in _leading_to(end.name, among)}
        found = fused(found, inside, {*outputs, *marked})
    return in_order(found)


def fused(nodes: Sequence[Node], names: Collection[str], wanted: Collection[str]) -> list[Node]:
    """Nodes with one operation in the place of some, which returns what others read and what is wanted."""
    outside = [node for node in nodes if node.name not in names]
    read = {*wanted, *(name for node in outside for name in node.operands())}
    inside = [node for node in nodes if node.name in names]
    return outside + as_one(inside, [node for node in inside if node.name in read and not _is_complex(node)])


def _leading_to(name: str, nodes: Sequence[Node]) -> list[Node]:
    """Operations among some that a node is computed by, itself included."""
    wanted = {name}
    for node in reversed(nodes):
        if node.name in wanted:
            wanted.update(node.operands())
    return [node for node in nodes if node.name in wanted]


def _is_complex(node: Node) -> bool:
    metas = node.meta if isinstance(node.meta, tuple) else (node.meta,)
    return any(meta is not None and meta.dtype.is_complex for meta in metas)


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


def _regions(nodes: Sequence[Node]) -> list[set[str]]:
    """Sets of operations that complex values connect, each with what lies on the way from one of them to another."""
    is_complex = {node.name for node in nodes if _is_complex(node) and node.kind is NodeKind.OP}
    regions: list[set[str]] = []
    for node in nodes:
        read = {name for name in node.operands() if name in is_complex}
        if node.kind is NodeKind.OP and (read or node.name in is_complex):
            regions = with_region(regions, {node.name, *read})
    return closed(nodes, regions)


def with_region(regions: Sequence[set[str]], region: set[str]) -> list[set[str]]:
    """Disjoint regions with one more: it is one with all that it meets, and stands last."""
    return [other for other in regions if not other & region] + [region.union(*(other for other in regions if other & region))]


def closed(nodes: Sequence[Node], regions: list[set[str]]) -> list[set[str]]:
    """The regions, each with all on the way from one of its operations to another; those that meet are one."""
    while True:
        grown = [region | between(nodes, region) for region in regions]
        merged: list[set[str]] = []
        for region in grown:
            merged = with_region(merged, region)
        if merged == regions:
            return regions
        regions = merged


def between(nodes: Sequence[Node], region: set[str]) -> set[str]:
    """Operations that depend on a region and that it depends on."""
    after: set[str] = set(region)
    for node in nodes:
        if any(name in after for name in node.operands()):
            after.add(node.name)
    before: set[str] = set(region)
    for node in reversed(nodes):
        if node.name in before:
            before.update(node.operands())
    return after & before


def as_one(inside: Sequence[Node], results: Sequence[Node]) -> list[Node]:
    """One operation in the place of several, and its results under their old names."""
    names = {node.name for node in inside}
    operands = tuple(dict.fromkeys(name for node in inside for name in node.operands() if name not in names))
    op = Region(tuple(inside), operands, tuple(node.name for node in results))
    args = tuple(Ref(name) for name in operands)
    if len(results) == 1:
        return [dataclasses.replace(results[0], op=op, args=args, kwargs={})]
    metas = tuple(node.meta if isinstance(node.meta, TensorMeta) else None for node in results)
    whole = dataclasses.replace(inside[-1], name=f"{inside[-1].name}_region", op=op, args=args, kwargs={}, meta=metas)
    pieces = [
        dataclasses.replace(node, op=operator.getitem, args=(Ref(whole.name), position), kwargs={})
        for position, node in enumerate(results)
    ]
    return [whole, *pieces]


def in_order(nodes: Sequence[Node]) -> list[Node]:
    """The nodes such that each reads earlier ones only, otherwise in the order given.

    As by going through the list again and again, each time taking what is ready: a node is taken in the pass of the last of its
    operands, or in the one after it where that operand stands behind the node.
    """
    place = {node.name: position for position, node in enumerate(nodes)}
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in {*node.operands()}:
            readers.setdefault(name, []).append(node)
    missing = {node.name: len({*node.operands()}) for node in nodes}
    taken = dict.fromkeys(missing, 0)
    ready = [node for node in nodes if not missing[node.name]]
    for node in ready:
        for reader in readers.get(node.name, ()):
            passes = taken[node.name] + (place[node.name] > place[reader.name])
            taken[reader.name] = max(taken[reader.name], passes)
            missing[reader.name] -= 1
            if not missing[reader.name]:
                ready.append(reader)
    assert len(ready) == len(nodes), "regions read each other"
    return sorted(nodes, key=lambda node: taken[node.name])
