"""From a plan back to the signals that it was solved for: the same tables as those of the solver, without solving again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from gainstage.graph import Graph, Node, ParameterInfo
from gainstage.plan import Distribution, Family, ParameterPlan, Plan
from gainstage.propagate import evaluate, parameter_value, table_value
from gainstage.roles import Role, is_data
from gainstage.signal import Value, affine
from gainstage.solve.priors import constants_of, constants_value

_SAME = 1e-9  # relative: rounding


def planned_values(
    graph: Graph,
    plan: Plan,
    *,
    moments: Callable[[str], tuple[float, float] | None],
    tables: Mapping[str, torch.Tensor],
    source: Callable[[Node], Value],
    at_plan: bool = True,
) -> dict[str, Any]:
    """Result of every node with parameters as they are planned.

    Args:
        graph: of the model that the plan was made for.
        plan: distributions of its parameters.
        moments: mean and variance of a parameter's present values, for those that the plan keeps.
        tables: the values themselves, for those that it keeps as data.
        source: statistics of the inputs.
        at_plan: bring the results to the levels of the module calls that the plan records, which were made for its own inputs.
    """
    index = {name: position for position, name in enumerate(graph.parameters)}

    def parameter(info: ParameterInfo) -> Value:
        planned = plan.parameters[info.name]
        if planned.distribution.family is Family.KEEP:
            is_table = is_data(graph, info.name, Role(planned.role))
            if is_table and (table := table_value(tables[info.name], index[info.name])) is not None:
                return table
            present = moments(info.name)
            assert present is not None, info.name
            return parameter_value(info, index[info.name], *present)
        return planned_value(info, index[info.name], planned)

    recorded = _recorded(graph, plan) if at_plan else {}
    values: dict[str, Any] = {}
    for node in graph.nodes:
        value = evaluate(node, values, parameter, source, graph)
        values[node.name] = _at_level(value, recorded.get(node.name))
    return values


def _recorded(graph: Graph, plan: Plan) -> dict[str, tuple[float, ...]]:
    """Levels that the plan was made with, by node: of module calls that return one tensor."""
    return {
        call.outputs[0]: plan.predictions[key]
        for call in graph.calls
        if len(call.outputs) == 1 and len(plan.predictions.get(key := f"{call.path}@{call.call}", ())) == 1
    }


def _at_level(value: Any, recorded: tuple[float, ...] | None) -> Any:
    """The value with the recorded second moment: what other inputs than the plan's would change, the plan does not mean."""
    if recorded is None or not isinstance(value, Value) or value.constant is not None:
        return value
    wanted, found = recorded[0], value.second_moment
    if wanted <= 0.0 or found <= 0.0 or abs(wanted - found) <= _SAME * found:
        return value
    return affine(value, (wanted / found) ** 0.5)


def planned_value(info: ParameterInfo, index: int, planned: ParameterPlan) -> Value:
    """Independent entries: ``sum_b n_b (mean_b, std_b^2) / n`` over blocks b of n_b coordinates, and their levels."""
    if numbers := constants_of(planned):
        return constants_value(numbers)
    spans = list(_spans(planned))
    if any(part.mixing is not None and part.mixing.stream != planned.name for _, _, part in spans):
        return parameter_value(info, index, 0.0, 0.0)  # a bias that takes off a mean: on average over draws nothing is added
    count = sum(stop - start for start, stop, _ in spans)
    mean = sum((stop - start) * part.mean for start, stop, part in spans) / count
    variance = sum((stop - start) * part.std**2 for start, stop, part in spans) / count
    dim = planned.blocks[0].dim if planned.blocks else 0
    profile = [(dim, start, stop, part.std) for start, stop, part in spans]
    return parameter_value(info, index, mean, variance, profile if len({part.std for _, _, part in spans}) > 1 else ())


def _spans(planned: ParameterPlan) -> Iterator[tuple[int, int, Distribution]]:
    """All entries, by blocks; a single row of zeros stands for padding, which no signal reads."""
    if not planned.blocks:
        yield 0, 1, planned.distribution
        return
    end, size = 0, planned.shape[planned.blocks[0].dim]
    for block in planned.blocks:
        if end < block.start:
            yield end, block.start, planned.distribution
        end = block.stop
        is_padding = block.stop - block.start == 1 < size and block.distribution == Distribution(family=Family.CONSTANT)
        if not is_padding:
            yield block.start, block.stop, block.distribution
    if end < size:
        yield end, size, planned.distribution
