"""Views: which of them show their base as it is, and how what is written through the others gets back into the base."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from gainstage.capture.writes import Step
from gainstage.graph import Node, Ref, TensorMeta

aten = torch.ops.aten

_IDENTITIES = frozenset({"alias", "detach", "contiguous", "to", "lift", "lift_fresh", "type_as", "resolve_conj", "resolve_neg"})
_DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
_RESHAPES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as", "_unsafe_view", "ravel"}
)
_SWAPS = frozenset({"transpose", "swapaxes", "swapdims", "t"})


def is_identity(node: Node) -> bool:
    """Whether a value that shares memory with its first operand shows it entry by entry, in the same shape."""
    name = node.short_name
    if name in _DROPOUTS:
        return not node.args[2] or node.args[1] == 0
    written = isinstance(node.op, OpOverload) and node.op._schema.is_mutable
    return name in _IDENTITIES or (written and torch.Tag.inplace_view not in node.op.tags)  # type: ignore[union-attr]


def scatter_into_base(view: Node, source: Node, base: Ref, base_meta: TensorMeta, value: Ref) -> tuple[Step, ...] | None:
    """The base with ``value`` in the place that a view shows.

    Args:
        view: the node that made the view.
        source: the same node, or, if the view is picked from a split, the split.
        base: present contents of what the view looks at.
        base_meta: its shape and element type.
        value: new contents of the view.

    Returns:
        Operations, or None for views of another element type, which cannot be inverted.
    """
    name = source.short_name
    rest = source.args[1:]
    if name in _RESHAPES:
        return (Step(aten.reshape.default, (value, list(base_meta.shape)), base_meta),)
    if name in _SWAPS:
        return (Step(source.op, (value, *rest), base_meta),)
    if name == "permute":
        dims = [dim % len(base_meta.shape) for dim in rest[0]]
        return (Step(source.op, (value, [dims.index(dim) for dim in range(len(dims))]), base_meta),)
    if view.op is operator.getitem:
        return _scatter_piece(source, int(view.args[1]), base, base_meta, value)
    if name in _SCATTERS:
        return (Step(_SCATTERS[name], (base, value, *rest), base_meta, source.kwargs),)
    return _put(source, base, base_meta, value)


def _put(view: Node, base: Ref, base_meta: TensorMeta, value: Ref) -> tuple[Step, ...] | None:
    """Write entry by entry, where the same view of the base's own flat indices says."""
    meta = view.meta
    if not isinstance(meta, TensorMeta) or meta.dtype != base_meta.dtype or len(list(view.operands())) > 1:
        return None
    shape = base_meta.shape
    return (
        Step(aten.arange.default, (math.prod(shape),), TensorMeta((math.prod(shape),), torch.int64)),
        Step(aten.reshape.default, (Step.PREVIOUS, list(shape)), TensorMeta(shape, torch.int64)),
        Step(view.op, (Step.PREVIOUS, *view.args[1:]), TensorMeta(meta.shape, torch.int64), view.kwargs),
        Step(aten.put.default, (base, Step.PREVIOUS, value), base_meta),
    )


_SCATTERS: dict[str, Callable[..., Any]] = {
    "slice": aten.slice_scatter.default,
    "select": aten.select_scatter.default,
    "diagonal": aten.diagonal_scatter.default,
}


def _scatter_piece(split: Node, index: int, base: Ref, base_meta: TensorMeta, value: Ref) -> tuple[Step, ...] | None:
    """As above, for piece ``index`` of chunk, split or unbind."""
    name = split.short_name
    place = 1 if name == "unbind" else 2
    axis = int(split.kwargs.get("dim", split.args[place] if len(split.args) > place else 0))
    if name == "unbind":
        return (Step(aten.select_scatter.default, (base, value, axis, index), base_meta),)
    if name not in {"chunk", "split", "split_with_sizes"} or not isinstance(split.meta, tuple):
        return None
    sizes = [piece.shape[axis] for piece in split.meta if piece is not None]
    start = sum(sizes[:index])
    return (Step(aten.slice_scatter.default, (base, value, axis, start, start + sizes[index]), base_meta),)
