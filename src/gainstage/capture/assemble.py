"""From nodes without writes to a graph: what reaches no output dropped, what is known computed, what is missing refused."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from gainstage.capture.calls import module_calls
from gainstage.capture.constants import fold
from gainstage.capture.functional import NotFunctional, functionalise
from gainstage.capture.lowered import UNKNOWN_SIZE, Lowered
from gainstage.capture.masks import name_masks
from gainstage.capture.norms import name_norms
from gainstage.capture.pads import fold_padding
from gainstage.capture.products import name_contractions
from gainstage.capture.refusal import unknown_size
from gainstage.capture.regions import Dataflow, fuse_parametrizations, fuse_regions, resized, unsized
from gainstage.capture.rows import choose_rows
from gainstage.capture.softmaxes import name_softmaxes
from gainstage.errors import CaptureError, NonFiniteError, NoSignalError
from gainstage.graph import Graph, Node, NodeKind, ParameterInfo, Ref, Region, TensorMeta, dense, followed_uses


def assemble(
    functional: Lowered,
    model: nn.Module,
    parameters: Mapping[str, ParameterInfo],
    *,
    rung: str,
    refusals: Sequence[str],
    choices: Sequence[str],
    assumptions: Sequence[str],
    with_gradient: frozenset[str],
    draw: int,
) -> Graph:
    """The graph of a model.

    Args:
        functional: nodes of which none changes an operand.
        model: the module itself, for its mode and the types of its modules.
        parameters: canonical name -> info.
        rung: how the nodes were obtained.
        refusals: why they were not obtained by another rung.
        choices: where the run looked at values that could have been others.
        assumptions: what else had to be assumed so far.
        with_gradient: parameters that autograd is known to reach.
        draw: of the random numbers of a run.

    Returns:
        The graph.

    Raises:
        CaptureError: a size that depends on values, a constant that cannot be computed, a parameter lost on the way.
        NoSignalError: no floating-point output depends on a parameter.
        NonFiniteError: NaN in a buffer that the outputs depend on.
    """
    live = _inside_regions(functional)
    nodes, found, guesses = _fused(functional, live)
    if live and _finds_places(nodes):
        nodes, found, guesses = _fused(functional, ())
    functional = found
    _check_sizes(nodes)
    _check_buffers(nodes, model)
    varying = {node.name for node in nodes if node.kind is not NodeKind.CONSTANT}
    outputs = tuple(name for name in functional.outputs if name in varying)
    _check_reached(nodes, outputs, with_gradient)
    _check_signal(nodes, outputs)
    uses, not_followed = followed_uses(nodes)
    return Graph(
        nodes=tuple(nodes),
        outputs=outputs,
        parameters=parameters,
        calls=module_calls(functional, varying, model),
        training=model.training,
        rung=rung,
        draw=draw,
        refusals=tuple(refusals),
        has_choices=bool(choices),
        assumptions=(*assumptions, *choices, *refusals, *guesses, *not_followed),
        guesses=tuple(guesses),
        uses=uses,
    )


def _inside_regions(functional: Lowered) -> set[str]:
    """Places where conditions hold that only operations which are sampled as one read: they need not be those of the run."""
    if not functional.seen:
        return set()
    nodes, _, _ = _fused(functional, functional.seen.keys())
    return {inner.name for node in nodes if isinstance(node.op, Region) for inner in node.op.nodes} & functional.seen.keys()


def _finds_places(nodes: Sequence[Node]) -> bool:
    return any(node.op is torch.ops.aten.nonzero_numpy.default for node in nodes)


def _fused(functional: Lowered, live: Collection[str]) -> tuple[list[Node], Lowered, list[str]]:
    """Nodes whose constants are computed and whose regions are one operation each; and what had to be guessed.

    Places where conditions hold are those of the run, but for the ``live`` ones.
    """
    nodes = _by_shape(_without_empty_pieces(_settled(functional, live)))
    nodes = reachable(resized(nodes) if live else nodes, functional)
    nodes, guesses = fold(nodes, functional.outputs, unsized(Dataflow(nodes)) if live else ())
    marked = {name for name, marks in functional.marks.items() if marks}
    nodes = name_contractions(name_softmaxes(name_masks(fold_padding(choose_rows(nodes)))), {*functional.outputs, *marked})
    nodes = reachable(name_norms(fuse_parametrizations(reachable(nodes, functional))), functional)
    nodes, names = fuse_regions(nodes, functional.outputs, marked)
    functional = dataclasses.replace(functional, outputs=names)
    return reachable(nodes, functional), functional, guesses


def _settled(functional: Lowered, live: Collection[str]) -> list[Node]:
    """Nodes with the places that the run saw as constants."""
    return [
        dataclasses.replace(node, kind=NodeKind.CONSTANT, op=None, args=(), kwargs={}, value=functional.seen[node.name])
        if node.name in functional.seen and node.name not in live
        else node
        for node in functional.nodes
    ]


def value_of(lowered: Lowered, name: str) -> torch.Tensor | None:
    """Value of a node that is computed from known values alone; None if it is not, or cannot be computed."""
    try:
        functional = functionalise(dataclasses.replace(lowered, outputs=[name], marks={}))
        nodes, _ = fold(reachable(functional.nodes, functional), functional.outputs)
    except (NotFunctional, CaptureError):
        return None
    return {node.name: node.value for node in nodes}.get(functional.outputs[0])


def reachable(nodes: Sequence[Node], lowered: Lowered) -> list[Node]:
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


def _without_empty_pieces(nodes: Sequence[Node]) -> list[Node]:
    """Concatenations without what has no entries, as parameters of size zero have none."""
    metas = {node.name: node.meta for node in nodes}

    def is_empty(piece: Ref) -> bool:
        meta = metas[piece.name]
        return isinstance(meta, TensorMeta) and 0 in meta.shape

    return [
        dataclasses.replace(node, args=([piece for piece in node.args[0] if not is_empty(piece)], *node.args[1:]))
        if node.op is torch.ops.aten.cat.default and not is_empty(Ref(node.name))
        else node
        for node in nodes
    ]


_SHAPED = {
    torch.ops.aten.expand_as.default: torch.ops.aten.expand.default,
    torch.ops.aten.view_as.default: torch.ops.aten.view.default,
    torch.ops.aten.reshape_as.default: torch.ops.aten.reshape.default,
}


def _by_shape(nodes: Sequence[Node]) -> list[Node]:
    """Operations that take nothing but the shape of an operand, with that shape: they do not depend on its values."""
    return [
        dataclasses.replace(node, op=_SHAPED[node.op], args=(node.args[0], list(node.meta.shape)))
        if node.op in _SHAPED and isinstance(node.meta, TensorMeta) and UNKNOWN_SIZE not in node.meta.shape
        else node
        for node in nodes
    ]


def _check_sizes(nodes: Sequence[Node]) -> None:
    for node in nodes:
        for meta in node.meta if isinstance(node.meta, tuple) else (node.meta,):
            if meta is not None and UNKNOWN_SIZE in meta.shape:
                raise unknown_size(node.op_name, node.provenance)


def _check_buffers(nodes: Sequence[Node], model: nn.Module) -> None:
    """Infinity is what masks are made of; NaN is never meant."""
    names = {f"b_{name.replace('.', '_')}": name for name, _ in model.named_buffers()}
    spoiled = [
        names[node.name]
        for node in nodes
        if node.name in names and node.value is not None and not node.value.is_meta and bool(dense(node.value).isnan().any())
    ]
    if spoiled:
        raise NonFiniteError(f"NaN in buffer(s) {', '.join(spoiled)}: load or compute them before the model is looked at.")


def _check_reached(nodes: Sequence[Node], outputs: Sequence[str], with_gradient: frozenset[str]) -> None:
    reached = set(outputs)
    for node in reversed(nodes):
        if node.name in reached and node.op is not torch.ops.aten.detach.default:
            reached.update(node.operands())
    lost = sorted(with_gradient - {node.parameter for node in nodes if node.name in reached})
    if lost:
        raise CaptureError(f"the outputs depend on {', '.join(lost)} in a way that is no operation of torch")


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
