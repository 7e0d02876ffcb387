"""The interpreter backwards: gradients' tables from the outputs to every node and parameter."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from gainstage.errors import GainstageError
from gainstage.graph import Graph, Node, NodeKind, Ref
from gainstage.propagate.interpret import resolve
from gainstage.propagate.kinship import Operation, gradient_sum, gradients_with_origin
from gainstage.propagate.sample import Reason, fault_of
from gainstage.propagate.sample_backward import sample_backward
from gainstage.rules import is_free, is_pointwise
from gainstage.rules.backward import BackwardCall, BackwardRule, backward_rules, times_slope
from gainstage.rules.registry import Op
from gainstage.signal import Value, accumulated, gaussian


def unit_gradient(output: Value) -> Value:
    """Independent entries of second moment 1."""
    table = np.zeros_like(output.table)
    table[(1,) * table.ndim] = 1.0
    return gaussian(output.dims, 0.0, table)


@dataclass(frozen=True, slots=True)
class Backward:
    """What a backward pass found: the gradient of every node that has one, and the nodes whose backward pass was sampled.

    ``given_up``: those of them that have a rule, and why it was not followed.
    """

    gradients: Mapping[str, Value]
    sampled: tuple[str, ...]
    given_up: tuple[tuple[Node, Reason], ...] = ()


def propagate_backward(graph: Graph, values: Mapping[str, Any]) -> Backward:
    """Gradients from the outputs to everything that they depend on.

    Args:
        graph: a captured model.
        values: result of every node, from the forward pass.

    Returns:
        Gradients of the sum of all entries of the outputs, each times a weight of its own: independent, mean 0 and second moment
        1. Of a loss, a single number, this is its gradient up to a sign.
    """
    walk = _Walk(_needed(graph), values, graph)
    for name in graph.outputs:
        if isinstance(values[name], Value) and name in walk.needed:
            walk.accumulate(name, unit_gradient(values[name]))
    sampled = walk.back(graph.nodes)
    return Backward(walk.found(), sampled, tuple(walk.given_up))


def propagate_back_along(
    segment: Sequence[Node], values: Mapping[str, Any], gradient: Value | None = None
) -> Mapping[str, Value]:
    """Gradients along a few nodes only: of the last one as given, of the others what comes of it.

    Args:
        segment: nodes in execution order, the first of them as far as gradients go.
        values: result of every node that these read.
        gradient: of the last one; without it independent entries of second moment 1.
    """
    walk = _Walk({node.name for node in segment}, values)
    walk.accumulate(segment[-1].name, unit_gradient(values[segment[-1].name]) if gradient is None else gradient)
    walk.back(segment[1:])
    return walk.found()


@dataclass(frozen=True, slots=True)
class _Walk:
    """A way back: the nodes on it, the results of all, and the gradients so far.

    ``graph``: where it is to be followed what the paths through several uses of a weight have in common.
    """

    needed: set[str]
    values: Mapping[str, Any]
    graph: Graph | None = None
    gradients: dict[str, Any] = field(default_factory=dict)
    given_up: list[tuple[Node, Reason]] = field(default_factory=list)

    def found(self) -> dict[str, Value]:
        """The gradient of every node that has one."""
        return {name: g for name, g in self.gradients.items() if isinstance(g, Value)}

    def back(self, nodes: Sequence[Node]) -> tuple[str, ...]:
        """Go through nodes in reverse and add to the gradients of what they read; returns the nodes that were sampled."""
        sampled: list[str] = []
        for node in reversed(nodes):
            g = self.gradients.get(node.name)
            if g is None or node.kind is not NodeKind.OP or node.name not in self.needed:
                continue
            if node.op is operator.getitem:
                self._accumulate_part(node.args[0].name, node.args[1], g)
                continue
            found, was_sampled = self._through(node, g)
            if was_sampled:
                sampled.append(node.name)
            for argument, gradient in zip(node.args, found, strict=False):
                self._deliver(argument, gradient)
        return tuple(reversed(sampled))

    def accumulate(self, name: str, gradient: Value) -> None:
        """Add to the gradient of a node."""
        self.gradients[name] = self._sum(self.gradients.get(name), gradient, self.values[name])

    def _accumulate_part(self, name: str, index: int, gradient: Value) -> None:
        parts: list[Value | None] = self.gradients.setdefault(name, [None] * len(self.values[name]))
        parts[index] = self._sum(parts[index], gradient, self.values[name][index])

    def _sum(self, before: Value | None, gradient: Value, of: Value) -> Value:
        if before is None:
            return gradient
        total = accumulated(before, gradient, of)
        return total if self.graph is None else gradient_sum(total, (before, gradient), self.graph)

    def _through(self, node: Node, g: Any) -> tuple[tuple[Any, ...], bool]:
        assert node.op is not None
        if is_free(node.op):
            return (), False
        args = [resolve(argument, self.values) for argument in node.args]
        kwargs = {name: resolve(argument, self.values) for name, argument in node.kwargs.items()}
        rule = backward_rules().get(node.op, times_slope if is_pointwise(node.op) else None)
        if rule is None:
            return sample_backward(node, g, args, kwargs), True
        wanted = frozenset(place for place, argument in enumerate(node.args) if _is_needed(argument, self.needed))
        operands = [self.values[node.name], g, *args]
        try:
            found = _by_rule(rule, node.op, wanted, operands, kwargs)
        except GainstageError:
            raise
        except NotImplementedError as error:
            self.given_up.append((node, Reason(f"backwards: {error}")))
            return sample_backward(node, g, args, kwargs), True
        except Exception as error:  # noqa: BLE001  (a mistake of the rule, which the result names)
            self.given_up.append((node, fault_of(rule, error)))
            return sample_backward(node, g, args, kwargs), True
        if self.graph is None or not self.graph.reused:
            return found, False
        by_part = [Operation(partial(_by_rule, rule, node.op, frozenset({part})), operands, kwargs) for part in range(len(found))]
        return gradients_with_origin(node, self.graph, by_part, found), False

    def _deliver(self, argument: Any, gradient: Any) -> None:
        if gradient is None:
            return
        if isinstance(argument, Ref):
            if argument.name in self.needed:
                self.accumulate(argument.name, gradient)
        elif isinstance(argument, (list, tuple)):
            for item, part in zip(argument, gradient, strict=True):
                self._deliver(item, part)


def _by_rule(rule: BackwardRule, op: Op, wanted: frozenset[int], args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Gradients of an operation's arguments from its result, the gradient of that, and the arguments themselves."""
    result, g, *read = args
    return rule(BackwardCall(op, result, wanted), g, *read, **kwargs)


def _needed(graph: Graph) -> set[str]:
    """Nodes that depend on a parameter or a floating-point input."""
    needed: set[str] = set()
    for node in graph.nodes:
        is_source = node.kind in (NodeKind.PARAMETER, NodeKind.INPUT)
        if is_source or (node.kind is NodeKind.OP and any(name in needed for name in node.operands())):
            needed.add(node.name)
    return needed


def _is_needed(argument: Any, needed: set[str]) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(_is_needed(item, needed) for item in argument)
    return isinstance(argument, Ref) and argument.name in needed
