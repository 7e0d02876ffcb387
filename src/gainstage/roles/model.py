"""What parameters are for: plain, frozen data. Nodes are named as in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Role(Enum):
    """What a parameter does in a model. One parameter may have several uses; the first of this order names it."""

    TIED_HEAD = "tied_head"  # embedding and output head at once
    OUTPUT_HEAD = "output_head"  # the last contraction before an output of the model
    QUERY = "query"  # its product with a key feeds a softmax
    KEY = "key"
    VALUE = "value"  # averaged by a softmax
    ROUTER = "router"  # a softmax over experts
    COUPLING_SCALE = "coupling_scale"  # the log-determinant of a flow is a direct function of it
    COUPLING_SHIFT = "coupling_shift"  # added to what a flow transforms, with no part in its log-determinant
    RESIDUAL_END = "residual_end"  # sets the level of a branch that is added to the stream it comes from
    MERGE_END = "merge_end"  # sets the level of a branch that is added or concatenated to its siblings
    GATE = "gate"  # its output multiplies another tensor, through a nonlinearity
    RECURRENT = "recurrent"  # inside an LSTM, GRU or RNN
    DEPTHWISE = "depthwise"  # a filter with one input channel for each output
    HIDDEN = "hidden"  # any other contraction
    EMBEDDING = "embedding"  # rows picked by integers
    NORM_SCALE = "norm_scale"
    NORM_SHIFT = "norm_shift"
    LAYER_SCALE = "layer_scale"  # multiplies a signal that no norm has just normalised, entry by entry
    BIAS = "bias"
    TEMPERATURE = "temperature"  # multiplies attention logits
    LOG_SCALE = "log_scale"  # its exponential multiplies a signal; kept
    SLOPE = "slope"  # a learnable parameter of an activation
    KEPT = "kept"  # nothing contracts it: positional tables, class tokens, state-space constants
    UNUSED = "unused"  # reaches no output


# Weights of one use each, by which the operation that reads them multiplies and sums.
CONTRACTED = frozenset({
    Role.OUTPUT_HEAD, Role.QUERY, Role.KEY, Role.VALUE, Role.ROUTER, Role.RESIDUAL_END, Role.MERGE_END, Role.GATE,
    Role.COUPLING_SCALE, Role.COUPLING_SHIFT, Role.HIDDEN, Role.DEPTHWISE,
})  # fmt: skip

# Data: nothing contracts them, and they stay as they are.
TABLES = frozenset({Role.KEPT, Role.LOG_SCALE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One use of one parameter, or of some of its output rows, by one node.

    ``rows``: the ranges (start, stop) of the output coordinate ``dim`` that this use is about, ascending; empty for all of them.
    ``node``: the contraction, norm, addition or product that reads it.
    """

    parameter: str
    node: str
    role: Role
    rows: tuple[tuple[int, int], ...] = ()
    dim: int = 0
    output_dims: tuple[int, ...] = (0,)  # dimensions of the parameter that index outputs; the others are its fan-in
    reason: str = ""  # one sentence: "its product with model.k_proj.weight feeds the softmax of softmax_1"


@dataclass(frozen=True, slots=True)
class Setter:
    """A use that sets the level of a tensor further down: scaling those rows scales that tensor.

    ``power`` is 1 where the tensor is linear in the parameter's scale.
    """

    use: Use
    power: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One tensor that is merged with others, and what sets its level (empty: nothing does, as for a pooled shortcut)."""

    operand: str
    setters: tuple[Setter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A residual stream: a tensor, and the branches that are added to it one after the other, in order.

    ``adds``: for each branch the node that adds it. The stream goes through norms and activations between two additions.
    """

    first: str
    adds: tuple[str, ...]
    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """Siblings that are added or concatenated: none of them is computed from another."""

    node: str
    is_sum: bool
    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """Attention logits: the node of the product of queries and keys, or of the whole attention, and what sets their level.

    ``node`` is an op such as ``aten.scaled_dot_product_attention`` or the last scaling of the product before the softmax's mask.
    ``is_normalised``: queries or keys go through a norm of their own, so that the weights' scale cancels; queries and keys are
    then set by the scales of these norms, and where they have none the logits by what multiplies them, the ``temperatures``.
    """

    node: str
    queries: tuple[Setter, ...]
    keys: tuple[Setter, ...]
    is_normalised: bool = False
    temperatures: tuple[Setter, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """An output of the model that ends in a contraction. ``width``: how many classes or values it has."""

    output: str
    setters: tuple[Setter, ...]
    width: int


@dataclass(frozen=True, slots=True)
class LogDeterminant:
    """The log-determinant of a flow, [batch], the weights that it is a direct function of, and those of the shifts."""

    node: str
    setters: tuple[Setter, ...]
    shifts: tuple[Setter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everything that a solver needs to know about what parameters are for."""

    uses: Mapping[str, tuple[Use, ...]]  # parameter name -> its uses in execution order; all parameters of the graph
    streams: tuple[Stream, ...] = ()
    merges: tuple[Merge, ...] = ()
    logits: tuple[Logits, ...] = ()
    heads: tuple[Head, ...] = ()
    log_determinant: LogDeterminant | None = None
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the role of every parameter, and all its uses with their reasons."""
        return {
            name: {
                "role": self.of(name).value,
                "uses": [{"node": u.node, "role": u.role.value, "rows": u.rows, "reason": u.reason} for u in uses],
            }
            for name, uses in self.uses.items()
        }

    def of(self, parameter: str) -> Role:
        """The role that names the parameter: the first, in the order of :class:`Role`, among its uses."""
        order = list(Role)
        return min((use.role for use in self.uses[parameter]), key=order.index, default=Role.UNUSED)
