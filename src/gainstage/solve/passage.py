"""What a contraction does to the signal and to the gradient on its way between two places, from the tables of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, final

from gainstage.errors import UnknownNameError, nearest
from gainstage.graph import Graph, Node, NodeKind
from gainstage.graph.families import MOVEMENT, NOISE, POOLING
from gainstage.plan import Passage
from gainstage.propagate import propagate_back_along
from gainstage.rules import is_pointwise
from gainstage.signal import Value, is_multiple
from gainstage.solve.constraint import Own, data_operand, is_lookup

# Operations that make a function of one signal out of it; of two signals they make a new one.
_BINARY = frozenset({"add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "pow"})
_TRANSPARENT = MOVEMENT | NOISE | POOLING | _BINARY | {"prelu", "glu", "neg"}


class Balance(StrEnum):
    """Which direction a weight keeps the second moment in."""

    FORWARD = "forward"
    BACKWARD = "backward"
    GEOMETRIC = "geometric"  # the geometric mean of both variances


def find_balance(name: str) -> Balance:
    """The balance of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in tuple(Balance):
        raise UnknownNameError(
            f"there is no balance {name!r}{nearest(str(name), tuple(Balance))}; known are {', '.join(Balance)}"
        )
    return Balance(name)


@final
class Passages:
    """From where a contraction's input comes, and what happens to levels from there on and back to there.

    The origin is the last place before the contraction where a signal arises: an input, another contraction, a norm, a sum of
    different signals. Between it and the contraction lie activations, pools, dropout and movements only.
    """

    def __init__(self, graph: Graph, balance: Balance) -> None:
        """Find the origin of every node's signal."""
        self.balance = balance
        self._graph = graph
        self._position = {node.name: i for i, node in enumerate(graph.nodes)}
        self._carries: set[str] = set()  # anything that depends on an input, or on a parameter that is contracted
        self._origin: dict[str, str] = {}
        self._gone: dict[str, tuple[Any, Value, float | None]] = {}  # by name: what was read, its gradient, what came of it
        for node in graph.nodes:
            data = [name for name in dict.fromkeys(node.operands()) if name in self._carries]
            if node.kind is NodeKind.INPUT or data or (node.kind is NodeKind.OP and is_lookup(node)):
                self._carries.add(node.name)
            origins = {self._origin[name] for name in data}
            self._origin[node.name] = origins.pop() if len(origins) == 1 and _is_transparent(node) else node.name

    def through(self, own: Own, values: Mapping[str, Any]) -> Passage | None:
        """``E[y^2] / E[o^2]`` and ``E[g_o^2] / E[g_y^2]`` from the origin o of a contraction's input to its output y.

        Gradients are taken as independent at y; what reaches o by other ways is not counted. None for look-ups, through which no
        gradient passes, and where it has no second moment.
        """
        node = self._graph.by_name[own.use.node]
        if is_lookup(node) or not isinstance(values.get(node.name), Value):
            return None
        way = self._way(node, values)
        if not way:
            return None
        origin = way[0].name
        first = values[origin]
        if not isinstance(first, Value) or first.second_moment <= 0.0:
            return None
        back = self._back(way, values)
        if back is None or not math.isfinite(back):  # no moment: a slope without bound
            return None
        forward = values[node.name].second_moment / first.second_moment
        return Passage(origin=origin, forward=forward, backward=max(back, 0.0))

    def _back(self, way: Sequence[Node], values: Mapping[str, Any]) -> float | None:
        """Second moment of the gradient at the origin.

        Contractions that read one tensor (queries, keys and values, say) have one way from there back to the origin, and what
        comes of a gradient is proportional to it: where theirs differ by a factor, the way is gone once.
        """
        origin, *between, contraction = way
        read = {name for name in contraction.operands() if any(name == node.name for node in between)}
        if len(read) != 1 or origin.name in contraction.operands():
            return _second_moment(propagate_back_along(way, values).get(origin.name))
        (operand,) = (self._graph.by_name[name] for name in read)
        own = propagate_back_along([operand, contraction], values).get(operand.name)
        if own is None or own.second_moment <= 0.0:
            return None if own is None else 0.0
        value = values[operand.name]
        of, before, found = self._gone.get(operand.name, (None, own, None))
        if of is value and is_multiple(own, before):
            return None if found is None else found * own.second_moment / before.second_moment
        found = _second_moment(propagate_back_along(way[:-1], values, own).get(origin.name))
        self._gone[operand.name] = value, own, found
        return found

    def between(self, own: Own, values: Mapping[str, Any]) -> list[str]:
        """Nodes that lie between the origin of a contraction's input and the contraction."""
        return [inside.name for inside in self._way(self._graph.by_name[own.use.node], values)[1:-1]]

    def wanted(self, own: Own, values: Mapping[str, Any], variance: float, forward: float) -> float:
        """The variance that keeps the second moment of the signal, that of the gradient, or the geometric mean of both.

        Args:
            own: the weight.
            values: results of the nodes, at its present variance.
            variance: that present variance.
            forward: the variance that the signal asks for.
        """
        if self.balance is Balance.FORWARD or not own.is_balanced:
            return forward
        passage = self.through(own, values)
        if passage is None or passage.backward <= 0.0:
            return forward
        backward = variance / passage.backward
        return backward if self.balance is Balance.BACKWARD else math.sqrt(forward * backward)

    def _way(self, contraction: Node, values: Mapping[str, Any]) -> list[Node]:
        """The origin, what lies between it and the contraction, and the contraction; empty where it reads no signal."""
        operand = data_operand(contraction, values)
        if operand is None or operand[0] not in self._carries:
            return []
        origin = self._origin[operand[0]]
        inside = {origin}
        agenda = [operand[0]]
        while agenda:
            name = agenda.pop()
            if name not in inside:
                inside.add(name)
                agenda += [operand for operand in self._graph.by_name[name].operands() if operand in self._carries]
        between = sorted(inside - {origin}, key=self._position.__getitem__)
        return [*(self._graph.by_name[name] for name in (origin, *between)), contraction]


def _second_moment(gradient: Value | None) -> float | None:
    return None if gradient is None else gradient.second_moment


def _is_transparent(node: Node) -> bool:
    return node.op is not None and (is_pointwise(node.op) or node.short_name in _TRANSPARENT)
