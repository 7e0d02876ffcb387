"""Contractions that are written otherwise: as one of torch's composed products, or as products of entries that are summed.

``tensordot``, ``inner``, ``vecdot``, ``multi_dot``, ``kron`` and ``outer`` are what torch makes of them; ``(x * w).sum(-1)``, as
of the attention vectors of a graph network or of pooling by attention, is the contraction that ``einsum`` writes.
"""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as trees

from gainstage.capture.lower import resolve
from gainstage.capture.lowered import meta_of
from gainstage.capture.regions import Dataflow
from gainstage.graph import Node, NodeKind, Ref, TensorMeta
from gainstage.graph.families import MOVEMENT, NOISE, ROW_READS, SOFTMAX

aten = torch.ops.aten

_COMPOSED = frozenset({"inner", "tensordot", "linalg_vecdot", "linalg_multi_dot", "chain_matmul", "kron", "outer", "ger"})
_MOVED = (MOVEMENT - ROW_READS) | NOISE


def name_contractions(nodes: Sequence[Node], wanted: Collection[str]) -> list[Node]:
    """The same graph, in which each contraction is an operation that is known as one.

    Args:
        nodes: a graph without writes, its constants computed. What is no longer read stays.
        wanted: names that are wanted after it.
    """
    metas = {node.name: node.meta for node in nodes}
    unfolded = [made for node in nodes for made in (_unfolded(node, metas) if node.short_name in _COMPOSED else [node])]
    if all(node.op is not aten.sum.dim_IntList for node in unfolded):
        return unfolded
    dataflow = Dataflow(unfolded)
    return list(itertools.chain.from_iterable(_contraction(node, dataflow, wanted) for node in unfolded))


def _unfolded(node: Node, metas: Mapping[str, Any]) -> list[Node]:
    """The operations that torch composes one of, found on tensors without values."""
    names = list(dict.fromkeys(node.operands()))

    def run(*tensors: torch.Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))
        args, kwargs = trees.tree_map(lambda leaf: given[leaf.name] if isinstance(leaf, Ref) else leaf, (node.args, node.kwargs))
        assert node.op is not None
        return node.op(*args, **kwargs)

    shapes = make_fx(run)(*(torch.empty(metas[name].shape, dtype=metas[name].dtype, device="meta") for name in names))
    values: dict[Any, Any] = {}
    found: list[Node] = []
    for origin in shapes.graph.nodes:
        if origin.op == "placeholder":
            values[origin] = Ref(names[len(values)])
        elif origin.op == "call_function":
            name, meta = f"{node.name}_{origin.name}", meta_of(origin.meta["val"])
            args, kwargs = resolve(origin.args, values), resolve(origin.kwargs, values)
            values[origin] = Ref(name)
            found.append(dataclasses.replace(node, name=name, op=origin.target, args=args, kwargs=kwargs, meta=meta))
    return [*found[:-1], dataclasses.replace(found[-1], name=node.name)]


def _contraction(node: Node, dataflow: Dataflow, wanted: Collection[str]) -> list[Node]:
    """``einsum`` in the place of a sum of products of the entries of a weight, or of shares, with those of a signal."""
    if node.op is not aten.sum.dim_IntList or node.kwargs:
        return [node]
    product = dataflow.nodes[node.args[0].name]
    factors = [dataflow.nodes[factor.name] for factor in product.args if isinstance(factor, Ref)]
    if product.short_name != "mul" or product.name in wanted or len(dataflow.readers[product.name]) > 1 or len(factors) != 2:
        return [node]
    if sum(_weighs(factor, dataflow) for factor in factors) != 1:
        return [node]
    shape = _tensor(product).shape
    summed = {dim % len(shape) for dim in node.args[1] or range(len(shape))}
    sizes = [(1,) * (len(shape) - len(own)) + own for own in (_tensor(factor).shape for factor in factors)]
    if any(own[dim] == 1 for own in sizes for dim in summed):
        return [node]
    kept = [[dim for dim, size in enumerate(own) if size > 1] for own in (*sizes, shape)]
    kept[2] = [dim for dim in kept[2] if dim not in summed]
    letters = ["".join(string.ascii_lowercase[dim] for dim in dims) for dims in kept]
    pieces = [
        _reshaped(factor, f"{node.name}_factor{place}", [own[dim] for dim in kept[place]])
        for place, (factor, own) in enumerate(zip(factors, sizes, strict=True))
    ]
    made = dataclasses.replace(
        node,
        name=f"{node.name}_einsum",
        op=aten.einsum.default,
        args=(f"{letters[0]},{letters[1]}->{letters[2]}", [Ref(piece.name) for piece in pieces]),
        meta=TensorMeta(tuple(shape[dim] for dim in kept[2]), _tensor(node).dtype),
    )
    return [*pieces, made, _reshaped(made, node.name, _tensor(node).shape)]


def _tensor(node: Node) -> TensorMeta:
    assert isinstance(node.meta, TensorMeta)
    return node.meta


def _reshaped(node: Node, name: str, shape: Sequence[int]) -> Node:
    meta = TensorMeta(tuple(shape), _tensor(node).dtype)
    return Node(
        name=name, kind=NodeKind.OP, op=aten.reshape.default, args=(Ref(node.name), list(shape)), meta=meta,
        provenance=node.provenance,
    )  # fmt: skip


def _weighs(node: Node, dataflow: Dataflow) -> bool:
    """Whether a tensor is a parameter, rows of one, or what a softmax returns, only moved."""
    while node.kind is NodeKind.OP and node.short_name in _MOVED and len(dataflow.operands[node.name]) == 1:
        node = dataflow.nodes[dataflow.operands[node.name][0]]
    return node.kind is NodeKind.PARAMETER or node.short_name in SOFTMAX
