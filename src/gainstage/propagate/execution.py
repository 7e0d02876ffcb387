"""The graph on real tensors: every operation once, in order, and nothing kept longer than it is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, final

import torch

from gainstage.errors import InputError
from gainstage.graph import Graph, Node, NodeKind
from gainstage.propagate.host import run_on_host
from gainstage.propagate.interpret import resolve


@final
class Execution:
    """One forward pass in which parameters may be replaced on the way.

    What is computed from parameters alone (a transposed weight, ``1 + w``) is computed where it is read, from the parameters
    as they are by then.

    Args:
        graph: the captured model.
        parameters: canonical name -> values; the dictionary is read at every use.
        stops: nodes that are kept as data even where they are computed from parameters alone.
    """

    def __init__(self, graph: Graph, parameters: Mapping[str, torch.Tensor], stops: Collection[str]) -> None:
        self.graph = graph
        self._parameters = parameters
        self._results: dict[str, Any] = {}
        self._sources = _weights(graph, stops)
        self._last = {operand: node.name for node in graph.nodes for operand in self._data(node)}

    def run(self) -> Iterator[tuple[Node, Any]]:
        """Each operation on data, with its result; what is sent back takes the result's place (None: it stays)."""
        for node in self.graph.nodes:
            if node.kind is not NodeKind.OP or node.name in self._sources:
                continue
            result = self.compute(node)
            self._results[node.name] = result
            yield node, result
            for operand in {*self._data(node), node.name}:
                if self._last.get(operand, operand) in (node.name, operand):
                    self._results.pop(operand, None)

    def replace(self, node: Node, result: torch.Tensor) -> None:
        """Go on with another result of a node."""
        self._results[node.name] = result

    def compute(self, node: Node, instead: Mapping[str, torch.Tensor] | None = None) -> Any:
        """Result of one operation; ``instead``: other values for some parameters.

        Raises:
            InputError: the operation fails on these tensors.
        """
        values = {name: self.read(name, instead) for name in node.operands()}
        if "norm" in node.op_name:  # those with running statistics write to them
            values = {name: self._copied(name, value) for name, value in values.items()}
        arguments = [resolve(argument, values) for argument in node.args]
        named = {name: resolve(argument, values) for name, argument in node.kwargs.items()}
        try:
            return run_on_host(node, arguments, named)
        except Exception as error:
            raise InputError(
                f"The pass fails at {node.op_name}, in {node.provenance}: {type(error).__name__}: {error}"
            ) from error

    def read(self, name: str, instead: Mapping[str, torch.Tensor] | None = None) -> Any:
        """Value of a node that has been computed or can be from parameters alone."""
        node = self.graph.by_name[name]
        if node.parameter is not None:
            return (instead or {}).get(node.parameter, self._parameters[node.parameter])
        if node.kind is not NodeKind.OP:
            assert node.value is not None
            return node.value
        return self.compute(node, instead) if name in self._sources else self._results[name]

    def is_weight(self, name: str) -> bool:
        """Whether a node is a parameter, or computed from parameters alone."""
        return name in self._sources

    def depends(self, name: str, parameter: str) -> bool:
        """Whether a node is that parameter, or computed from it and other parameters alone."""
        return parameter in self._sources.get(name, ())

    def _copied(self, name: str, value: Any) -> Any:
        return value.clone() if self.graph.by_name[name].kind is NodeKind.CONSTANT else value

    def _data(self, node: Node) -> Iterator[str]:
        """Results that are looked up when this node is computed, those behind parameters left out."""
        for name in node.operands():
            if self.graph.by_name[name].kind is NodeKind.OP and name not in self._sources:
                yield name


def _weights(graph: Graph, stops: Collection[str]) -> dict[str, frozenset[str]]:
    """Nodes that are computed from parameters and constants alone -> the parameters; nothing random, and no stops."""
    found: dict[str, frozenset[str]] = {}
    for node in graph.nodes:
        if node.parameter is not None:
            found[node.name] = frozenset({node.parameter})
        elif node.kind is NodeKind.OP and node.name not in stops and not node.may_draw:
            read = [graph.by_name[name] for name in node.operands()]
            own = [found[other.name] for other in read if other.name in found]
            if own and all(other.name in found or other.kind is NodeKind.CONSTANT for other in read):
                found[node.name] = frozenset().union(*own)
    return found
