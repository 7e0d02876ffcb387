"""What a policy demands, as data: a quantity at a node, its goal, and the parts of parameters that are scaled to meet it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from gainstage.graph import Graph, Node, Ref
from gainstage.graph.families import CONTRACTIONS, GATHERS
from gainstage.policies import FanScaled, Level
from gainstage.roles import Use
from gainstage.rules.attention import attention_logits
from gainstage.signal import Value
from gainstage.signal.attention import apart
from gainstage.signal.movement import merge_dim
from gainstage.signal.patterns import pairs_of
from gainstage.signal.quadrature import Array, expectation
from gainstage.solve.setting import Part

aten = torch.ops.aten


class Quantity(Enum):
    """What is measured at a node."""

    SECOND_MOMENT = "second moment"
    VARIANCE = "variance"
    KEY_VARIANCE = "variance of the logits over the keys"
    LOSS_ABOVE_CHANCE = "twice what logits cost beyond chance"


class Kind(Enum):
    """Why a level is demanded: which text explains it."""

    STREAM = "stream"
    MERGE = "merge"
    LOGITS = "logits"
    HEAD = "head"
    DETERMINANT = "determinant"
    GAIN = "gain"  # of a weight that is normalised before it is contracted


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """``constant + sum of coefficient times the second moment of a node``."""

    constant: float = 0.0
    terms: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Lever:
    """A part to be scaled: the quantity goes with its variance to this power."""

    part: Part
    use: Use
    power: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """A quantity at a node meets a goal, by scaling groups of parts.

    The parts of one group act in parallel (terms of a sum) and take the same factor; the groups act one on the product of the
    others (queries and keys), so that each takes a root of it.
    """

    kind: Kind
    node: str
    quantity: Quantity
    goal: Goal
    groups: tuple[tuple[Lever, ...], ...]
    count: int = 1  # of the branches that share
    width: int = 0  # of a head, or of a concatenated branch
    share: float = 1.0  # of a branch, over an equal one
    prior: float = 0.0  # what class priors add to a head's second moment, and the goal does not count


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """The variance of a contracted parameter from its own contraction: by its output's level, or by its fans.

    ``parts``: those decided here for good; the others start from the same rule and are scaled later. ``starts`` is False where
    nothing is to be decided: for a tied head, whose demand comes later, and for a weight whose scale its own gain replaces.
    ``is_balanced``: a level that may give way to that of the gradients.
    """

    use: Use
    target: Level | FanScaled
    parts: frozenset[Part]
    starts: bool = True
    is_balanced: bool = False


_NEWTON, _SMALL = 6, 1e-2  # steps, each of which leaves a hundredth of the error, and what slopes are taken over
SILENT = 1e-6  # levels of padding, over those of the whole


def is_contraction(node: Node) -> bool:
    """Whether a node sums products of its operands, or picks rows of one."""
    return node.short_name in CONTRACTIONS or is_lookup(node)


def is_lookup(node: Node) -> bool:
    """Whether a node picks rows of a table: a contraction with fan-in 1."""
    return node.short_name == "embedding" or node.short_name in GATHERS


def data_operand(node: Node, values: Mapping[str, Any]) -> tuple[str, Value] | None:
    """Name and value of what the weight is contracted with."""
    for name in node.operands():
        value = values[name]
        if isinstance(value, Value) and not value.is_weight and value.constant is None:
            return name, value
    return None


def measure(quantity: Quantity, graph: Graph, node: str, values: Mapping[str, Any]) -> float:
    """The quantity at a node; 0 where the node has no statistics."""
    value = values.get(node)
    if quantity is Quantity.KEY_VARIANCE:
        logits = _logits(graph.by_name[node], values) if is_attention(graph.by_name[node]) else value
        return key_variance(logits) if isinstance(logits, Value) else 0.0
    if quantity is Quantity.LOSS_ABOVE_CHANCE:
        return loss_above_chance(value) if isinstance(value, Value) else 0.0
    if quantity is Quantity.VARIANCE:
        return value.variance if isinstance(value, Value) else 0.0
    return level_of(value) if isinstance(value, Value) else 0.0


def level_of(x: Value) -> float:
    """Second moment of the entries that are not padding: of rows and places that are more than zeros."""
    return x.second_moment if x.levels is None else x.second_moment / max(float(counted(x.levels).mean()), 1.0 / x.levels.size)


def counted(levels: Array) -> Array:
    """1 where there is more than padding."""
    return np.asarray(levels > SILENT, dtype=np.float64)


def is_attention(node: Node) -> bool:
    """Whether a node is a whole attention, whose logits follow from its operands alone."""
    return node.op is aten.scaled_dot_product_attention.default


def _logits(node: Node, values: Mapping[str, Any]) -> Value:
    query, key = (values[argument.name] for argument in node.args[:2] if isinstance(argument, Ref))
    return attention_logits(
        query, key, None, scale=node.kwargs.get("scale"), enable_gqa=bool(node.kwargs.get("enable_gqa", False))
    )


def key_variance(logits: Value) -> float:
    """``K[same] - K[another key]``: what a softmax over the last dimension sees, of queries and keys that are not padding."""
    logits = merge_dim(apart(logits), -1 % len(logits.dims))
    if not logits.dims[-1]:
        return 0.0
    among = pairs_of(counted(logits.levels)) if logits.levels is not None else np.ones(1)
    table = logits.table / np.where(among > 0.0, among, np.inf)
    full = (1,) * (table.ndim - 1)
    return max(float(table[*full, 1] - table[*full, 0]), 0.0)


def loss_above_chance(logits: Value, factor: float = 1.0) -> float:
    """``2 (log E[e^z] - E[z])``: the variance of Gaussian logits, and of others what costs as much; of ``factor`` times them.

    A tied head gives each token's own logit the square of its row. One logit in C is then so much higher, by c: where ``c^2 / C``
    is little, ``log(1 + (e^c - 1) / C)`` need not be.
    """
    terms = logits.sum.terms if logits.sum is not None and logits.sum.table is logits.table else ((logits, 1.0),)
    return sum(_cumulant(factor * sign * term.marginal.values) for term, sign in terms)


def step_to_loss(logits: Value, goal: float, step: float) -> float:
    """Log of the factor on a head's variance at which its logits cost ``goal``, from a first guess, by Newton's method.

    They go with the root where the signal stays as it is, which a tied head's does behind a norm; without this each of several
    corrections would go through the whole model.
    """
    for _ in range(_NEWTON):
        found, more = (loss_above_chance(logits, math.exp(0.5 * at)) for at in (step, step + _SMALL))
        slope = (math.log(more) - math.log(found)) / _SMALL
        step += (math.log(goal) - math.log(found)) / slope
    return step


def _cumulant(values: Array) -> float:
    top = float(values.max())
    return 2.0 * (top + math.log(expectation(np.exp(values - top))) - expectation(values))


def chance_level(width: int, excess: float) -> float:
    """``s^2 = 2 excess log C / (1 - 1/C)`` for C classes, ``8 excess log 2`` for one logit.

    Independent logits of variance s^2 cost ``log C + s^2 (1 - 1/C) / 2`` on average (to second order in s), and one logit
    under a sigmoid ``log 2 + s^2 / 8``. Expectations over weights, inputs and labels.
    """
    if width <= 1:
        return 8.0 * excess * math.log(2.0)
    return 2.0 * excess * math.log(width) / (1.0 - 1.0 / width)


def goal_value(goal: Goal, values: Mapping[str, Any]) -> float:
    """The number that a goal asks for at present; where what it refers to is silent (queries of zeros), as if that were one."""
    levels = [(level_of(values[node]), share) for node, share in goal.terms if isinstance(values[node], Value)]
    total = sum(level * share for level, share in levels)
    return goal.constant + (total if total > 0.0 else sum(share for _, share in levels))
