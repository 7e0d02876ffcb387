"""Weights that are used again: how each tensor came about, and what a transposed weight makes of what the weight has made.

What two uses of one weight have in common is found when it is asked for (:mod:`gainstage.signal.pairing`), from the operations
that made the two. A weight that meets, transposed, what it made gives some of it back: given ``u_k = W x_k``,

    W' h = (as with fresh weights) + n Var(w) sum over k of theta_k x_k,      theta = Cov(u, u)^-1 Cov(u, h),

n the terms of the sum, ``theta_k = E[dh/du_k]`` by Stein's lemma (Yang 2020, arXiv:2006.14548, to leading order in the width).
So the square of a linear map, ``W' W x``, has twice the second moment that two maps would make. On ``W x`` itself, as in a
recurrence, W acts like fresh weights, but for what all its products have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gainstage.graph import Graph, Node, Ref, short_name
from gainstage.graph.families import CONCATENATION, LOOKUP, MOVEMENT
from gainstage.propagate.sample import samplings
from gainstage.signal import Value, affine, combine, covariance_between
from gainstage.signal.axes import Axis
from gainstage.signal.copies import replace
from gainstage.signal.gather import one_hot
from gainstage.signal.quadrature import Array, expectation
from gainstage.signal.traits import Origin, Sum
from gainstage.signal.value import gaussian

_NEGLIGIBLE = 1e-9  # of a second moment
_RETURNED = "returned"
_BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation on values: its rule, with positional and named arguments."""

    rule: Callable[[list[Any], dict[str, Any]], Any]
    args: list[Any]
    kwargs: dict[str, Any]

    def inputs(self) -> tuple[Value, ...]:
        """The values among the arguments, in order."""
        return tuple(_values([self.args, list(self.kwargs.values())]))

    def settings(self) -> object:
        """All other arguments."""
        return _settings(self.args), tuple((name, _settings(value)) for name, value in self.kwargs.items())

    def run(self, inputs: Any) -> Any:
        """The operation on other values."""
        others = iter(inputs)
        args = _filled(self.args, others)
        return self.rule(args, {name: _filled(value, others) for name, value in self.kwargs.items()})


