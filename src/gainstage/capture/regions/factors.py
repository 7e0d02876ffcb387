"""Factors of matrices: a root, an inverse, a determinant is a function of all entries of one matrix.

A table does not tell the diagonal from the rest, nor a positive matrix from others. So what makes the matrix, from the layers
that its parts come from, and what is made of the factor, up to the next layers, is one operation.
"""

from __future__ import annotations

from gainstage.capture.regions.dataflow import Dataflow
from gainstage.capture.regions.region import MOST, STOPS, with_region
from gainstage.graph import NodeKind

_FACTORED = frozenset({
    "linalg_cholesky", "linalg_cholesky_ex", "cholesky", "linalg_inv", "linalg_inv_ex", "inverse", "pinverse", "linalg_pinv",
    "linalg_solve", "linalg_solve_ex", "_linalg_solve_ex", "linalg_ldl_factor", "linalg_lu_factor", "linalg_eigh", "_linalg_eigh",
    "linalg_eigvalsh", "linalg_slogdet", "_linalg_slogdet", "slogdet", "logdet", "linalg_det", "_linalg_det", "det",
})  # fmt: skip


def factors(dataflow: Dataflow) -> list[set[str]]:
    """Factors of matrices that are computed, with what makes these and what is made of the factors."""
    regions: list[set[str]] = []
    inside = _passing(dataflow) if any(node.short_name in _FACTORED for node in dataflow.nodes.values()) else set()
    for name, node in dataflow.nodes.items():
        if node.short_name in _FACTORED and name in inside:
            before, after = dataflow.behind([name], inside), dataflow.ahead(name, inside)
            if len(before) > 1 and len(before | after) <= MOST:
                regions = with_region(regions, before | after)
    return regions


def _passing(dataflow: Dataflow) -> set[str]:
    """Operations that are no layers: they draw nothing, and contract data with data only."""
    weights: set[str] = set()
    found: set[str] = set()
    for name, node in dataflow.nodes.items():
        operands = dataflow.operands[name]
        if node.kind is NodeKind.PARAMETER or (operands and weights.issuperset(operands)):
            weights.add(name)
        elif node.kind is NodeKind.OP and not node.may_draw and not (node.short_name in STOPS and weights.intersection(operands)):
            found.add(name)
    return found
