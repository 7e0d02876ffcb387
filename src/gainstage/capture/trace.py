"""Runs torch.export and leaves the model as it was."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.proxy import TracerBase
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from gainstage.capture.provenance import user_frames
from gainstage.capture.refusal import refusal
from gainstage.errors import GainstageError, InputError
from gainstage.graph.flatten import tensor_leaves

Loss = Callable[[Any], torch.Tensor]

CALL_MARKS = "gainstage_calls"  # key in the meta of an exported node: which outputs of which module calls it is


@dataclass(frozen=True, slots=True)
class CallMark:
    """An exported node is tensor number ``position`` of what call number ``call`` of the module ``path`` returned."""

    path: str
    call: int
    position: int


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported program, with the tensors that the user fed, in the order of its inputs (None for what is no tensor).

    ``buffers``: values of buffers that are on the meta device in the program, by name.
    """

    program: ExportedProgram
    inputs: tuple[torch.Tensor | None, ...]
    buffers: Mapping[str, torch.Tensor]


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Loss | None, buffers: Mapping[str, torch.Tensor]
) -> Exported:
    """Trace a model with torch.export, non-strict, marking what each module call returns.

    Args:
        model: on any device, meta included, in the mode that is to be traced.
        args: positional arguments of forward; tensors in any nesting.
        kwargs: keyword arguments of forward.
        loss: applied to the output, in whose place its result comes.
        buffers: values of buffers on the meta device, by name.

    Returns:
        The program and the inputs.

    Raises:
        InputError: arguments that forward does not take, or tensors of size zero.
        CaptureError: torch.export refused; the message quotes the user's line.
    """
    _check_arguments(model, args, kwargs)
    fed_args, fed_kwargs, originals = _on_device_of(model, args, dict(kwargs))
    with _untouched(model), _marked_calls(model, loss), _plain_attention(), _all_user_frames(), torch.enable_grad(), _quiet():
        try:
            program = torch.export.export(model, fed_args, fed_kwargs, strict=False)
        except GainstageError:
            raise
        except Exception as error:
            raise refusal(error) from error
    leaves = pytree.tree_leaves(program.example_inputs)
    inputs = tuple(originals.get(id(x), x) if isinstance(x, torch.Tensor) else None for x in leaves)
    return Exported(program, inputs, buffers)


def decompose(exported: Exported) -> Exported:
    """The same program after torch's functionalisation, with all operations kept as they are; marks are lost."""
    with _quiet():
        return Exported(exported.program.run_decompositions({}), exported.inputs, exported.buffers)


def _check_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{type(model).__name__}.forward does not take these arguments: {error}.") from error
    for position, leaf in enumerate(tensor_leaves((args, dict(kwargs)))):
        if leaf.numel() == 0:
            raise InputError(f"Input tensor {position} has size zero, shape {tuple(leaf.shape)}; pass one with entries.")
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        _register_dataclasses(leaf)


def _register_dataclasses(leaf: Any) -> None:
    """Make a user's dataclass known to pytree, inner ones first: export takes no input that it cannot flatten."""
    if is_dataclass(leaf) and not isinstance(leaf, type):
        for member in leaf.__dataclass_fields__:
            for inner in pytree.tree_leaves(getattr(leaf, member)):
                _register_dataclasses(inner)
        if type(leaf) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(leaf))


def _on_device_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, torch.Tensor]]:
    """For a model on meta, shadow real inputs by meta tensors; also return shadow id -> real tensor."""
    originals: dict[int, torch.Tensor] = {}
    if {parameter.device.type for parameter in model.parameters()} != {"meta"}:
        return args, kwargs, originals
    shadows = []  # keeps the ids alive until they are looked up

    def shadow(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_meta:
            return leaf
        shadows.append(leaf.to("meta"))
        originals[id(shadows[-1])] = leaf
        return shadows[-1]

    shadowed = pytree.tree_map(shadow, (args, kwargs))
    return shadowed[0], shadowed[1], originals


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Undo what forward stores on modules: a traced attribute would be a tensor without values."""
    registries = ("_parameters", "_buffers", "_modules")
    before = [
        (module, dict(module.__dict__), {name: dict(module.__dict__[name]) for name in registries}) for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, entries in contents.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(entries)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back warnings of changes to come in torch itself, and the graph that it prints when it fails."""
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
        warnings.simplefilter("ignore")
        yield
    sys.stderr.write(printed.getvalue())  # reached on success only: what the model itself had to say


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep torch.nn's transformers from merging a layer into one inference operation, and from looking into a mask.

    They look whether a mask is the causal one, to take a shortcut with the same result; a trace cannot know.
    """
    enabled, detect = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True  # noqa: ARG005
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        transformer._detect_is_causal_mask = detect


@contextlib.contextmanager
def _all_user_frames() -> Iterator[None]:
    """Let nodes remember the innermost line of the user's code; torch keeps only the lines of functions named forward."""
    original = TracerBase._filter_traceback_frames
    TracerBase._filter_traceback_frames = lambda _tracer, frames: user_frames(frames)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        TracerBase._filter_traceback_frames = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _marked_calls(model: nn.Module, loss: Loss | None) -> Iterator[None]:
    """Hook every module while it is traced, so that nodes remember the module calls that returned them.

    The hook of the root returns the tensors of the output alone, so that no output class has to be known to export.
    """
    counts: dict[str, int] = {}

    def hook_for(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> list[torch.Tensor] | None:
            call = counts[path] = counts.get(path, -1) + 1
            tensors = tensor_leaves(output)
            for position, tensor in enumerate(tensors):
                _mark(tensor, CallMark(path, call, position))
            if path:
                return None
            return tensors if loss is None else [_scalar(loss(output))]

        return hook

    handles = [module.register_forward_hook(hook_for(path)) for path, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scalar(loss: Any) -> torch.Tensor:
    if isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.is_floating_point():
        return loss
    shown = f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    raise InputError(f"The loss returned {shown}, not a single number; reduce it: loss=lambda y: F.cross_entropy(y, target)")


def _mark(tensor: torch.Tensor, mark: CallMark) -> None:
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    if slot is not None:
        slot.proxy.node.meta.setdefault(CALL_MARKS, []).append(mark)