def gradients_with_origin(node: Node, graph: Graph, operations: Sequence[Operation], found: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients that an operation sends back, each with how it came about; ``operations``: its rule backwards, for each.

    So what the paths through several uses of a weight have in common is found as in the forward pass.
    """
    if not found:
        return found
    inputs, settings = operations[0].inputs(), operations[0].settings()

    def originated(gradient: Any, part: int) -> Any:
        if not isinstance(gradient, Value) or not gradient.lineage & graph.reused or any(gradient is x for x in inputs):
            return gradient
        return _originated(
            replace(gradient, sum=None), call=(node.op, _BACKWARD, settings), inputs=inputs, run=operations[part].run,
            part=part, draws=node.may_draw, reuses=True,
        )  # fmt: skip

    return tuple(originated(gradient, part) for part, gradient in enumerate(found))


def gradient_sum(total: Value, terms: tuple[Value, Value], graph: Graph) -> Value:
    """A sum of gradients, with its terms."""
    if not total.lineage & graph.reused:
        return total
    return _originated(total, call=object(), inputs=terms, run=lambda _: total, part=None, draws=False, reuses=True)


def _values(argument: Any) -> Iterator[Value]:
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, list):
        for item in argument:
            yield from _values(item)


def _settings(argument: Any) -> Any:
    if isinstance(argument, list):
        return tuple(_settings(item) for item in argument)
    return Value if isinstance(argument, Value) else argument


def _filled(argument: Any, others: Iterator[Value]) -> Any:
    if isinstance(argument, list):
        return [_filled(item, others) for item in argument]
    return next(others) if isinstance(argument, Value) else argument


def with_origin(node: Node, graph: Graph, operation: Operation, result: Any, values: Mapping[str, Any]) -> Any:
    """The result of an operation, with how it came about, where it depends on weights that are used several times."""
    if samplings(result):
        return result
    if isinstance(result, tuple):
        return tuple(_made(node, graph, operation, part, i) for i, part in enumerate(result))
    made = _made(node, graph, operation, result, None)
    return _with_returns(node, graph, made, values) if isinstance(made, Value) and made.lineage & graph.reused else made


def beginning(found: Value) -> Value:
    """A constant or an input: the beginning of what is made of it, by the axes that it has here."""
    return _originated(found, call=object(), inputs=(), run=lambda _: found, part=None, draws=False, reuses=False)


def _made(node: Node, graph: Graph, operation: Operation, result: Any, part: int | None) -> Any:
    if not isinstance(result, Value):
        return result
    inputs = operation.inputs()
    if any(result is x for x in inputs):
        return result
    how = {
        "call": (node.op, operation.settings()), "run": operation.run, "part": part, "draws": node.may_draw,
        "reuses": bool(result.lineage & graph.reused),
    }  # fmt: skip
    if how["reuses"] and part is None and len(inputs) == 1 and node.short_name in MOVEMENT:
        return _moved(result, inputs[0], how)
    return _originated(result if _is_sum_of(result, inputs) else replace(result, sum=None), inputs=inputs, **how)


def _moved(result: Value, x: Value, how: dict[str, Any]) -> Value:
    """A view or a part of x: what x was before it was laid out otherwise, if it is that again; of a sum, its terms so."""
    before = next((y for y in _earlier(x) if y.marginal is result.marginal and y.dims == result.dims), None)
    if before is not None:
        return replace(result, origin=before.origin, sum=_sum_of(result, _terms(before)))
    moved = tuple((_moved(how["run"]([term]), term, how), sign) for term, sign in _terms(x))
    return _originated(replace(result, sum=_sum_of(result, moved)), inputs=(x,), **how)


def _terms(x: Value) -> tuple[tuple[Value, float], ...]:
    terms = () if x.sum is None or x.sum.table is not x.table else x.sum.terms
    return terms if all(term.shape == x.shape for term, _ in terms) else ()


def _sum_of(result: Value, terms: tuple[tuple[Value, float], ...]) -> Sum | None:
    return Sum(result.table, terms) if terms else None


def _earlier(x: Value) -> Iterator[Value]:
    """What x was before it was laid out as it is: views, parts of concatenations, and what these were made of."""
    seen, left = set(), [x]
    while left:
        origin = left.pop().origin
        if origin is None or origin in seen or not isinstance(origin.call, tuple):
            continue
        seen.add(origin)
        if short_name(origin.call[0]) in MOVEMENT | CONCATENATION:
            yield from origin.inputs
            left += origin.inputs


def _originated(result: Value, inputs: tuple[Value, ...], **how: Any) -> Value:
    plain = replace(result, origin=None)
    order = 1 + max((x.origin.order for x in inputs if x.origin is not None), default=0)
    return replace(plain, origin=Origin(value=plain, inputs=inputs, order=order, **how))


def _is_sum_of(result: Value, inputs: Sequence[Value]) -> bool:
    """Whether the terms of a sum are, up to factors, what the operation read: a product and its bias are not."""
    terms = () if result.sum is None else result.sum.terms
    return bool(terms) and all(any(_is_multiple(term, x) for x in inputs) for term, _ in terms)


def _is_multiple(y: Value, x: Value) -> bool:
    return y.marginal is x.marginal or (y.source is not None and y.source is x.source)


@dataclass(frozen=True, slots=True)
class _Product:
    """A weight times data: the result as with fresh weights, what it read, and how much louder than that it is."""

    fresh: Value
    read: Value
    weight: Value
    gain: float

    def is_returned_by(self, other: _Product) -> bool:
        """Whether another product sums over the rows of this one, and has a row for each term of its sum."""
        own, others = self.rows(), other.rows()
        return (
            bool(own and others)
            and not own & others
            and self.weight.marginal.latent == other.weight.marginal.latent
            and own <= set(other.weight.axes)
            and others <= set(self.weight.axes)
            and self.fresh.shape == other.read.shape
            and self.read.shape == other.fresh.shape
        )

    def is_repeated_by(self, other: _Product) -> bool:
        """Whether both are depthwise convolutions with one kernel, of maps of one shape."""
        shape = self.weight.shape
        return (
            len(shape) > 2
            and shape[1] == 1 < self.read.shape[1] == shape[0]
            and self.weight.marginal.latent == other.weight.marginal.latent
            and self.fresh.shape == self.read.shape == other.read.shape == other.fresh.shape
        )

    def scale_in(self, other: _Product) -> float:
        """The weight of this product over that of another one, both multiples of one parameter."""
        own, others = self.weight.marginal.values, other.weight.marginal.values
        return expectation(own * others) / expectation(others**2)

    def rows(self) -> set[Axis]:
        """Axes of the weight that the result has."""
        return set(self.fresh.axes) & set(self.weight.axes)


def _product_at(node: Node, result: Value, bit: int, values: Mapping[str, Any]) -> _Product | None:
    """What an operation makes of one weight and one tensor, or of the rows that it looks up; None for other operations."""
    if node.short_name in LOOKUP:
        return _lookup_at(node, result, values)
    operands = [values[name] for name in node.operands() if isinstance(values.get(name), Value)]
    data = [x for x in operands if not x.is_weight and x.constant is None]
    weights = [x for x in operands if x.is_weight and x.lineage == bit]
    if len(data) != 1 or len(weights) != 1 or data[0].second_moment <= 0.0:
        return None
    origin = result.origin
    fresh = origin.inputs[0] if origin is not None and isinstance(origin.call, tuple) and origin.call[0] == _RETURNED else result
    biases = sum(x.second_moment for x in operands if x.is_weight and x is not weights[0])
    return _Product(fresh, data[0], weights[0], (fresh.second_moment - biases) / data[0].second_moment)


def _lookup_at(node: Node, result: Value, values: Mapping[str, Any]) -> _Product | None:
    """A look-up of rows as the product that it is: of the weight, transposed, with a one at each row that is looked up."""
    weight, index = (values[argument.name] if isinstance(argument, Ref) else None for argument in node.args[:2])
    if not isinstance(weight, Value) or not isinstance(index, Value) or index.constant is None or len(weight.dims) != 2:
        return None
    picked = one_hot(index.constant, weight.shape[0])
    return _Product(result, picked, weight, 1.0) if picked.shape[:-1] == result.shape[:-1] else None


def _with_returns(node: Node, graph: Graph, made: Value, values: Mapping[str, Any]) -> Value:
    """A product with what its weight, transposed, gives back of what it was multiplied with before."""
    weights = [x for name in node.operands() if isinstance(x := values.get(name), Value) and x.is_weight]
    for bit in {x.lineage for x in weights if x.lineage & graph.reused and x.lineage.bit_count() == 1}:
        uses = graph.uses[list(graph.parameters)[bit.bit_length() - 1]]
        own = _product_at(node, made, bit, values)
        if own is None or not own.read.lineage & bit or node.name not in uses:
            continue
        done = [name for name in uses[: uses.index(node.name)] if isinstance(values.get(name), Value)]
        before = [_product_at(graph.by_name[name], values[name], bit, values) for name in done]
        returning = [product for product in before if product is not None and product.is_returned_by(own)]
        if returning:
            return _returned(own, returning)
        repeated = [product for product in before if product is not None and product.is_repeated_by(own)]
        return _repeated(own, repeated) if repeated else made
    return made


def _returned(own: _Product, before: list[_Product]) -> Value:
    """``y + gain sum over k of theta_k x_k``."""
    total = made = own.fresh
    for product, slope in zip(before, _slopes(own, before), strict=True):
        if slope**2 * product.fresh.second_moment > _NEGLIGIBLE * own.read.second_moment:
            total = combine(torch.add, total, affine(product.read, own.gain * product.scale_in(own) * float(slope)))
    if total is made:
        return made
    return _originated(
        total, call=(_RETURNED, object()), inputs=(made, *(product.read for product in before)), run=lambda _: total, part=None,
        draws=False, reuses=True,
    )  # fmt: skip


def _repeated(own: _Product, before: list[_Product]) -> Value:
    """``E[(w * w * x)^2]`` is ``2 + (kurtosis - 2) / k`` times that of two kernels of k taps: two orders are one product.

    The square of the tap in the middle gives x back, ``E[w^2] x``. Of maps whose places are alike only by chance.
    """
    made, slopes = own.fresh, _slopes(own, before)
    sizes, taps = own.weight.shape[2:], float(np.prod(own.weight.shape[2:]))
    back = own.gain / taps if all(size % 2 for size in sizes) else 0.0
    squares = sum(slope**2 * product.fresh.variance for product, slope in zip(before, slopes, strict=True))
    gained = own.gain * squares * (1.0 + (own.weight.marginal.kurtosis - 2.0) / taps - (back > 0.0) / taps**2)
    if gained <= _NEGLIGIBLE * made.second_moment:
        return made
    part = gaussian(made.dims, 0.0, made.covariance * (gained / made.variance), made.levels, lineage=made.lineage)
    louder = replace(part, near=made.near, overlap=made.overlap)
    total = combine(torch.add, made, louder)
    for product, slope in zip(before, slopes, strict=True):
        total = combine(torch.add, total, affine(product.read, back * float(slope)))
    return _originated(
        total, call=(_RETURNED, object()), inputs=(made, louder, *(product.read for product in before)), run=lambda _: total,
        part=None, draws=False, reuses=True,
    )  # fmt: skip


def _slopes(own: _Product, before: list[_Product]) -> Array:
    """``theta = Cov(u, u)^-1 Cov(u, h)``, u what products made and h what this one reads."""
    shared = [covariance_between(own.read, product.fresh) for product in before]
    if all(table is None for table in shared):
        return np.zeros(len(before))
    common = np.array([_of_one(covariance_between(a.fresh, b.fresh)) for a in before for b in before])
    found = np.linalg.lstsq(common.reshape(len(before), -1), np.array([_of_one(t) for t in shared]), rcond=1e-6)[0]
    return np.asarray(found)


def _of_one(table: Any) -> float:
    return 0.0 if table is None else float(table[(1,) * table.ndim])
