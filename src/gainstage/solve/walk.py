"""The walk: the graph is evaluated in order, and a demand that is not met rescales its parts and goes back to their first use.

Nodes that do not depend on what was rescaled keep their values (each node knows when it was last evaluated): a correction
costs the nodes between a parameter's use and the place of the demand. Demands inside of that stretch are checked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from gainstage.graph import Graph, Node, NodeKind
from gainstage.graph.families import LAYERS
from gainstage.policies import Fan, FanScaled
from gainstage.propagate import evaluate, parameter_value
from gainstage.signal import Value, affine
from gainstage.solve.constraint import (
    Demand,
    Kind,
    Own,
    Quantity,
    data_operand,
    goal_value,
    is_attention,
    is_lookup,
    level_of,
    measure,
    step_to_loss,
)
from gainstage.solve.demands import Demands
from gainstage.solve.initial import no_value, nominal_fan_of
from gainstage.solve.passage import Passages
from gainstage.solve.setting import Setting
from gainstage.solve.whitened import FirstLayer

TOLERANCE = 1e-3  # relative, on second moments
_MOST_STEPS = 16
_LARGEST_STEP = math.log(1e8)
_LOUDEST = math.log(100.0)  # queries or keys over a unit level: beyond, keys that are all alike would be told apart by noise
_NO_EFFECT = 0.02  # d log level / d log variance below which a parameter's scale is said to cancel

# Settings that follow from a node's input, before the node is evaluated.
Prepare = Callable[[Mapping[str, Any], Mapping[str, Setting]], Mapping[str, Setting]]


@dataclass(slots=True)
class Progress:
    """What was tried for one demand: log factors of the variance, and how far the level was off (log)."""

    scale: float = 0.0
    tried: list[tuple[float, float]] = field(default_factory=list)
    is_met: bool = False
    has_no_effect: bool = False
    seen: int = -1


@dataclass(frozen=True, slots=True)
class Solution:
    """Values of all nodes and settings of all parameters, and how each demand fared."""

    values: Mapping[str, Any]
    settings: Mapping[str, Setting]
    demands: Mapping[Demand, Progress]
    own: Mapping[str, Progress]


@final
class Walk:
    """One solve: state that changes until every demand is met or given up."""

    def __init__(
        self, graph: Graph, settings: Mapping[str, Setting], demands: Demands, source: Callable[[Node], Value],
        *, prepare: Mapping[str, Prepare], passages: Passages, first: Mapping[str, FirstLayer],
    ) -> None:  # fmt: skip
        self._graph = graph
        self._settings = dict(settings)
        self._source = source
        self._prepare = dict(prepare)
        self._passages = passages
        self._first = first
        self._position = {node.name: i for i, node in enumerate(graph.nodes)}
        self._node_of = {node.parameter: node.name for node in graph.nodes if node.kind is NodeKind.PARAMETER}
        self._first_reader: dict[str, int] = {}
        for i, node in enumerate(graph.nodes):
            for name in node.operands():
                self._first_reader.setdefault(name, i)
        self._values: dict[str, Any] = {}
        self._stamps = [0] * len(graph.nodes)  # 0: not evaluated yet
        self._clock = 0
        self._operands = [tuple({self._position[name] for name in node.operands()}) for node in graph.nodes]
        self._demands = {demand: Progress() for demand in demands.levels}
        self._own = {own.use.parameter: Progress() for own in demands.own}
        # Exponentials of scales of level 1 would multiply up, layer by layer, before their sum is looked at.
        self._quiet = {
            lever.part: min(1.0, demand.goal.constant)
            for demand in demands.levels
            if demand.kind is Kind.DETERMINANT
            for group in demand.groups
            for lever in group
        }
        self._levels_at: dict[int, list[Demand]] = {}
        self._logits_at: dict[int, list[Demand]] = {}  # met before the attention, which costs most, is evaluated
        for demand in demands.levels:
            place = max(self._position[name] for name in (demand.node, *(name for name, _ in demand.goal.terms)))
            early = demand.kind is Kind.LOGITS and is_attention(graph.by_name[demand.node])
            (self._logits_at if early else self._levels_at).setdefault(place, []).append(demand)
        self._own_at: dict[int, list[Own]] = {}
        for own in (own for own in demands.own if own.starts):
            self._own_at.setdefault(self._position[own.use.node], []).append(own)
        self._demanding = {*self._levels_at, *self._logits_at, *self._own_at}

    def run(self) -> Solution:
        """Evaluate every node, with all demands met as far as they can be."""
        position = 0
        while position < len(self._graph.nodes):
            is_new = self._is_stale(position)
            position = self._step(position) if is_new or position in self._demanding else position + 1
        return Solution(self._values, self._settings, self._demands, self._own)

    def _step(self, position: int) -> int:
        """Evaluate one node if anything that it reads is newer, check what is demanded there; returns where to go on."""
        node = self._graph.nodes[position]
        if node.name in self._prepare and self._is_stale(position):
            for name, setting in self._prepare[node.name](self._values, self._settings).items():
                self._change(name, setting)
        for demand in self._logits_at.get(position, ()):
            if (back := self._meet(demand, list(node.operands()))) is not None:
                return back
        if self._is_stale(position):
            self._evaluate(node)
        for own in self._own_at.get(position, ()):
            if (back := self._decide(own)) is not None:
                return back
        for demand in self._levels_at.get(position, ()):
            if (back := self._meet(demand, [demand.node, *(name for name, _ in demand.goal.terms)])) is not None:
                return back
        return position + 1

    def _is_stale(self, position: int) -> bool:
        stamp = self._stamps[position]
        for operand in self._operands[position]:  # written out: the walk asks this more often than anything else
            if self._stamps[operand] > stamp:
                return True
        return stamp == 0

    def _stamp(self, name: str) -> int:
        return self._stamps[self._position[name]]

    def _evaluate(self, node: Node) -> None:
        if node.kind is NodeKind.PARAMETER:
            assert node.parameter is not None
            value: Any = value_of(self._settings[node.parameter])
        elif (layer := self._first.get(node.name)) is not None:
            value = layer.value(self._settings[layer.parameter])
        else:
            value = evaluate(node, self._values, no_value, self._source, self._graph)
        self._note(node.name, value)

    def _note(self, name: str, value: Any) -> None:
        self._values[name] = value
        self._clock += 1
        self._stamps[self._position[name]] = self._clock

    def _change(self, name: str, setting: Setting) -> int | None:
        """Give a parameter a new distribution; returns where its first use stands."""
        self._settings[name] = setting
        node = self._node_of.get(name)
        if node is None:
            return None
        self._evaluate(self._graph.by_name[node])
        return self._first_reader.get(node)

    def _decide(self, own: Own) -> int | None:
        """``v = level / G`` or ``gain E[x^2] / G``, where G is the output's second moment for each unit of variance."""
        progress = self._own[own.use.parameter]
        stamp = self._stamp(own.use.node)
        if progress.seen == stamp or progress.has_no_effect or len(progress.tried) > _MOST_STEPS:
            return None
        progress.seen = stamp
        setting = self._settings[own.use.parameter]
        output = self._values[own.use.node]
        if not isinstance(output, Value) or setting.variance <= 0.0 or output.second_moment <= 0.0:
            return None
        forward = wanted_variance(own, self._graph, self._values, setting)
        wanted = self._passages.wanted(own, self._values, setting.variance, forward)
        first = not progress.is_met and not progress.tried
        decided = range(len(setting.variances)) if first else sorted(part for _, part in own.parts)
        present = setting.variances[decided[0]] if decided else wanted
        progress.tried.append((math.log(present), math.log(present / wanted)))
        if abs(math.log(wanted / present)) < TOLERANCE and len({setting.variances[part] for part in decided}) <= 1:
            progress.is_met = True
            progress.tried.clear()
            return None
        if len(progress.tried) > 1 and _elasticity(progress.tried) < _NO_EFFECT:
            progress.has_no_effect = True
            wanted = 1.0 / nominal_fan_of(own.use, setting.info, self._graph)
        before = setting
        for part in decided:
            setting = setting.with_part(part, variance=wanted * self._quiet.get((own.use.parameter, part), 1.0))
        place = self._change(own.use.parameter, setting)
        if self._is_multiple(own, before) and self._is_multiple(own, setting):
            self._note(own.use.node, affine(output, math.sqrt(setting.variance / before.variance)))
        return place

    def _is_multiple(self, own: Own, setting: Setting) -> bool:
        """Whether the output is a multiple of the weight's deviation, all else the same: it need not be evaluated again."""
        node = self._graph.by_name[own.use.node]
        if self._graph.reused or node.short_name not in LAYERS or node.name in self._first or setting.table is not None:
            return False
        _, weight, *biases = node.operands()
        is_zero = all(self._values[bias].second_moment == 0.0 for bias in biases)
        return weight == self._node_of.get(own.use.parameter) and is_zero and not any(setting.means) and not setting.profile

    def _meet(self, demand: Demand, read: Sequence[str]) -> int | None:
        """One correction towards the goal, or None where it is met or out of reach; ``read``: the nodes that are measured."""
        progress = self._demands[demand]
        stamp = max(self._stamp(name) for name in read)
        if progress.seen == stamp or progress.has_no_effect or len(progress.tried) > _MOST_STEPS:
            return None
        progress.seen = stamp
        found = measure(demand.quantity, self._graph, demand.node, self._values) - demand.prior
        goal = goal_value(demand.goal, self._values)
        if not (0.0 < found < math.inf and 0.0 < goal < math.inf):
            progress.has_no_effect = True
            return None
        progress.tried.append((progress.scale, math.log(found / goal)))
        progress.is_met = abs(progress.tried[-1][1]) < TOLERANCE
        if progress.is_met:
            del progress.tried[:-1]
            return None
        elasticity = _elasticity(progress.tried)
        if elasticity < _NO_EFFECT:
            progress.has_no_effect = True
            return self._scale(demand, -progress.scale)
        step = -progress.tried[-1][1] / elasticity
        if demand.quantity is Quantity.LOSS_ABOVE_CHANCE and len(progress.tried) == 1:
            step = step_to_loss(self._values[demand.node], goal + demand.prior, step)
        step = max(-_LARGEST_STEP, min(_LARGEST_STEP, step))
        if demand.kind is Kind.LOGITS:
            step = min(step, len(demand.groups) * _LOUDEST - progress.scale)
            if abs(step) < TOLERANCE:
                return None
        return self._scale(demand, step)

    def _scale(self, demand: Demand, step: float) -> int | None:
        """Multiply the quantity by ``e^step``, as far as it is homogeneous in the parts."""
        self._demands[demand].scale += step
        changed: dict[str, Setting] = {}
        for group in demand.groups:
            for lever in group:
                name, part = lever.part
                factor = math.exp(step / len(demand.groups) / lever.power)
                changed[name] = changed.get(name, self._settings[name]).scaled(part, factor)
        places = [place for name, setting in changed.items() if (place := self._change(name, setting)) is not None]
        return min(places, default=None)


