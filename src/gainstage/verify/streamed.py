"""One forward pass of a model that no memory has to hold: each parameter is drawn when it is read, and dropped after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gainstage.graph import Graph, ModuleCall, Node
from gainstage.propagate.execution import Execution
from gainstage.verify.measure import AttentionWatch, Measurement, Pass, measure


def run_streamed(
    graph: Graph,
    parameters: Mapping[str, torch.Tensor],
    *,
    samples: int,
    look_at_output: Callable[[Mapping[int, torch.Tensor]], Mapping[int, tuple[float, float]]],
    progress: Callable[[int, int], object] | None = None,
) -> Pass:
    """Run the graph on its own inputs, operation by operation, and measure what every module call returns.

    Args:
        graph: captured with real inputs; its constants have their values.
        parameters: canonical name -> values; read where an operation needs them.
        samples: size of the batch.
        look_at_output: is given the tensors that the model returns, by their place among them.
        progress: called with the number of operations done, and in all.

    Raises:
        InputError: an operation fails on these tensors.
    """
    found, stack = Pass(), [""]
    execution = Execution(graph, parameters, stops=())
    returned = {name for call in graph.calls for name in call.outputs}
    last = {
        place: name for call in graph.calls if not call.path for place, name in zip(call.positions, call.outputs, strict=True)
    }
    measured: dict[str, Measurement] = {}
    outputs: dict[int, torch.Tensor] = {}

    def look(node: Node, result: Any) -> None:
        if node.name in returned and isinstance(result, torch.Tensor) and result.is_floating_point():
            measured[node.name] = measure(result, samples)
        outputs.update({place: result for place, name in last.items() if name == node.name})

    with torch.no_grad(), torch.random.fork_rng(devices=[]), AttentionWatch(found, stack):
        for node in graph.nodes:
            if node.name in returned and execution.is_weight(node.name):
                look(node, execution.read(node.name))
        for done, (node, result) in enumerate(execution.run()):
            stack[0] = node.provenance.module_path
            look(node, result)
            if progress is not None:
                progress(done, len(graph.nodes))
    found.calls.update({(call.path, call.call): _outputs(call, measured) for call in graph.calls})
    found.types.update({(call.path, call.call): call.module_type for call in graph.calls})
    found.first_losses.update(look_at_output(outputs))
    return found


def _outputs(call: ModuleCall, measured: Mapping[str, Measurement]) -> dict[int, Measurement]:
    return {place: measured[name] for place, name in zip(call.positions, call.outputs, strict=True) if name in measured}
