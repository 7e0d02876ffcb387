"""The log-determinant of a normalizing flow: which output it is, and a start at the identity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gainstage.errors import InputError
from gainstage.graph import Graph, NodeKind, TensorMeta
from gainstage.roles import Roles
from gainstage.signal import Value
from gainstage.solve.constraint import Demand
from gainstage.solve.setting import Setting


def find_determinant(graph: Graph, logdet_std: float | None, position: int | None) -> str | None:
    """The node of the output that is the log-determinant: one number for each sample.

    Args:
        graph: of a model that returns ``(z, log_determinant)``, or more.
        logdet_std: what is asked of it; None for nothing.
        position: which of the outputs it is; without it the only one of shape [batch].

    Raises:
        InputError: a deviation that is none, an output that is not there, or none or several of that shape.
    """
    if logdet_std is None:
        return None
    if not 0.0 <= logdet_std < math.inf:
        raise InputError(f"logdet_std is {logdet_std}; a deviation is a number from 0 on")
    shapes = {name: meta.shape for name in graph.outputs if isinstance(meta := graph.by_name[name].meta, TensorMeta)}
    if position is not None:
        if not -len(graph.outputs) <= position < len(graph.outputs):
            raise InputError(f"logdet: there is no output {position}; the model returns {len(graph.outputs)}")
        return graph.outputs[position]
    found = [name for name, shape in shapes.items() if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1 and len(shapes) > 1)]
    if not found and len(constant := _constant_outputs(graph)) == 1:
        return constant[0]
    if len(found) != 1:
        listed = ", ".join(str(list(shape)) for shape in shapes.values())
        raise InputError(
            f"logdet_std: of the outputs, of shapes {listed}, {len(found)} have one number for each sample. Let the model return "
            "(z, log_determinant), by gainstage.Flow for one, and say with logdet= which output it is."
        )
    return found[0]


def determinant_off(demand: Demand, values: Mapping[str, Any]) -> float:
    """The predicted mean of the log-determinant, where it is further from 0 than the deviation asked for, else 0."""
    value = values[demand.node]
    return value.mean if isinstance(value, Value) and value.mean**2 > demand.goal.constant else 0.0


def _constant_outputs(graph: Graph) -> list[str]:
    """Constants of shape [batch] that no operation reads, but the model returns: the log-determinant of additive couplings."""
    read = {name for node in graph.nodes for name in node.operands()}
    return [
        node.name
        for node in graph.nodes
        if node.kind is NodeKind.CONSTANT and node.name not in read and isinstance(node.meta, TensorMeta)
        and len(node.meta.shape) == 1 and node.meta.dtype.is_floating_point
    ]  # fmt: skip


def identity_start(roles: Roles, settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Settings in which the last weights of the networks of scales and shifts are zero."""
    assert roles.log_determinant is not None
    names = dict.fromkeys(setter.use.parameter for setter in (*roles.log_determinant.setters, *roles.log_determinant.shifts))
    line = "zero: log det = 0, the flow starts as the identity (up to what the library adds)"
    return {
        name: replace(settings[name].with_all(mean=0.0, variance=0.0), is_fixed=True, lines=(*settings[name].lines, line))
        for name in names
        if settings[name].given is None
    }
