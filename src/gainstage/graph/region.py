"""Several operations that count as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gainstage.graph.model import Graph, Node, Ref

aten = torch.ops.aten
# What a write is a write to: autograd refuses these operations for complex numbers, but not the writes that they stand for.
_WRITTEN: Mapping[Any, Any] = {aten.slice_scatter.default: aten.slice.Tensor, aten.select_scatter.default: aten.select.int}


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Several operations as one: a function of the values of ``operands``, which returns those of ``results``."""

    nodes: tuple[Node, ...]
    operands: tuple[str, ...]
    results: tuple[str, ...]

    @property
    def __name__(self) -> str:
        """The operations that it begins and ends with."""
        return "..".join(
            dict.fromkeys(node.op_name.removeprefix("aten.").partition(".")[0] for node in (self.nodes[0], self.nodes[-1]))
        )

    def __call__(self, *operands: torch.Tensor) -> Any:
        """Run the operations."""
        values: dict[str, Any] = dict(zip(self.operands, operands, strict=True))
        for node in self.nodes:
            values[node.name] = _run(node, _filled(node.args, values), _filled(node.kwargs, values))
        results = tuple(values[name] for name in self.results)
        return results[0] if len(results) == 1 else results


def _run(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    assert node.op is not None
    view = _WRITTEN.get(node.op)
    if view is None or not args[0].is_complex():
        return node.op(*args, **kwargs)
    into, what, *where = args
    result = into.clone()
    view(result, *where, **kwargs).copy_(what)
    return result


def parameters_of_regions(graph: Graph) -> frozenset[str]:
    """Parameters that nothing but regions reads: their entries count together, not as so many draws."""
    parameter_of = {node.name: node.parameter for node in graph.nodes if node.parameter is not None}
    read: dict[str, bool] = {}
    for node in graph.nodes:
        for name in node.operands():
            if name in parameter_of:
                read[parameter_of[name]] = read.get(parameter_of[name], True) and isinstance(node.op, Region)
    return frozenset(parameter for parameter, by_regions_only in read.items() if by_regions_only)


def _filled(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, dict):
        return {key: _filled(item, values) for key, item in argument.items()}
    if isinstance(argument, (list, tuple)):
        return type(argument)(_filled(item, values) for item in argument)
    return argument
