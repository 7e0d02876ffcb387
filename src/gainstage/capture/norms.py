"""Norms that are written out: a tensor over the root of its own mean square, with or without its mean, under their own names.

The factors of ``x (mean(x^2) + eps)^(-1/2)`` are functions of one draw, and the gradient has nothing along the result: what is
sent back through the product and through the mean square, each by itself, does not show that. The rules of norms do. A scale that
is multiplied afterwards stays an operation of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch

from gainstage.capture.written import Written, is_negligible
from gainstage.graph import Node, NodeKind, Ref, TensorMeta
from gainstage.graph.families import ROW_READS, UNCHANGED, argument

aten = torch.ops.aten

_SAME = UNCHANGED - {"detach"}  # through which gradients go
_WIDENED = _SAME | {"expand", "unsqueeze", "view", "reshape"}


def name_norms(nodes: Sequence[Node]) -> list[Node]:
    """The same graph, in which norms over the last dimensions are one operation each.

    Args:
        nodes: a graph without writes, its constants computed. What is no longer read stays. Norms of weights are left alone.
    """
    written = _Written(nodes)
    return [written.named(node) for node in nodes]


@dataclass(frozen=True, slots=True)
class _MeanSquare:
    """``mean(x^2) + eps`` over the last dimensions, so many of them; of x less its mean where that is a variance."""

    of: Ref
    count: int
    eps: float = 0.0
    is_variance: bool = False


@final
class _Written(Written):
    """What the nodes of a graph stand for."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__(nodes)
        self.data: set[str] = set()  # what is computed from more than parameters
        for node in nodes:
            is_source = node.kind is NodeKind.INPUT or node.may_draw or node.short_name in ROW_READS
            if is_source or any(name in self.data for name in node.operands()):
                self.data.add(node.name)

    def named(self, node: Node) -> Node:
        """A node, or the norm that it is."""
        for whole, factor in _with_factors(node):
            square = self._under_root(factor, is_inverse=node.short_name == "mul") if whole.name in self.data else None
            if square is not None and self._is_along(factor, node, square.count):
                return self._norm(node, whole, square)
        return node

    def _norm(self, node: Node, whole: Ref, square: _MeanSquare) -> Node:
        """A tensor over the root of a mean square: a norm where that is its own."""
        centred, inner = self._centred(whole, square.count), self._centred(square.of, square.count)
        if square.is_variance:
            inner = square.of
        is_centred = centred is not None and inner is not None
        pair = (centred, inner) if is_centred else (whole, square.of)
        both = {self.peeled(each, _SAME).name for each in pair if each is not None}
        x = next((each for each in pair if each is not None and self.nodes[each.name].meta == node.meta), None)  # of that type
        if len(both) > 1 or x is None or (square.is_variance and not is_centred):
            return node
        assert isinstance(node.meta, TensorMeta)
        shape = list(node.meta.shape[-square.count :])
        if not is_centred:
            return dataclasses.replace(node, op=aten.rms_norm.default, args=(x, shape, None, square.eps))
        return dataclasses.replace(node, op=aten.layer_norm.default, args=(x, shape, None, None, square.eps))

    def _under_root(self, read: Ref, *, is_inverse: bool) -> _MeanSquare | None:
        """The mean square of which a factor is the root, or one over the root."""
        node = self.peeled(read, _WIDENED)
        if not is_inverse and is_negligible(node):
            node = self.peeled(node.args[0], _WIDENED)
        name = node.short_name
        if name == "reciprocal" and is_inverse:
            return self._under_root(node.args[0], is_inverse=False)
        if name == "std" and not is_inverse:
            return self._moment(node)
        if name == ("rsqrt" if is_inverse else "sqrt") or (name == "pow" and node.args[1] == (-0.5 if is_inverse else 0.5)):
            return self._moment(self.peeled(node.args[0], _WIDENED))
        return None

    def _moment(self, node: Node) -> _MeanSquare | None:
        """A mean square or a variance, and what is added to it."""
        eps = 0.0
        if node.short_name == "add" and not node.kwargs and isinstance(node.args[1], float):
            node, eps = self.peeled(node.args[0], _WIDENED), node.args[1]
        count = self._last(node)
        if not count:
            return None
        if node.short_name in ("var", "std"):
            is_mean = argument(node, 2) in (0, False) and argument(node, 2) is not None
            return _MeanSquare(node.args[0], count, eps, is_variance=True) if is_mean else None
        square = self.peeled(node.args[0], _SAME)
        return _MeanSquare(square.args[0], count, eps) if node.short_name == "mean" and _is_square(square) else None

    def _centred(self, read: Ref, count: int) -> Ref | None:
        """``x`` of ``x - mean(x)``, the mean over so many last dimensions."""
        node = self.peeled(read, _SAME)
        if node.short_name != "sub" or node.kwargs or not all(isinstance(each, Ref) for each in node.args):
            return None
        x, shift = node.args
        mean = self.peeled(shift, _WIDENED)
        is_own = mean.short_name == "mean" and self.peeled(mean.args[0], _SAME) is self.peeled(x, _SAME)
        return x if is_own and self._last(mean) == count and self._is_along(shift, node, count) else None

    def _last(self, node: Node) -> int:
        """Over how many dimensions a statistic is taken, if these are the last ones; else 0."""
        dims = argument(node, 1)
        meta = self.nodes[node.args[0].name].meta if node.args and isinstance(node.args[0], Ref) else None
        if not isinstance(dims, (list, tuple)) or not isinstance(meta, TensorMeta):
            return 0
        rank = len(meta.shape)
        places = sorted(dim % rank for dim in dims)
        return len(places) if places == list(range(rank - len(places), rank)) else 0

    def _is_along(self, read: Ref, of: Node, count: int) -> bool:
        """Whether a tensor has one entry for all along the last dimensions of a node, before it is repeated there."""
        assert isinstance(of.meta, TensorMeta)
        kept = (*of.meta.shape[:-count], *[1] * count)
        node = self.nodes[read.name]
        while _shape(node) != kept and (node.short_name in _SAME | {"expand"} or is_negligible(node)):
            node = self.nodes[node.args[0].name]
        return _shape(node) == kept


def _with_factors(node: Node) -> Iterator[tuple[Ref, Ref]]:
    """The operands of a product of two tensors, either way, or those of a quotient."""
    if node.short_name not in ("mul", "div") or node.kwargs or not isinstance(node.meta, TensorMeta):
        return
    if all(isinstance(each, Ref) for each in node.args):
        yield node.args[0], node.args[1]
        if node.short_name == "mul":
            yield node.args[1], node.args[0]


def _is_square(node: Node) -> bool:
    if node.short_name == "square":
        return True
    return bool(node.args[1] == {"pow": 2, "mul": node.args[0]}.get(node.short_name)) if len(node.args) == 2 else False


def _shape(node: Node) -> tuple[int, ...] | None:
    return node.meta.shape if isinstance(node.meta, TensorMeta) else None
