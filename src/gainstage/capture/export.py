"""Runs torch.export and leaves the model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.fx import proxy
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils import _pytree as pytree

from gainstage.capture.lowered import CallMark
from gainstage.capture.provenance import UserFrame
from gainstage.capture.refusal import refusal
from gainstage.capture.surroundings import Request, marked_calls, on_device_of, past_kept, plain_modules, quiet, seeded
from gainstage.errors import GainstageError
from gainstage.graph.attributes import same_attributes

CALL_MARKS = "gainstage_calls"  # key in the meta of an exported node: which outputs of which module calls it is


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported program, with the tensors that the user fed, in the order of its inputs (None for what is no tensor).

    ``buffers``: values of buffers that are on the meta device in the program, by name.
    """

    program: ExportedProgram
    inputs: tuple[torch.Tensor | None, ...]
    buffers: Mapping[str, torch.Tensor]


def export(request: Request) -> Exported:
    """Trace a model with torch.export, non-strict, marking what each module call returns.

    Raises:
        CaptureError: torch.export refused; the message quotes the user's line.
    """
    model, loss = request.model, request.loss
    args, kwargs, originals = on_device_of(model, request.args, request.kwargs)
    with (
        past_kept(),
        seeded(0),
        same_attributes(model),
        marked_calls(model, loss, _mark),
        plain_modules(),
        _all_user_frames(),
        torch.enable_grad(),
        _use_lazy_graph_module(True),  # nobody runs the program, so its code need not be written and compiled at each step
        quiet(),
    ):
        try:
            program = torch.export.export(model, args, kwargs, strict=False)
        except GainstageError:
            raise
        except Exception as error:
            raise refusal(error) from error
    leaves = pytree.tree_leaves(program.example_inputs)
    inputs = tuple(originals.get(id(x), x) if isinstance(x, torch.Tensor) else None for x in leaves)
    return Exported(program, inputs, request.buffers)


def decompose(exported: Exported) -> Exported:
    """The same program after torch's functionalisation, with all operations kept as they are; marks are lost."""
    with quiet():
        return Exported(exported.program.run_decompositions({}), exported.inputs, exported.buffers)


@contextlib.contextmanager
def _all_user_frames() -> Iterator[None]:
    """Let nodes remember the innermost line of the user's code; torch keeps only the lines of functions named forward."""
    record, filtered = proxy.CapturedTraceback, proxy.TracerBase._filter_traceback_frames  # type: ignore[attr-defined]
    proxy.CapturedTraceback = UserFrame  # type: ignore[attr-defined, assignment]
    proxy.TracerBase._filter_traceback_frames = lambda _tracer, frames: frames  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        proxy.CapturedTraceback = record  # type: ignore[attr-defined]
        proxy.TracerBase._filter_traceback_frames = filtered  # type: ignore[method-assign]


def _mark(tensor: torch.Tensor, mark: CallMark) -> None:
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    if slot is not None:
        slot.proxy.node.meta.setdefault(CALL_MARKS, []).append(mark)
