"""Softmaxes that are written out: exponentials over their sum, and the logarithm of such a sum, under their own names.

The three tensors of ``exp(x - m) / sum exp(x - m)`` are functions of one draw, and their ratio is bounded by 1 where each of them
may be of any size. The rules of softmax, of its logarithm and of the sum know that. Whatever m is taken off, it cancels if it is
the same along the dimension that is summed over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, final

import torch

from gainstage.capture.written import Written, is_negligible
from gainstage.graph import Node, Ref, TensorMeta
from gainstage.graph.families import UNCHANGED

aten = torch.ops.aten

_WIDENED = UNCHANGED | {"expand", "unsqueeze", "view", "reshape"}
_PRODUCTS = frozenset({"matmul", "bmm"})


def name_softmaxes(nodes: Sequence[Node]) -> list[Node]:
    """The same graph, in which softmaxes, their logarithms and logarithms of sums of exponentials are one operation each.

    Args:
        nodes: a graph without writes, its constants computed. What is no longer read stays.
    """
    written = _Written(nodes)
    found: list[Node] = []
    for node in nodes:
        made = written.named(node)
        for each in made:
            written.nodes[each.name] = each
        found += made
    return found


@final
class _Written(Written):
    """What the nodes of a graph stand for, as far as they have been named."""

    def named(self, node: Node) -> list[Node]:
        """A node, or what it is the same as."""
        name = node.short_name
        if node.kwargs or not isinstance(node.meta, TensorMeta) or not node.meta.dtype.is_floating_point:
            return [node]
        if name == "div":
            return self._over_sum(node)
        single = {"exp": self._exponential, "log": self._logarithm, "add": self._whole, "sub": self._less_whole}
        return [single[name](node)] if name in single else [node]

    def _over_sum(self, node: Node) -> list[Node]:
        """``exp(x - m) / sum exp(x - m)``, or a product of the numerator with something: of the softmax with it."""
        above, below = node.args
        summed = self._sum(below)
        if summed is None or not isinstance(above, Ref):
            return [node]
        exponential, dim = summed
        assert isinstance(exponential.meta, TensorMeta)
        if not self._is_along(below, exponential, dim):
            return [node]
        made = dataclasses.replace(
            exponential, op=aten.softmax.int, args=(Ref(self._shifted(exponential, dim).name), dim), kwargs={}
        )
        if self.peeled(above, UNCHANGED) is exponential and node.meta == exponential.meta:
            return [dataclasses.replace(made, name=node.name, meta=node.meta, provenance=node.provenance)]
        product = self.peeled(above, UNCHANGED)
        if product.short_name not in _PRODUCTS or self.peeled(product.args[0], UNCHANGED) is not exponential:
            return [node]
        rank = len(exponential.meta.shape)
        if dim != rank - 1 or node.meta != product.meta or not isinstance(node.meta, TensorMeta) or len(node.meta.shape) != rank:
            return [node]
        made = dataclasses.replace(made, name=f"{node.name}_softmax", provenance=node.provenance)
        return [made, dataclasses.replace(node, op=product.op, args=(Ref(made.name), product.args[1]))]

    def _exponential(self, node: Node) -> Node:
        """``exp(log_softmax(x))``."""
        inner = self.peeled(node.args[0], UNCHANGED)
        return dataclasses.replace(node, op=aten.softmax.int, args=inner.args[:2]) if inner.op is aten.log_softmax.int else node

    def _logarithm(self, node: Node) -> Node:
        """``log(softmax(x))``."""
        inner = self.peeled(node.args[0], UNCHANGED)
        return dataclasses.replace(node, op=aten.log_softmax.int, args=inner.args[:2]) if inner.op is aten.softmax.int else node

    def _whole(self, node: Node) -> Node:
        """``m + log(sum exp(x - m))``."""
        for log, shift in (node.args[:2], node.args[1::-1]):
            if isinstance(log, Ref) and isinstance(shift, Ref) and (made := self._log_sum(log, shift, node)) is not None:
                return made
        return node

    def _log_sum(self, log: Ref, shift: Ref, node: Node) -> Node | None:
        inner = self.peeled(log, _WIDENED)
        summed = self._sum(inner.args[0]) if inner.short_name == "log" else None
        if summed is None or not isinstance(node.meta, TensorMeta):
            return None
        exponential, dim = summed
        x, difference = self._shifted(exponential, dim), self.peeled(exponential.args[0], UNCHANGED)
        if x is difference or not isinstance(x.meta, TensorMeta) or not isinstance(difference.args[1], Ref):
            return None
        (*before, _), after = x.meta.shape[: dim + 1], x.meta.shape[dim + 1 :]
        keeps = node.meta.shape == (*before, 1, *after)
        if not (keeps or node.meta.shape == (*before, *after)):
            return None
        if self.peeled(difference.args[1], _WIDENED) is not self.peeled(shift, _WIDENED):
            return None
        return dataclasses.replace(node, op=aten.logsumexp.default, args=(Ref(x.name), [dim], keeps))

    def _less_whole(self, node: Node) -> Node:
        """``x - log(sum exp(x))``."""
        if not all(isinstance(argument, Ref) for argument in node.args):
            return node
        x, whole = self.peeled(node.args[0], UNCHANGED), self.peeled(node.args[1], _WIDENED)
        if whole.short_name == "logsumexp" and len(whole.args[1]) == 1:
            of, dim = self.nodes[whole.args[0].name], whole.args[1][0]
        elif whole.short_name == "log" and (summed := self._sum(whole.args[0])) is not None:
            of, dim = self.peeled(summed[0].args[0], UNCHANGED), summed[1]
        else:
            return node
        if of is not x or not isinstance(x.meta, TensorMeta) or node.meta != x.meta:
            return node
        if not self._is_along(node.args[1], x, dim % len(x.meta.shape)):
            return node
        return dataclasses.replace(node, op=aten.log_softmax.int, args=(Ref(x.name), dim))

    def _sum(self, below: Any) -> tuple[Node, int] | None:
        """The exponential that a denominator is the sum of along one dimension, and this dimension."""
        if not isinstance(below, Ref):
            return None
        node = self.peeled(below, _WIDENED, is_negligible)
        if node.short_name != "sum" or len(node.args) < 2 or len(node.args[1] or ()) != 1:
            return None
        exponential = self.peeled(node.args[0], UNCHANGED)
        if exponential.short_name != "exp" or not isinstance(exponential.meta, TensorMeta):
            return None
        return exponential, node.args[1][0] % len(exponential.meta.shape)

    def _shifted(self, exponential: Node, dim: int) -> Node:
        """``x`` of ``exp(x - m)``, m the same along a dimension; what the exponential is of where there is no such m."""
        difference = self.peeled(exponential.args[0], UNCHANGED)
        if difference.short_name != "sub" or difference.kwargs or not isinstance(difference.args[0], Ref):
            return difference
        x, shift = self.nodes[difference.args[0].name], difference.args[1]
        is_number = not isinstance(shift, Ref)
        same = x.meta == difference.meta and (is_number or self._is_along(shift, x, dim))
        return x if same else difference

    def _is_along(self, read: Ref, x: Node, dim: int) -> bool:
        """Whether a tensor has one entry along a dimension of x, with which it is broadcast, or repeats one there."""
        node = self.nodes[read.name]
        assert isinstance(x.meta, TensorMeta)
        while node.short_name in UNCHANGED | {"expand"} or is_negligible(node):
            if self._size(node, x, dim) == 1:
                return True
            node = self.nodes[node.args[0].name]
        return self._size(node, x, dim) == 1

    def _size(self, node: Node, x: Node, dim: int) -> int:
        assert isinstance(x.meta, TensorMeta)
        shape = node.meta.shape if isinstance(node.meta, TensorMeta) else ()
        place = dim - len(x.meta.shape) + len(shape)
        return shape[place] if place >= 0 else 1
