"""Mixtures of experts: rows multiplied by the weight of their group."""

from __future__ import annotations

import numpy as np
import torch

from gainstage.rules.registry import Call, foreign_rule, rule
from gainstage.signal import Value, contract, gaussian, select
from gainstage.signal.axes import axes_of
from gainstage.signal.copies import replace
from gainstage.signal.gather import arrangement, same_index_table
from gainstage.signal.movement import map_tables, merge_dim

aten = torch.ops.aten


@foreign_rule("transformers.grouped_mm_fallback.default")
@rule(aten._grouped_mm.default)
def grouped_product(
    call: Call, x: Value, weight: Value, offs: Value | None = None, bias: None = None, out_dtype: object = None
) -> Value:
    """``K_y[S] = P(same expert | S) C(x, w_same)[S] + P(other | S) C(x, w_other)[S]``, C the contraction over channels.

    ``offs``: the row at which each expert's share ends. Rows of one token that go to different experts are independent.
    """
    if offs is None or offs.constant is None or len(x.dims) != 2 or len(weight.dims) != 3 or bias is not None:
        raise NotImplementedError("grouped products of a matrix with a stack of matrices by known offsets only")
    order = arrangement(x.dims[0])
    sizes = [axis.size for axis in x.dims[0]]
    rows = np.arange(x.shape[0])
    expert = np.empty(x.shape[0], dtype=np.int64)
    expert[rows if order is None else order] = np.searchsorted(offs.constant.numpy(), rows, side="right")
    equal, _ = same_index_table(torch.from_numpy(expert.reshape(sizes)))
    weight = merge_dim(weight, 0)
    same = contract(x, select(weight, 0, 0), "ry", "yz", "rz")
    apart = map_tables(weight, weight.dims[1:], lambda table: table[0], None)
    apart = replace(apart, mean=weight.mean, constant=None)
    other = contract(x, apart, "ry", "yz", "rz")
    equal = equal.reshape(equal.shape + (1,) * (same.table.ndim - equal.ndim))
    table = equal * same.table + (1.0 - equal) * other.table
    assert len(axes_of(same.dims)) == table.ndim
    return gaussian(same.dims, same.mean, table, lineage=x.lineage | weight.lineage, stray=same.stray, profile=same.levels)