def _elasticity(tried: Sequence[tuple[float, float]]) -> float:
    """Slope of the log level between the last two tries; 1 where there is one try only."""
    if len(tried) < 2:
        return 1.0
    (before, was), (now, found) = tried[-2:]
    return 1.0 if abs(now - before) < 1e-9 else (found - was) / (now - before)


def value_of(setting: Setting) -> Value:
    """Abstract value of a parameter as it is set at present."""
    if setting.table is not None:
        return setting.table
    return parameter_value(setting.info, setting.index, setting.mean, setting.variance, setting.profile)


def output_gain(own: Own, values: Mapping[str, Any], setting: Setting) -> float:
    """Second moment of the contraction's output for each unit of the parameter's variance; a known bias apart."""
    output: Value = values[own.use.node]
    is_apart = output.added is not None and output.added.table is output.table
    return level_of(output.added.of if output.added is not None and is_apart else output) / setting.variance


def wanted_variance(own: Own, graph: Graph, values: Mapping[str, Any], setting: Setting) -> float:
    """The variance that the parameter's own contraction asks for."""
    gain = output_gain(own, values, setting)
    if not isinstance(own.target, FanScaled):
        return own.target.second_moment / gain
    fan_in, fan_out = fans(own, graph, values, setting)
    return own.target.gain / (fan_in if own.target.fan is Fan.IN else (fan_in + fan_out) / 2.0)


def fans(own: Own, graph: Graph, values: Mapping[str, Any], setting: Setting) -> tuple[float, float]:
    """Products summed for one output, and outputs that one input adds to; taps in the padding do not count.

    ``fan-in = E[y^2] / (Var(w) E[x^2])``, that of the shape for weights that are used again; each product is one input's and one
    output's, so that ``outputs times fan-in = inputs times fan-out``.
    """
    node = graph.by_name[own.use.node]
    operand = data_operand(node, values)
    if is_lookup(node) or operand is None or operand[1].second_moment <= 0.0:
        fan = nominal_fan_of(own.use, setting.info, graph)
        return fan, fan
    if own.use.parameter in graph.uses:  # the output may hold more than products with fresh weights
        fan_in = nominal_fan_of(own.use, setting.info, graph)
    else:
        fan_in = output_gain(own, values, setting) / level_of(operand[1])
    outputs, inputs = math.prod(values[own.use.node].shape), math.prod(operand[1].shape)
    return fan_in, fan_in * outputs / inputs
