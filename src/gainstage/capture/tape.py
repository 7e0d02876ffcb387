"""A tape: the operations of one run, at the level of torch.export's graphs, before any of them is decomposed.

Values are told apart by identity, then by the memory that they show. Where the run looks at the value of a tensor (a branch, a
number, NumPy), that is written down as a read: the tape goes on with what was seen.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx.graph import _is_magic, _Namespace, _snake_case

from gainstage.capture.lowered import CallMark, Lowered, meta_of
from gainstage.capture.provenance import current_line
from gainstage.graph import Node, NodeKind, Provenance, Ref, short_name

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Read:
    """The run looked at the value of a node, in the user's line ``source``, and went on with what it saw."""

    name: str
    source: str


@dataclass(slots=True)
class Tape:
    """What was recorded so far; ``lowered`` is the graph, ``values`` the tensors of the run."""

    lowered: Lowered
    reads: list[Read] = field(default_factory=list)
    stack: list[tuple[str, int]] = field(default_factory=list)
    is_tracked: bool = True  # whether the user's code wants gradients at present
    types: dict[str, str] = field(default_factory=dict)  # module path -> name of the class
    _names: _Namespace = field(default_factory=_Namespace)
    _known: dict[int, str] = field(default_factory=dict)  # id of a tensor -> node
    _memory: dict[tuple[Any, ...], tuple[str, bool]] = field(default_factory=dict)  # what a tensor shows -> node, has gradient
    _roots: dict[int, tuple[str, torch.Tensor]] = field(default_factory=dict)  # memory -> the first node that shows it
    _alive: list[Any] = field(default_factory=list)  # so that no id is used twice
    _untracked: set[str] = field(default_factory=set)  # made where no gradients were wanted
    _detached: dict[str, str] = field(default_factory=dict)

    def name(self, candidate: str) -> str:
        """A name that no node has yet, as torch.fx would choose it."""
        return self._names.create_name(candidate, None)

    def reserved(self, candidate: str) -> str:
        """A name for what a user feeds or a model holds: as it is, if no node has it."""
        if candidate in self._names._used_names:
            return self.name(candidate)
        self._names._used_names.add(candidate)
        return candidate

    def hold(self, tensor: torch.Tensor, name: str) -> None:
        """Remember that a tensor is the value of a node."""
        self._alive.append(tensor)
        self._known[id(tensor)] = name
        self._memory[_shown(tensor)] = name, tensor.requires_grad
        self._roots.setdefault(_memory(tensor), (name, tensor))

    def hold_source(
        self, tensor: torch.Tensor, name: str, value: torch.Tensor, path: str = "", *, is_input: bool = False
    ) -> None:
        """Append what the run starts from; ``value`` is what the user gave, ``tensor`` stands for it in the run."""
        self.hold(tensor, self.lowered.add_source(name, value, path, is_input=is_input, like=tensor).name)

    def mark(self, tensor: torch.Tensor, mark: CallMark) -> None:
        """Remember that a module call returned a tensor; inside torch.func it is one of no definite shape."""
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            self.lowered.mark(self.refer(tensor), [mark])

    def refer(self, tensor: torch.Tensor) -> str:
        """Node of a tensor: the one that made it, or shows the same memory, or else a constant."""
        name = self._known.get(id(tensor)) or self._seen(tensor)
        if name is None:
            name = self.lowered.add_source(self.name("constant"), tensor.detach().clone(), is_input=False, like=tensor).name
            self.hold(tensor, name)
        if self.is_tracked and name in self._untracked:
            if name not in self._detached:
                self._detached[name] = self._append("detach", aten.detach.default, (Ref(name),), {}, tensor)
            name = self._detached[name]
        return name

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is the value of a node, or shows the memory of one."""
        return id(tensor) in self._known or self._seen(tensor) is not None

    def _seen(self, tensor: torch.Tensor) -> str | None:
        """Node that shows the memory of a tensor that no operation made: what autograd saved, or ``.data``."""
        name, has_gradient = self._memory.get(_shown(tensor), (None, False))
        if name is None and _memory(tensor) in self._roots:
            root, base = self._roots[_memory(tensor)]
            has_gradient = base.requires_grad
            if base.dim() == 2 and _shown(base.t()) == _shown(tensor):
                name = self._append("t", aten.t.default, (Ref(root),), {}, tensor)
            elif base.dtype == tensor.dtype:
                place = (list(tensor.shape), list(tensor.stride()), tensor.storage_offset())
                name = self._append("as_strided", aten.as_strided.default, (Ref(root), *place), {}, tensor)
        if name is None:
            return None
        if has_gradient and not tensor.requires_grad:
            name = self._append("detach", aten.detach.default, (Ref(name),), {}, tensor)
        self.hold(tensor, name)
        return name

    def refer_all(self, argument: Any) -> Any:
        """An argument of an operation in the graph's terms."""
        if isinstance(argument, torch.Tensor):
            return Ref(self.refer(argument))
        if isinstance(argument, dict):
            return {key: self.refer_all(item) for key, item in argument.items()}
        if isinstance(argument, (list, tuple)):
            items = [self.refer_all(item) for item in argument]
            return items if isinstance(argument, list) else tuple(items)
        return argument

    def record(self, op: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Append an operation that returned ``result``; its arguments are in the graph's terms."""
        base = _snake_case(short_name(op) or "operation")
        base = base[2:-2] if _is_magic(base) else base
        if isinstance(result, torch.Tensor):
            written = isinstance(op, OpOverload) and op._schema.is_mutable
            if not self.is_tracked and not written and Ref(self._known.get(id(result), "")) in args:
                return  # handed back as it is, as by ``to`` the type that it has: it takes its gradient elsewhere
            self.hold(result, self._append(base, op, args, kwargs, result))
        elif isinstance(result, (tuple, list)) and any(isinstance(item, torch.Tensor) for item in result):
            name = self._append(base, op, args, kwargs, result)
            for position, item in enumerate(result):
                if isinstance(item, torch.Tensor):
                    self.hold(item, self._append("getitem", operator.getitem, (Ref(name), position), {}, item))

    def freeze(self, op: Any, args: Any, result: Any) -> None:
        """Append what an operation found in this run as constants."""
        self.reads.extend(Read(item.name, current_line()) for item in args if isinstance(item, Ref))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                name = self.name(short_name(op))
                self.hold(item, self.lowered.add_source(name, item.detach().clone(), is_input=False, like=item).name)

    def find(self, mask: torch.Tensor, places: Any) -> None:
        """Append where a condition holds, with the places that the run saw."""
        self.reads.append(Read(self.refer(mask), current_line()))
        self.record(aten.nonzero_numpy.default, self.refer_all((mask,)), {}, places)
        self.lowered.seen.update((self._known[id(item)], item.detach().clone()) for item in places)

    def read(self, tensor: torch.Tensor) -> None:
        """Write down that the run looks at a value."""
        self.reads.append(Read(self.refer(tensor), current_line()))

    def _append(self, base: str, op: Any, args: Any, kwargs: Any, result: Any) -> str:
        path, call = self.stack[-1] if self.stack else ("", 0)
        node = Node(
            name=self.name(base),
            kind=NodeKind.OP,
            op=op,
            args=tuple(args),
            kwargs=kwargs,
            meta=meta_of(result),
            provenance=Provenance(path, self.types.get(path, ""), call, current_line()),
        )
        self.lowered.add(node, result, tuple(self.stack))
        if not self.is_tracked:
            self._untracked.add(node.name)
        return node.name


def _memory(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata


def _shown(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Which part of which memory a tensor shows, and how."""
    return _memory(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
