"""Where levels are set: the operations that a parameter's scale acts on, and which of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from gainstage.graph import Graph, Node
from gainstage.roles import Role, Roles, Use
from gainstage.solve.constraint import is_contraction, is_lookup

aten = torch.ops.aten

Ranges = tuple[tuple[int, int], ...]
Key = tuple[str, Ranges]  # a parameter, and which of its rows (empty: all)

# Channels of a convolution stand in front of its spatial dimensions; those of any other contraction stand last.
_SPATIAL: dict[object, int] = {
    aten.conv1d.default: 1, aten.conv1d.padding: 1, aten.conv_transpose1d.default: 1,
    aten.conv2d.default: 2, aten.conv2d.padding: 2, aten.conv_transpose2d.input: 2,
    aten.conv3d.default: 3, aten.conv3d.padding: 3, aten.conv_transpose3d.input: 3,
}  # fmt: skip
_SCALES = frozenset({Role.NORM_SCALE, Role.LAYER_SCALE, Role.RESIDUAL_END, Role.MERGE_END})


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One parameter at one node whose output's level it sets.

    ``blocks``: rows with a role of their own (queries, keys, values), of the parameter's dimension ``dim``; empty for a
    parameter of one piece. ``is_tied``: a table that is a head's weight, too. ``is_recurrent``: it acts through gates.
    """

    parameter: str
    node: str
    dim: int = 0
    blocks: tuple[Ranges, ...] = ()
    is_tied: bool = False
    is_recurrent: bool = False


def collect_sites(graph: Graph, roles: Roles) -> dict[str, tuple[Site, ...]]:
    """By node: contractions, and norms and layer scales that set the level of a branch.

    Several parameters may act on one node: the gain of a normalised weight comes before that weight, whose scale cancels.
    """
    branches = [branch for stream in roles.streams for branch in stream.branches]
    branches += [branch for merge in roles.merges for branch in merge.branches]
    ends = {(setter.use.parameter, setter.use.node) for branch in branches for setter in branch.setters}
    found: dict[str, list[Site]] = {}
    for name, uses in roles.uses.items():
        by_node: dict[str, list[Use]] = {}
        for use in uses:
            if use.role is Role.RECURRENT or _is_setting(graph.by_name[use.node], use, is_end=(name, use.node) in ends):
                by_node.setdefault(use.node, []).append(use)
        for node, own in by_node.items():
            site = Site(
                parameter=name,
                node=node,
                dim=own[0].dim,
                blocks=_blocks(own, graph.parameters[name].shape),
                is_tied=roles.of(name) is Role.TIED_HEAD and is_lookup(graph.by_name[node]),
                is_recurrent=own[0].role is Role.RECURRENT,
            )
            first = own[0].role is Role.NORM_SCALE
            found.setdefault(node, []).insert(0 if first else len(found[node]), site)
    return {node: tuple(sites) for node, sites in found.items()}


def _is_setting(node: Node, use: Use, *, is_end: bool) -> bool:
    if use.role in (Role.BIAS, Role.NORM_SHIFT, Role.SLOPE, Role.KEPT, Role.LOG_SCALE, Role.UNUSED):
        return False
    return is_contraction(node) or (is_end and use.role in _SCALES)


def _blocks(uses: list[Use], shape: tuple[int, ...]) -> tuple[Ranges, ...]:
    """Rows of each use, none twice."""
    dims = {use.dim for use in uses if use.rows}
    if not dims or len(dims) > 1 or any(use.dim not in use.output_dims for use in uses):
        return ()
    blocks: list[Ranges] = []
    for use in uses:
        if use.rows and not overlap(use.rows, [span for block in blocks for span in block]):
            blocks.append(use.rows)
    return () if blocks == [((0, shape[uses[0].dim]),)] else tuple(blocks)


def overlap(some: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> bool:
    """Whether any of these ranges has a coordinate in common with any of those."""
    return any(start < last and first < stop for start, stop in some for first, last in others)


def gaps(blocks: Sequence[Ranges], size: int) -> Ranges:
    """The coordinates that no block is about."""
    edges = sorted(span for block in blocks for span in block)
    return tuple((stop, start) for (_, stop), (start, _) in pairwise([(0, 0), *edges, (size, size)]) if stop < start)


def channel_dim(node: Node, rank: int) -> int:
    """The dimension of a contraction's output that the weight's output coordinate becomes."""
    return rank - 1 - _SPATIAL.get(node.op, 0)
