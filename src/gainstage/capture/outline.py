"""An outline of a model: it is followed as torch.export follows it, without values, in a quarter of the time.

Nothing is copied, and nothing of the model, its inputs or the generators of random numbers changes. Values that no parameter,
input or random number decides are computed where the model looks at them. Where others decide it is refused, as by torch.export;
for anything else that an outline does not have, torch.export takes its place.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch._export.utils import _compiling_state_context
from torch.utils import _pytree as pytree

from gainstage.capture.calls import canonical_paths
from gainstage.capture.lowered import CallMark, Lowered
from gainstage.capture.run import stacked
from gainstage.capture.shapes import Twins, Unclear, memory, outlining
from gainstage.capture.surroundings import Request, marked_calls, on_device_of, past_kept, plain_modules, quiet, seeded
from gainstage.capture.tape import Tape
from gainstage.errors import CaptureError
from gainstage.graph import NodeKind
from gainstage.graph.attributes import same_attributes
from gainstage.graph.flatten import tensor_leaves


@dataclass(frozen=True, slots=True)
class Outline:
    """A graph with writes still in place, and what had to be assumed, a sentence each."""

    lowered: Lowered
    assumptions: Sequence[str]


def outline(request: Request) -> Outline:
    """The nodes that torch.export would find, one for one, writes still in place.

    Raises:
        Unclear: what comes next depends on what an outline does not have, or the model fails.
        CaptureError: it depends on values that no one has.
    """
    model = request.model
    if any(isinstance(module, (torch.jit.ScriptModule, OptimizedModule)) for module in model.modules()):
        raise Unclear
    tape = Tape(Lowered(request.names, canonical_paths(model)))
    args, kwargs, originals = on_device_of(model, request.args, request.kwargs)
    twins = Twins(_home(model))
    _hold_sources(tape, twins, request, _fed(model, args, kwargs), originals)

    def mark(tensor: torch.Tensor, mark: CallMark) -> None:
        with torch._C.DisableTorchFunction():
            if tape.knows(twins.find(tensor)):
                tape.mark(twins.find(tensor), mark)

    with (
        past_kept(), quiet(), seeded(0), same_attributes(model), plain_modules(), torch.compiler.set_stance("force_eager"),
        torch.backends.cudnn.flags(enabled=False), stacked(tape, model), marked_calls(model, request.loss, mark),
    ):  # fmt: skip
        outputs = [twins.find(tensor) for tensor in _run(tape, twins, model, args, kwargs)]
    if not all(tape.knows(tensor) for tensor in outputs):
        raise Unclear
    tape.lowered.outputs = [tape.refer(tensor) for tensor in outputs]
    return Outline(tape.lowered, [f"Taken to find all well: {read.source or 'code of torch'}." for read in tape.reads])


def _home(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()} or {torch.device("cpu")}
    if len(devices) > 1:
        raise Unclear
    return devices.pop()


def _run(tape: Tape, twins: Twins, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    try:
        with torch.enable_grad(), _compiling_state_context(), outlining(tape, twins):
            return tensor_leaves(model(*args, **kwargs))
    except CaptureError:
        raise
    except Exception as error:
        raise Unclear from error  # torch.export will say why


def _hold_sources(
    tape: Tape, twins: Twins, request: Request, fed: Mapping[str, torch.Tensor], originals: Mapping[int, torch.Tensor]
) -> None:
    """Put parameters, buffers and inputs in front, under the names that torch.export gives them."""
    names = [tape.reserved(name) for name in fed]
    for name, parameter in request.model.named_parameters(remove_duplicate=False):
        canonical = request.names[name]
        base = tape.lowered.parameters.get(canonical) or tape.reserved(f"p_{_plain(name)}")
        twin = twins.make(parameter)
        tape.hold(twin, tape.lowered.add_parameter(base, canonical, twin).name)
        twins.varying.add(memory(twin))
    for name, buffer in request.model.named_buffers():
        value = request.buffers.get(name, buffer) if buffer.is_meta else buffer
        tape.hold_source(twins.make(buffer), tape.reserved(f"b_{_plain(name)}"), value, name.rpartition(".")[0])
    for name, tensor in zip(names, fed.values(), strict=True):
        twin = twins.make(tensor)
        if tape.knows(twin):
            raise Unclear  # fed twice, or a part of the model
        tape.hold_source(twin, name, originals.get(id(tensor), tensor), is_input=True)
        if tape.lowered.nodes[-1].kind is NodeKind.INPUT:
            twins.varying.add(memory(twin))


def _fed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that a user feeds, by the path that leads to each of them from an argument."""
    bound = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    leaves, _ = pytree.tree_flatten_with_path(bound)
    named = [(_plain("_".join(map(_key, path))), leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
    if len(dict(named)) < len(tensor_leaves((args, kwargs))):
        raise Unclear
    return dict(named)


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def _plain(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]", "_", name).lower()
