"""Quotients of two sums that one positive tensor weighs: averages, as in linear attention that is normalised.

In ``sum_c q_c a_c / sum_c q_c z_c`` the size of q cancels, and where all q are small both sums are. Taken one by one, the
reciprocal of the second has a heavy tail that the quotient has not. Sums of gamma variables are independent of their shares
(Lukacs 1955); with such q exactly, and with others to first order in one over their number,

    E[(x / y)_i (x / y)_j] = E[x_i x_j] / E[y_i y_j]
"""

from __future__ import annotations

from gainstage.signal.axes import Axis
from gainstage.signal.stray import summed
from gainstage.signal.value import Value, gaussian

Read = frozenset[tuple[object, frozenset[Axis]]]


def weighed(names: Read) -> Read:
    """What a sum of products is known by to quotients: the tensors whose entries were multiplied."""
    return frozenset((("weighed", name), axes) for name, axes in names)


def quotient(x: Value, y: Value) -> Value | None:
    """``x / y`` of aligned sums that were weighed by one tensor, y nowhere negative; None for others."""
    common = {name for name, _ in x.read if isinstance(name, tuple)} & {name for name, _ in y.read if isinstance(name, tuple)}
    if not common or y.mean <= 0.0 or float(y.table.min()) <= 0.0 or float(y.marginal.values.min()) < 0.0:
        return None
    lineage, stray = x.lineage | y.lineage, summed([(x, 1.0), (y, -1.0)])
    return gaussian(x.dims, x.mean / y.mean, x.table / y.table, lineage=lineage, stray=stray, read=x.read)
