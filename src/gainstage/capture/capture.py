"""The stage itself: a module and example inputs in, a graph out, by the first rung of a ladder that holds.

Rung "export" follows the code without values: what torch.export finds. Rung "tape" is one real run of a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from gainstage.capture.assemble import assemble
from gainstage.capture.calls import canonical_paths, marks_by_readers
from gainstage.capture.export import decompose, export
from gainstage.capture.functional import NotFunctional, functionalise
from gainstage.capture.lower import lower
from gainstage.capture.lowered import Lowered
from gainstage.capture.outline import outline
from gainstage.capture.parameters import parameter_table, with_shapes
from gainstage.capture.refusal import all_refused
from gainstage.capture.run import Recording, run_on_tape
from gainstage.capture.shapes import Unclear
from gainstage.capture.surroundings import Request, check_arguments
from gainstage.errors import CaptureError
from gainstage.graph import Graph, NodeKind


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
    like: Graph | None = None,
) -> Graph:
    """Capture a model as a graph, in the mode (train or eval) that it is in; the model stays as it is.

    Args:
        model: any module; its parameters may lie on the meta device.
        args: positional arguments of forward; tensors, also nested in containers and dataclasses.
        kwargs: keyword arguments of forward.
        loss: what becomes the only output of the graph: the model's output -> a scalar.
        buffers: values of buffers that lie on the meta device, by name; others are guessed.
        like: a graph of this model with other values; rungs that refused it are not tried again, nor other draws of a run.

    Returns:
        The graph: no writes in place, ties resolved, constants computed.

    Raises:
        CaptureError: torch.export cannot follow the model; the message quotes the line.
        UnsupportedParameterError: parameters that no level can be set for.
        InputError: arguments that forward does not take, tensors of size zero, a loss that returns no scalar.
        NoSignalError: no floating-point output depends on a parameter.
    """
    given = dict(kwargs or {})
    check_arguments(model, args, given)
    model, assumptions = with_shapes(model, args, given)
    parameters, names = parameter_table(model)
    request = Request(
        model=model, args=tuple(args), kwargs=given, loss=loss, buffers=buffers or {}, names=names,
        draw=None if like is None else like.draw,
    )  # fmt: skip
    refused: dict[str, CaptureError] = {}
    for rung in RUNGS if like is None else [like.rung]:
        try:
            found = RUNGS[rung](request)
            return assemble(
                found.lowered, model, parameters, rung=rung, refusals=_reasons(refused) if like is None else like.refusals,
                choices=found.choices, assumptions=[*assumptions, *dict.fromkeys(found.assumptions)],
                with_gradient=found.with_gradient, draw=found.draw,
            )  # fmt: skip
        except CaptureError as error:
            refused[rung] = error
    raise all_refused(refused)


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What a rung found: nodes without writes, where values chose the way, and the parameters that autograd is known to reach.

    ``draw``: of the random numbers of the run, where there was one. ``assumptions``: what else was taken to hold.
    """

    lowered: Lowered
    choices: Sequence[str] = ()
    with_gradient: frozenset[str] = frozenset()
    draw: int = 0
    assumptions: Sequence[str] = ()


def by_export(request: Request) -> Found:
    """What torch.export finds: by an outline where that can tell.

    Where our way of undoing writes does not suffice, after torch's own.
    """
    with suppress(Unclear, NotFunctional):
        found = outline(request)
        return Found(functionalise(found.lowered), assumptions=found.assumptions)
    exported, paths = export(request), canonical_paths(request.model)
    try:
        return Found(functionalise(lower(exported, request.names, paths)))
    except NotFunctional:
        decomposed = lower(decompose(exported), request.names, paths)  # takes as long as the export
    return Found(_without_writes(dataclasses.replace(decomposed, marks=marks_by_readers(decomposed))))


def by_tape(request: Request) -> Found:
    """What a run does, and where it looked at values that could have been others."""
    recording = run_on_tape(request)
    return Found(_without_writes(recording.lowered), _one_path(recording), recording.reached, recording.draw)


RUNGS: Mapping[str, Callable[[Request], Found]] = {"export": by_export, "tape": by_tape}


def _reasons(refused: Mapping[str, CaptureError]) -> list[str]:
    """Why a lower rung was needed."""
    return [
        f"Captured from one run, since torch.{rung} refused: {error.reason.partition('. ')[0]}."
        for rung, error in refused.items()
    ]


def _without_writes(lowered: Lowered) -> Lowered:
    try:
        return functionalise(lowered)
    except NotFunctional as error:
        raise CaptureError(
            f"{error.node.op_name} in {error.node.provenance} writes in place in a way that has no value form. "
            "Use the operation's ordinary form there."
        ) from None


def _one_path(recording: Recording) -> list[str]:
    """Where a run looked at values that other parameters, inputs or random numbers would change, one sentence for each line."""
    varying: set[str] = set()
    for node in recording.lowered.nodes:
        if node.kind in (NodeKind.PARAMETER, NodeKind.INPUT) or node.may_draw or any(n in varying for n in node.operands()):
            varying.add(node.name)
    lines = dict.fromkeys(read.source for read in recording.reads if read.name in varying)
    return [f"One path seen: the run looked at values in {line or 'code of torch'}." for line in lines]
