"""The stage itself: a module and example inputs in, a graph out."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gainstage.capture.calls import canonical_paths, marks_by_readers, module_calls
from gainstage.capture.constants import fold
from gainstage.capture.functional import NotFunctional, functionalise
from gainstage.capture.lower import UNKNOWN_SIZE, Lowered, lower
from gainstage.capture.parameters import parameter_table
from gainstage.capture.trace import Exported, decompose, export
from gainstage.errors import CaptureError, NoSignalError
from gainstage.graph import Graph, Node, NodeKind, TensorMeta


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> Graph:
    """Capture a model as a graph, in the mode (train or eval) that it is in; the model stays as it is.

    Args:
        model: any module; its parameters may lie on the meta device.
        args: positional arguments of forward; tensors, also nested in containers and dataclasses.
        kwargs: keyword arguments of forward.
        loss: what becomes the only output of the graph: the model's output -> a scalar.
        buffers: values of buffers that lie on the meta device, by name; others are guessed.

    Returns:
        The graph: no writes in place, ties resolved, constants computed.

    Raises:
        CaptureError: torch.export cannot follow the model; the message quotes the line.
        UnsupportedParameterError: parameters that no level can be set for.
        InputError: arguments that forward does not take, tensors of size zero, a loss that returns no scalar.
        NoSignalError: no floating-point output depends on a parameter.
    """
    parameters, canonical_names = parameter_table(model)
    exported = export(model, tuple(args), dict(kwargs or {}), loss, buffers or {})
    functional = _functional(exported, canonical_names, canonical_paths(model))
    nodes, assumptions = fold(_reachable(functional.nodes, functional), functional.outputs)
    nodes = _reachable(nodes, functional)
    _check_sizes(nodes)
    varying = {node.name for node in nodes if node.kind is not NodeKind.CONSTANT}
    outputs = tuple(name for name in functional.outputs if name in varying)
    _check_signal(nodes, outputs)
    return Graph(
        nodes=tuple(nodes),
        outputs=outputs,
        parameters=parameters,
        calls=module_calls(functional, varying, model),
        training=model.training,
        assumptions=tuple(assumptions),
    )


def _functional(exported: Exported, names: Mapping[str, str], paths: Mapping[str, str]) -> Lowered:
    """Nodes without writes; where ours do not suffice, torch's own functionalisation, which takes as long as the export."""
    try:
        return functionalise(lower(exported, names, paths))
    except NotFunctional:
        decomposed = lower(decompose(exported), names, paths)
    try:
        return functionalise(dataclasses.replace(decomposed, marks=marks_by_readers(decomposed)))
    except NotFunctional as error:
        raise CaptureError(
            f"{error.node.op_name} in {error.node.provenance} writes in place in a way that has no value form. "
            "Use the operation's ordinary form there."
        ) from None


def _reachable(nodes: Sequence[Node], lowered: Lowered) -> list[Node]:
    """What the outputs depend on, and those results of a reached operation that a module returned (an LSTM's states)."""
    reached = set(lowered.outputs)
    for node in reversed(nodes):
        if node.name in reached:
            reached.update(node.operands())
    pieces = {
        node.name
        for node in nodes
        if node.op is operator.getitem and node.name in lowered.marks and set(node.operands()) <= reached
    }
    return [node for node in nodes if node.name in reached or node.name in pieces]


def _check_sizes(nodes: Sequence[Node]) -> None:
    for node in nodes:
        for meta in node.meta if isinstance(node.meta, tuple) else (node.meta,):
            if meta is not None and UNKNOWN_SIZE in meta.shape:
                raise CaptureError(
                    f"The shape of {node.op_name} in {node.provenance} depends on values, so that its size is not known before "
                    "the model runs. Use an operation of fixed shape (torch.where instead of boolean indexing)."
                )


def _check_signal(nodes: Sequence[Node], outputs: Sequence[str]) -> None:
    has_parameters = any(node.kind is NodeKind.PARAMETER for node in nodes)
    source = NodeKind.PARAMETER if has_parameters else NodeKind.INPUT
    carrying: set[str] = set()
    for node in nodes:
        if node.kind is source or any(name in carrying for name in node.operands()):
            carrying.add(node.name)
    metas = {node.name: node.meta for node in nodes}
    floating = [name for name in outputs if isinstance(meta := metas[name], TensorMeta) and meta.dtype.is_floating_point]
    if not any(name in carrying for name in floating):
        raise NoSignalError(
            "No floating-point output of the model depends on a parameter or an input, so there is nothing to follow. "
            "Check that forward returns its result, in tensors, containers or dataclasses."
        )
