"""Views: which of them show their base as it is, and how what is written through the others gets back into the base."""

from __future__ import annotations

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


def packet_name(op: Any) -> str:
    """``view`` for aten.view.default; the function's own name for what is no overload."""
    return op._schema.name.partition("::")[2] if isinstance(op, OpOverload) else getattr(op, "__name__", "")


def is_identity(node: Node) -> bool:
    """Whether a value that shares memory with its first operand shows it entry by entry, in the same shape."""
    name = packet_name(node.op)
    if name in _DROPOUTS:
        return not node.args[2] or node.args[1] == 0
    written = isinstance(node.op, OpOverload) and node.op._schema.is_mutable
    return name in _IDENTITIES or (written and torch.Tag.inplace_view not in node.op.tags)  # type: ignore[union-attr]


def scatter_into_base(view: Node, source: Node, base: Ref, base_meta: TensorMeta, value: Ref) -> Step | None:
    """The base with ``value`` in the place that a view shows.

    Args:
        view: the node that made the view.
        source: the same node, or, if the view is picked from a split, the split.
        base: present contents of what the view looks at.
        base_meta: its shape and element type.
        value: new contents of the view.

    Returns:
        One operation, or None for views that cannot be inverted.
    """
    name = packet_name(source.op)
    rest = source.args[1:]
    build = _SCATTERS.get(name)
    if name in _RESHAPES:
        return Step(aten.reshape.default, (value, list(base_meta.shape)), base_meta)
    if name in _SWAPS or name == "permute":
        dims = [d % len(base_meta.shape) for d in rest[0]] if name == "permute" else []
        inverse = ([dims.index(d) for d in range(len(dims))],) if dims else rest
        return Step(source.op, (value, *inverse), base_meta)
    if view.op is operator.getitem:
        return _scatter_piece(source, int(view.args[1]), base, base_meta, value)
    return Step(build, (base, value, *rest), base_meta, source.kwargs) if build is not None else None


_SCATTERS: dict[str, Callable[..., Any]] = {
    "slice": aten.slice_scatter.default,
    "select": aten.select_scatter.default,
    "diagonal": aten.diagonal_scatter.default,
}


def _scatter_piece(split: Node, index: int, base: Ref, base_meta: TensorMeta, value: Ref) -> Step | None:
    """As above, for piece ``index`` of chunk, split or unbind."""
    name = packet_name(split.op)
    place = 1 if name == "unbind" else 2
    axis = int(split.kwargs.get("dim", split.args[place] if len(split.args) > place else 0))
    if name == "unbind":
        return Step(aten.select_scatter.default, (base, value, axis, index), base_meta)
    if name not in {"chunk", "split", "split_with_sizes"} or not isinstance(split.meta, tuple):
        return None
    sizes = [piece.shape[axis] for piece in split.meta if piece is not None]
    start = sum(sizes[:index])
    return Step(aten.slice_scatter.default, (base, value, axis, start, start + sizes[index]), base_meta)
