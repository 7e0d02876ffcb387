"""Rows that are looked up of a function of known rows: the function of the known rows that are looked up.

A bias of positions may be a small network's function of a known table of coordinates, picked by the relative position of query
and key. What two keys of one query share is a matter of their coordinates, which lie nearer to each other than those of any two
rows do: ``f(c)[i] = f(c[i])``, and ``c[i]`` is known entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.graph import Graph, Node, NodeKind, Ref, TensorMeta
from gainstage.graph.families import RESHAPING, UNCHANGED
from gainstage.rules import is_pointwise
from gainstage.signal import Value, gaussian, known, reshape
from gainstage.signal.copies import replace
from gainstage.signal.patterns import spread_pairs
from gainstage.signal.pointwise import call_on
from gainstage.signal.quadrature import Array, covariances, matmul, nodes
from gainstage.signal.traits import Drawn

aten = torch.ops.aten

MOST = 2**20  # known entries that are looked up
# Draws of what one row has an entry of; fewer of large ones, which have more rows.
LEAST, FEWEST, MOST_DRAWN = 64, 8, 2**19
_WITH_NUMBERS = frozenset({"mul", "div", "add", "sub", "rsub"})  # functions of one tensor, where the other is a number
_VIEWS = frozenset({"view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze"}) | UNCHANGED

Run = Callable[[Node, Value], Any]


def of_known_rows(node: Node, values: Mapping[str, Any], graph: Graph, run: Run) -> Value | None:
    """Rows that a node looks up of a function of known rows; ``run``: an operation on another first operand."""
    index = _index(node, values)
    if index is None or not isinstance(node.meta, TensorMeta):
        return None
    way = _way(graph.by_name[node.args[0].name], graph)
    rows = values.get(way[0].args[0].name) if way else None
    if not isinstance(rows, Value) or rows.constant is None or not rows.constant.is_floating_point():
        return None
    table = rows.constant.reshape(-1, rows.constant.shape[-1])
    read = graph.by_name[node.args[0].name].meta
    if not isinstance(read, TensorMeta) or read.shape[:-1] != (len(table),):
        return None  # not by rows
    if index.numel() * table.shape[1] > MOST or int(index.min()) < 0:
        return None
    laid_out = index.reshape(*_laid_out(node, graph, index))
    x, steps = known(table[laid_out]), [step for step in way if step.short_name not in _VIEWS]
    for step in steps:
        x = run(step, x)
    shared = _shared(table.to(torch.float64).numpy(), steps, values)
    if shared is None:
        return reshape(x, node.meta.shape)
    found = reshape(_with_pairs(x, shared, laid_out.numpy()), node.meta.shape)
    return replace(found, drawn=Drawn(found.table, _draws(shared, index, node.meta.shape)))


def _draws(shared: Array, index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Draws of Gaussian rows with these covariances, each entry of a row for itself, as they are looked up."""
    entries = shape[-1]
    count = -(-min(max(MOST_DRAWN // index.numel(), FEWEST), LEAST) // entries)
    sizes, directions = np.linalg.eigh(shared)
    normal = np.random.default_rng(len(shared)).standard_normal((len(shared), count * entries))
    rows = torch.from_numpy(matmul(directions * np.sqrt(np.maximum(sizes, 0.0)), normal))
    return rows[index.reshape(-1)].reshape(-1, count, entries).movedim(1, 0).reshape(count, *shape)


def carried(node: Node, args: Sequence[Any], result: Any) -> Any:
    """A function or a view of a tensor of which draws are at hand, with its draws."""
    x = args[0] if args else None
    draws = x.valid_draws() if isinstance(x, Value) else None
    if draws is None or result is x or not isinstance(result, Value):
        return result
    if any(isinstance(other, Value) for other in args[1:]) or node.op is None:
        return result
    if not (node.short_name in RESHAPING or is_pointwise(node.op) or node.short_name in _WITH_NUMBERS):
        return result
    made = torch.stack([node.op(each, *args[1:], **node.kwargs) for each in draws])
    return replace(result, drawn=Drawn(result.table, made))


def _shared(rows: Array, way: Sequence[Node], values: Mapping[str, Any]) -> Array | None:
    """``E[y_i y_j]`` of an entry of two rows, exact for Gaussian weights in wide layers; None for others."""
    shared = rows @ rows.T / rows.shape[1]
    for step in way:
        if step.op is not aten.linear.default:
            level = np.sqrt(np.maximum(np.diag(shared), 1e-300))
            sizes, kinds = np.unique(level, return_inverse=True)
            made = call_on(partial(_at, step), sizes[:, None] * nodes())[kinds]
            shared = covariances(made, np.clip(shared / np.outer(level, level), -1.0, 1.0))
            continue
        weight, *bias = (values.get(argument.name) for argument in step.args[1:3] if isinstance(argument, Ref))
        if not isinstance(weight, Value) or not weight.is_weight or weight.mean != 0.0:
            return None
        shared = weight.shape[-1] * weight.second_moment * shared
        shared = shared + sum(each.second_moment for each in bias if isinstance(each, Value))
    return shared if way[-1].op is aten.linear.default else None


def _at(step: Node, x: torch.Tensor) -> torch.Tensor:
    assert step.op is not None
    found: torch.Tensor = step.op(x, *step.args[1:], **step.kwargs)
    return found


def _with_pairs(x: Value, shared: Array, index: NDArray[np.int64]) -> Value:
    """X with what pairs of rows share, by the places at which they are looked up; entries of one row are independent."""
    averaged = np.empty((2,) * index.ndim)
    averaged[(1,) * index.ndim] = float(np.diag(shared)[index].mean())
    for same in list(np.ndindex(averaged.shape))[:-1]:
        kept = [d for d in range(index.ndim) if same[d]]
        others = [d for d in range(index.ndim) if not same[d]]
        groups = index.transpose(*kept, *others).reshape(int(np.prod([index.shape[d] for d in kept])), -1)
        counts = np.zeros((len(groups), len(shared)))
        np.add.at(counts, (np.arange(len(groups))[:, None], groups), 1.0 / groups.shape[1])
        averaged[same] = float(np.vecdot(matmul(counts, shared), counts).mean())
    table = np.zeros_like(x.table)
    table[..., 1] = spread_pairs(averaged, index.shape)
    return replace(gaussian(x.dims, 0.0, table), lineage=x.lineage, stray=x.stray)


def _index(node: Node, values: Mapping[str, Any]) -> torch.Tensor | None:
    """Integers of a look-up of rows; None where it is none, or where they are not known."""
    if node.op is not aten.index.Tensor or not isinstance(node.args[0], Ref) or len(node.args[1]) != 1:
        return None
    index = values.get(getattr(node.args[1][0], "name", ""))
    integers = index.constant if isinstance(index, Value) else None
    return None if integers is None or integers.is_floating_point() or integers.dtype is torch.bool else integers.long()


def _way(at: Node, graph: Graph) -> list[Node]:
    """Operations, row by row, that lead from known rows to a node; empty where others do."""
    found: list[Node] = []
    while at.kind is NodeKind.OP and at.args and isinstance(at.args[0], Ref):
        entry_by_entry = at.op is not None and is_pointwise(at.op)
        if not (entry_by_entry or at.op is aten.linear.default or (at.short_name in _VIEWS and _keeps_rows(at, graph))):
            return []
        found.insert(0, at)
        at = graph.by_name[at.args[0].name]
    return found if at.kind is NodeKind.CONSTANT else []


def _keeps_rows(view: Node, graph: Graph) -> bool:
    """Whether a view leaves the last dimension as it is."""
    before = graph.by_name[view.args[0].name].meta
    return isinstance(before, TensorMeta) and isinstance(view.meta, TensorMeta) and before.shape[-1:] == view.meta.shape[-1:]


def _laid_out(node: Node, graph: Graph, index: torch.Tensor) -> Sequence[int]:
    """Shape of the integers, as what reads the rows lays them out: by query and by key."""
    for reader in graph.nodes if index.dim() == 1 else ():
        if reader.short_name in _VIEWS and isinstance(reader.meta, TensorMeta) and node.name in reader.operands():
            shape = reader.meta.shape[:-1]
            if prod(shape) == index.numel():
                return shape
    return tuple(index.shape)
