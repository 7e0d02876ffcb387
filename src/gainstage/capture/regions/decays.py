"""Decays: exponentials of differences of a running sum, as state-space models have them.

The difference of two sums of negative terms is negative, and that is what keeps its exponential below one.
"""

from __future__ import annotations

from gainstage.capture.regions.dataflow import Dataflow
from gainstage.graph import NodeKind
from gainstage.graph.families import RESHAPING

_BETWEEN = RESHAPING | {
    "cumsum", "add", "sub", "neg", "masked_fill", "where", "tril", "triu", "clamp", "select", "slice", "narrow",
}  # fmt: skip


def decays(dataflow: Dataflow) -> list[set[str]]:
    """Running sums with the exponentials of what is made of them and constants."""
    sums: dict[str, str] = {}  # what is made of a running sum -> the sum
    ends: dict[str, list[str]] = {}  # running sum -> exponentials
    for name, node in dataflow.nodes.items():
        operands = dataflow.operands[name]
        read = {sums[other] for other in operands if other in sums}
        if len(read) == 1 and all(other in sums or dataflow.nodes[other].kind is NodeKind.CONSTANT for other in operands):
            if node.short_name in _BETWEEN:
                sums[name] = next(iter(read))
            elif node.short_name == "exp":
                ends.setdefault(next(iter(read)), []).append(name)
        elif node.short_name == "cumsum" and dataflow.is_floating(name):
            sums[name] = name
    return [dataflow.behind(found, {*found, *sums}) for found in ends.values()]
