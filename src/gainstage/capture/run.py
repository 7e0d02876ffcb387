"""One run of a model on a tape, on a copy: nothing of the model, its inputs or the generators of random numbers changes.

What is drawn during the run (a layer that is dropped) may leave parameters out; then other draws are tried, and the run that
reaches most parameters is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gainstage.capture.calls import canonical_paths
from gainstage.capture.lowered import Lowered
from gainstage.capture.recorder import recording
from gainstage.capture.refusal import refusal
from gainstage.capture.surroundings import Request, copied, marked_calls, on_device_of, plain_modules, quiet, seeded
from gainstage.capture.tape import Read, Tape
from gainstage.errors import GainstageError
from gainstage.graph import NodeKind
from gainstage.graph.attributes import hookable
from gainstage.graph.flatten import tensor_leaves

# Runs at most, where random numbers decide which way a run goes; and after how many one will do that reached all that any did: a
# layer dropped one time in five is missing from as many with a chance of 1/600.
_DRAWS, _ENOUGH = 8, 4


@dataclass(frozen=True, slots=True)
class Recording:
    """A graph with writes still in place, where the run looked at values, and which parameters autograd gives a gradient.

    ``draw``: of the random numbers of the run.
    """

    lowered: Lowered
    reads: tuple[Read, ...]
    reached: frozenset[str]
    draw: int


def run_on_tape(request: Request) -> Recording:
    """Record a run of a model on its inputs; on the meta device without values, but for those that are known.

    Returns:
        The recorded graph. Where random numbers decided which way the run went, that of the draw that reaches most parameters.

    Raises:
        CaptureError: the model does not run on these inputs.
    """
    best: Recording | None = None
    reached: frozenset[str] = frozenset()  # by any run
    for seed in range(_DRAWS) if request.draw is None else [request.draw]:
        made = _record(request, seed)
        reached |= made.reached
        if best is None or len(made.reached) > len(best.reached):
            best = made
        if len(best.reached) == len(set(request.names.values())) or not _is_decided_by_draws(made):
            break
        if seed + 1 >= _ENOUGH and best.reached == reached:
            break
    assert best is not None
    return best


def _record(request: Request, seed: int) -> Recording:
    tape = Tape(Lowered(request.names, canonical_paths(request.model)))
    model, given_args, given_kwargs = copied(request.model, request.args, request.kwargs)
    args, kwargs, _ = on_device_of(model, given_args, given_kwargs)
    _hold_sources(tape, request, model, (args, kwargs))
    stance = torch.compiler.set_stance("force_eager")
    with quiet(), seeded(seed), plain_modules(), stance, stacked(tape, model), marked_calls(model, request.loss, tape.mark):
        outputs = _run(tape, model, args, kwargs)
    tape.lowered.outputs = [tape.refer(tensor) for tensor in outputs]
    leaves = _with_gradient(outputs)
    reached = [request.names[name] for name, parameter in model.named_parameters() if id(parameter) in leaves]
    return Recording(tape.lowered, tuple(tape.reads), frozenset(reached), seed)


def _run(tape: Tape, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    try:
        # unoptimized: what has run before may run with its gradients cut off, to be computed in another way
        with torch.enable_grad(), torch.jit.optimized_execution(False), recording(tape):  # type: ignore[attr-defined]
            outputs = tensor_leaves(model(*args, **kwargs))
    except GainstageError:
        raise
    except Exception as error:
        raise refusal(error) from error
    return outputs


def _hold_sources(tape: Tape, request: Request, model: nn.Module, fed: Any) -> None:
    """Put parameters, buffers and inputs in front, under the names that torch.export gives them."""
    originals = dict(request.model.named_buffers(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = request.names[name]
        base = tape.lowered.parameters.get(canonical) or tape.name(f"p_{name.replace('.', '_')}")
        tape.hold(parameter, tape.lowered.add_parameter(base, canonical, parameter).name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        value = request.buffers.get(name, originals[name]) if buffer.is_meta else originals[name]
        tape.hold_source(buffer, tape.name(f"b_{name.replace('.', '_')}"), value, name.rpartition(".")[0])
    values = tensor_leaves((request.args, request.kwargs))
    for name, tensor, value in zip(_input_names(request), tensor_leaves(fed), values, strict=True):
        tape.hold_source(tensor, tape.name(name), value, is_input=True)


def _input_names(request: Request) -> Iterator[str]:
    """A name for each tensor that is fed: that of the argument it comes in."""
    names = list(inspect.signature(request.model.forward).parameters)
    for position, argument in enumerate(request.args):
        yield from (names[min(position, len(names) - 1)] for _ in tensor_leaves(argument))
    for name, argument in request.kwargs.items():
        yield from (name for _ in tensor_leaves(argument))


def _with_gradient(outputs: list[torch.Tensor]) -> set[int]:
    """Ids of the leaves that autograd would give a gradient to."""
    waiting = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen = set(waiting)
    found = {id(tensor) for tensor in outputs if tensor.requires_grad and tensor.grad_fn is None}
    while waiting:
        function = waiting.pop()
        if (leaf := getattr(function, "variable", None)) is not None:
            found.add(id(leaf))
        for following, _ in function.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _is_decided_by_draws(made: Recording) -> bool:
    """Whether the run looked at random numbers: not at data that these were mixed with, such as what dropout left of it."""
    random_: set[str] = set()
    data: set[str] = set()
    for node in made.lowered.nodes:
        if node.kind in (NodeKind.PARAMETER, NodeKind.INPUT) or any(name in data for name in node.operands()):
            data.add(node.name)
        elif node.may_draw or any(name in random_ for name in node.operands()):
            random_.add(node.name)
    return any(read.name in random_ for read in made.reads)


@contextmanager
def stacked(tape: Tape, model: nn.Module) -> Iterator[None]:
    """Tell a tape which module calls it is in."""
    counts: dict[str, int] = {}
    handles = []

    def hooks_for(path: str) -> tuple[Any, Any]:
        def enter(_module: nn.Module, _args: Any) -> None:
            call = counts[path] = counts.get(path, -1) + 1
            tape.stack.append((path, call))

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            tape.stack.pop()

        return enter, leave

    for path, module in hookable(model):
        enter, leave = hooks_for(path)
        tape.types[path] = f"{type(module).__module__}.{type(module).__qualname__}"
        handles += [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
