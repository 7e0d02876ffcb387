"""What every rung of the ladder hands on: nodes one for one, writes still in place, and what else is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gainstage.graph import Node, NodeKind, Provenance, Ref, TensorMeta

UNKNOWN_SIZE = -1  # in a shape: known only when the model runs

ASSERTIONS = frozenset(
    {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"}
)

Stack = tuple[tuple[str, int], ...]  # path and number of the module calls that a node was made in, outermost first


@dataclass(frozen=True, slots=True)
class CallMark:
    """A node is tensor number ``position`` of what call number ``call`` of the module ``path`` returned."""

    path: str
    call: int
    position: int


@dataclass(slots=True)
class Lowered:
    """Nodes in execution order, still with writes in place, and what else is known of them.

    ``storages`` names the memory that a value lives in (of all its tensors, if they are several): two values with the
    same entry are views of each other.
    """

    canonical_names: Mapping[str, str]  # parameter name -> canonical name
    canonical_paths: Mapping[str, str]  # module path -> first path of that module
    nodes: list[Node] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    storages: dict[str, int] = field(default_factory=dict)
    marks: dict[str, list[CallMark]] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)  # canonical name -> node name
    seen: dict[str, torch.Tensor] = field(default_factory=dict)  # places where conditions held in the run, by node

    def add(self, node: Node, value: Any, stack: Stack = ()) -> Ref:
        """Append a node that returned ``value``, and return a reference to it."""
        self.nodes.append(node)
        storage = _storage(value)
        if storage is not None:
            self.storages[node.name] = storage
        self.stacks[node.name] = stack
        return Ref(node.name)

    def add_parameter(self, name: str, canonical: str, value: torch.Tensor) -> Ref:
        """Append a parameter, or refer to the one that is tied to it."""
        if canonical not in self.parameters:
            self.parameters[canonical] = name
            provenance = Provenance(canonical.rpartition(".")[0])
            node = Node(name=name, kind=NodeKind.PARAMETER, meta=meta_of(value), parameter=canonical, provenance=provenance)
            self.add(node, value)
        return Ref(self.parameters[canonical])

    def add_source(self, name: str, value: torch.Tensor, path: str = "", *, is_input: bool, like: Any = None) -> Ref:
        """Append what the user feeds (a constant if it is no floating-point signal), or a constant.

        Args:
            name: of the node.
            value: what was fed.
            path: module that it belongs to.
            is_input: whether the user feeds it.
            like: the tensor that stands for it in the run, if another one.
        """
        is_number = value.is_floating_point() or value.is_complex()
        is_signal = is_input and is_number and value.layout is torch.strided and not _is_mask(value)
        node = Node(
            name=name,
            kind=NodeKind.INPUT if is_signal else NodeKind.CONSTANT,
            meta=meta_of(value),
            value=value.detach(),
            provenance=Provenance(path),
        )
        return self.add(node, value if like is None else like)

    def mark(self, name: str, marks: Sequence[CallMark]) -> None:
        """Remember which module calls returned a value."""
        known = self.marks.setdefault(name, []) if marks else []
        known.extend(mark for mark in marks if mark not in known)


def _is_mask(value: torch.Tensor) -> bool:
    """Whether a floating-point input is an additive attention mask: no entry above zero, and some near minus infinity."""
    if value.is_meta or value.numel() == 0 or value.is_complex():
        return False
    lowest, highest = value.aminmax()
    return bool(lowest <= torch.finfo(value.dtype).min / 2) and bool(highest <= 0)


def meta_of(value: Any) -> TensorMeta | tuple[TensorMeta | None, ...] | None:
    """Shape and element type of what a node returns: a tensor, several, or something else (None)."""
    if isinstance(value, torch.Tensor):
        sizes: tuple[Any, ...] = tuple(value.shape)  # a symbol where the size is not known
        return TensorMeta(tuple(size if isinstance(size, int) else UNKNOWN_SIZE for size in sizes), value.dtype)
    if isinstance(value, (tuple, list)):
        metas = [meta_of(item) for item in value]
        return tuple(item if isinstance(item, TensorMeta) else None for item in metas)
    return None


def _storage(value: Any) -> int | None:
    tensors = [value] if isinstance(value, torch.Tensor) else list(value) if isinstance(value, (tuple, list)) else []
    dense = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided]
    keys = {tensor.untyped_storage()._cdata for tensor in dense}
    return keys.pop() if len(keys) == 1 else None
