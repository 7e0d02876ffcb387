"""What a captured model is: plain, frozen data. Nothing here runs a model or knows how it was captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any

import torch


class NodeKind(Enum):
    """Where the value of a node comes from."""

    INPUT = "input"  # a floating-point tensor that the user feeds
    PARAMETER = "parameter"
    CONSTANT = "constant"  # known: buffers, integer inputs, and all that is computed from them alone
    OP = "op"


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to the value of another node, inside the arguments of a node."""

    name: str


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Shape and element type of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which module call, and which line of the user's code, a node comes from.

    ``module_path`` is "" for the root module; ``call`` counts the calls of that module from 0.
    """

    module_path: str = ""
    module_type: str = ""
    call: int = 0
    source: str = ""  # "file.py:42: h = self.act(h)", torch's own frames skipped; "" where unknown

    def __str__(self) -> str:
        """Readable place: module path, then the user's line."""
        place = f"module {self.module_path!r}" if self.module_path else "the root module"
        return f"{place}, {self.source}" if self.source else place


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One value of the graph, or one tuple of values.

    ``args`` and ``kwargs`` of an op are those of its schema, with :class:`Ref` where a tensor of the graph is meant
    (also inside lists). ``meta`` is a tuple for an op with several outputs, which ``operator.getitem`` nodes pick from,
    and None for an op that returns no tensor. ``value``: of a constant, and the example that was given for an input.
    """

    name: str
    kind: NodeKind
    op: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    meta: TensorMeta | tuple[TensorMeta | None, ...] | None = None
    provenance: Provenance = field(default_factory=Provenance)
    parameter: str | None = None  # canonical name, for PARAMETER nodes
    value: torch.Tensor | None = None
    _operands: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Find the operands once: every walk over a graph asks for them."""
        object.__setattr__(self, "_operands", tuple(_refs([*self.args, *self.kwargs.values()])))

    @property
    def op_name(self) -> str:
        """Name of the operation as users meet it: ``aten.linear.default``."""
        return str(self.op) if isinstance(self.op, torch._ops.OpOverload) else getattr(self.op, "__name__", self.kind.value)

    @property
    def short_name(self) -> str:
        """``linear`` of ``aten.linear.default``; "" for what is no operation."""
        return short_name(self.op)

    @property
    def may_draw(self) -> bool:
        """Whether the operation may draw random numbers."""
        return isinstance(self.op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in self.op.tags

    def operands(self) -> tuple[str, ...]:
        """Names of the nodes that this one reads, in order, with repetitions."""
        return self._operands


@lru_cache(maxsize=4096)
def short_name(op: Callable[..., Any] | None) -> str:
    """``linear`` of ``aten.linear.default``; the function's own name for what is no overload, "" for what has none."""
    return str(op.overloadpacket.__name__) if isinstance(op, torch._ops.OpOverload) else getattr(op, "__name__", "")


def _refs(argument: Any) -> Iterator[str]:
    if isinstance(argument, Ref):
        yield argument.name
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _refs(item)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterInfo:
    """One parameter tensor. Tied parameters are one entry: ``name`` is the first name, ``aliases`` the others."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    aliases: tuple[str, ...] = ()
    module_path: str = ""
    module_type: str = ""  # fully qualified class of the owning module, e.g. torch.nn.modules.linear.Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCall:
    """One call of one module: its output tensors, flattened in order, as node names.

    ``positions`` are the places of these outputs among all tensors that the call returns (``flatten.tensor_leaves``):
    constants and values that reach no output of the model are left out of ``outputs``, but counted.
    """

    path: str
    call: int
    module_type: str
    outputs: tuple[str, ...]
    positions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A model as a list of nodes in execution order, without in-place operations."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]  # flattened tensor outputs of the model, in order; constants and None left out
    parameters: Mapping[str, ParameterInfo]  # canonical name -> info, in the model's own order, unused ones too
    calls: tuple[ModuleCall, ...]
    training: bool
    rung: str = "export"  # of the ladder of captures: "export", or "tape" for the record of one run
    draw: int = 0  # of the random numbers of that run
    refusals: tuple[str, ...] = ()  # why the rungs before it did not hold, one sentence each
    has_choices: bool = False  # the run looked at values that other parameters, inputs or random numbers would change
    assumptions: tuple[str, ...] = ()  # all that capture had to assume, one sentence each
    guesses: tuple[str, ...] = ()  # those of them that stand for values that were not there
    uses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # weights used several times -> operations, where followed
    copies: Mapping[str, str] = field(default_factory=dict)  # parameter -> the first with the same values, where those count
    by_name: Mapping[str, Node] = field(init=False)
    reused: int = field(init=False)  # those weights, as a bit mask of the order of parameters

    def __post_init__(self) -> None:
        """Index the nodes and check that each reads only earlier ones."""
        seen: dict[str, Node] = {}
        for node in self.nodes:
            assert node.name not in seen, f"node {node.name} stands twice"
            for operand in node.operands():
                assert operand in seen, f"node {node.name} reads {operand} before it exists"
            assert (node.kind is NodeKind.OP) == (node.op is not None), node.name
            assert node.kind is NodeKind.INPUT or (node.kind is NodeKind.CONSTANT) == (node.value is not None), node.name
            seen[node.name] = node
        assert all(name in seen for name in self.outputs)
        object.__setattr__(self, "by_name", seen)
        object.__setattr__(self, "reused", sum(1 << i for i, name in enumerate(self.parameters) if name in self.uses))

    def following(self, origins: Iterable[str]) -> set[str]:
        """The origins and all nodes that are computed from them."""
        reached = set(origins)
        for node in self.nodes:
            if node.name not in reached and any(operand in reached for operand in node.operands()):
                reached.add(node.name)
        return reached
