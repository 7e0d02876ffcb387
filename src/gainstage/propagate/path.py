"""The main path of a network: from its output back to an input, along what the outputs depend on most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from gainstage.graph import Graph, Node, NodeKind, TensorMeta
from gainstage.propagate.depth import Depth, Station
from gainstage.propagate.trace import Signal

_NORMALISING = ("norm", "rsqrt")  # what norms are called, or made of


def main_path(graph: Graph, signals: Mapping[str, Signal]) -> Depth | None:
    """Stations from the input to the output, along the operand that the outputs are most sensitive to.

    None where there is nothing to tell: no gradient, a single sample, less than two stations.
    """
    carriers = _carriers(graph)
    name = next((output for output in graph.outputs if output in signals and output in carriers), None)
    stations: list[Station] = []
    while name is not None:
        node, signal = graph.by_name[name], signals[name]
        operands = [n for n in dict.fromkeys(node.operands()) if n in signals and n in carriers]
        if (not operands or len(operands) > 1 or _has_weight(graph, node, carriers)) and signal.gradient is not None:
            stations.append(_station(node, signal))
        elif stations and operands and math.prod(signal.shape) < math.prod(signals[operands[0]].shape):
            stations[-1] = replace(stations[-1], averages=True)
        name = max(operands, key=lambda n: _sensitivity(signals[n]), default=None)
    batch = stations[-1].batch if stations else 0
    kept = [station for station in reversed(stations) if station.batch == batch]
    return Depth(_with_norms(graph, kept)) if batch > 1 and len(kept) > 1 else None


def _with_norms(graph: Graph, stations: Sequence[Station]) -> tuple[Station, ...]:
    """Mark the stations with a norm between them and the one before, on the path itself or on a branch."""
    position = {node.name: i for i, node in enumerate(graph.nodes)}
    norms = [i for i, node in enumerate(graph.nodes) if any(word in node.op_name for word in _NORMALISING)]
    found = [stations[0]]
    for before, after in pairwise(stations):
        between = any(position[before.node] < i < position[after.node] for i in norms)
        found.append(replace(after, normalises=between))
    return tuple(found)


def _carriers(graph: Graph) -> set[str]:
    """Nodes that depend on an input, or on rows that one picks."""
    return graph.following(
        node.name for node in graph.nodes if node.kind is NodeKind.INPUT or node.op is torch.ops.aten.embedding.default
    )


def _has_weight(graph: Graph, node: Node, carriers: set[str]) -> bool:
    """Whether a node contracts its input with weights: what comes from parameters, with two dimensions at least."""
    others = [graph.by_name[name] for name in node.operands() if name not in carriers]
    return any(
        other.kind in (NodeKind.PARAMETER, NodeKind.OP) and isinstance(other.meta, TensorMeta) and len(other.meta.shape) > 1
        for other in others
    )


def _station(node: Node, signal: Signal) -> Station:
    batch = signal.shape[0] if signal.shape else 0
    assert isinstance(node.meta, TensorMeta)
    return Station(
        node=node.name,
        module=node.provenance.module_path,
        second_moment=signal.second_moment,
        cosine=signal.cosine(0) if batch > 1 else 1.0,
        sensitivity=_sensitivity(signal),
        resolution=torch.finfo(node.meta.dtype).eps if node.meta.dtype.is_floating_point else 0.0,
        batch=batch,
    )


def _sensitivity(signal: Signal) -> float:
    """``n E[g^2] E[x^2]``."""
    gradient = 0.0 if signal.gradient is None else signal.gradient.second_moment
    return math.prod(signal.shape) * gradient * signal.second_moment
