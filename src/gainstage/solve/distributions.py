"""From a decided mean and variance to what can be drawn: the family that was asked for, where the shape allows it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from gainstage.errors import UnknownNameError, nearest
from gainstage.graph import Graph
from gainstage.plan import Block, Distribution, Family, joined
from gainstage.roles import Use
from gainstage.solve.constraint import is_contraction, is_lookup
from gainstage.solve.setting import Setting

_DRAWN = (Family.NORMAL, Family.TRUNCATED_NORMAL, Family.UNIFORM, Family.ORTHOGONAL, Family.DELTA_ORTHOGONAL)


def find_family(name: str) -> Family:
    """The family of that name, among those that weights can be drawn from.

    Raises:
        UnknownNameError: there is none.
    """
    names = {family.value: family for family in _DRAWN}
    if name not in names:
        raise UnknownNameError(f"there is no distribution {name!r}{nearest(name, names)}; known are {', '.join(names)}")
    return names[name]


def fitting_family(wanted: Family, setting: Setting, use: Use | None, graph: Graph) -> tuple[Family, str]:
    """The family, or the nearest that this parameter allows, with a line that says why."""
    if not wanted.is_matrix or setting.mixing is not None:
        return wanted, ""
    shape = setting.info.shape
    node = None if use is None else graph.by_name[use.node]
    if (
        use is None
        or node is None
        or not is_contraction(node)
        or is_lookup(node)
        or len(shape) < 2
        or len(use.output_dims) == len(shape)
    ):
        return Family.NORMAL, f"normal, not {wanted.value}: its entries form no matrix that a signal is multiplied with"
    if wanted is Family.ORTHOGONAL:
        return wanted, ""
    is_kernel = node.op_name.startswith("aten.conv") and len(shape) > 2
    if not is_kernel:
        return Family.ORTHOGONAL, "orthogonal, not delta-orthogonal: there are no taps"
    groups = node.args[6] if len(node.args) > 6 and not node.op_name.startswith("aten.conv_transpose") else 1
    if groups != 1 or any(size % 2 == 0 for size in shape[2:]):
        return Family.ORTHOGONAL, "orthogonal, not delta-orthogonal: that needs one group and a centre tap"
    return wanted, ""


def distribution_of(setting: Setting, part: int, family: Family) -> Distribution:
    """One part's distribution: a constant where nothing varies."""
    mean, variance = setting.means[part], setting.variances[part]
    if variance <= 0.0:
        return Distribution(family=Family.CONSTANT, mean=mean)
    if setting.mixing is not None:
        return Distribution(family=Family.MIXED, std=variance**0.5, mixing=setting.mixing)
    return Distribution(family=family, mean=0.0 if family.is_matrix else mean, std=variance**0.5)


def blocks_of(setting: Setting, parts: Sequence[Distribution], uses: Sequence[Use]) -> tuple[Distribution, tuple[Block, ...]]:
    """The distribution of the whole, and blocks where parts differ, with what they are for."""
    spans = zip(pairwise(setting.cuts), parts, strict=True)
    blocks = joined(Block(setting.dim, *span, distribution, _roles(uses, setting.dim, span)) for span, distribution in spans)
    return blocks[0].distribution, () if len(blocks) == 1 else blocks


def _roles(uses: Sequence[Use], dim: int, span: tuple[int, int]) -> str:
    """What a part is for, by the uses that are about some rows only."""
    inside = (use for use in uses if use.dim == dim and any(start < span[1] and span[0] < stop for start, stop in use.rows))
    return ", ".join(dict.fromkeys(use.role.value for use in inside))


def padding_row(use: Use | None, graph: Graph) -> int | None:
    """The row of a table that ``nn.Embedding(padding_idx=...)`` holds at zero, and that takes no gradient."""
    node = None if use is None else graph.by_name[use.node]
    if node is None or node.op is not torch.ops.aten.embedding.default or len(node.args) < 3:
        return None
    return int(node.args[2]) if node.args[2] >= 0 else None


def blocks_around(row: int, rows: int, distribution: Distribution) -> tuple[Block, ...]:
    """All rows but one, which is zero."""
    spans = ((0, row, distribution), (row, row + 1, Distribution(family=Family.CONSTANT)), (row + 1, rows, distribution))
    return tuple(Block(0, start, stop, its) for start, stop, its in spans if start < stop)
