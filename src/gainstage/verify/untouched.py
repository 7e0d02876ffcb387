"""Run a model and leave it as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gainstage.graph import held
from gainstage.graph.attributes import same_attributes


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass leaves behind: buffers, parameters written in place, attributes, generators, fast paths.

    Buffers are copied beforehand; a parameter only when an operation is about to write to it, as that hardly ever happens and
    a copy of all would double the model's memory.
    """
    guard = _WriteGuard([*model.parameters()])
    dense = [buffer for buffer in model.buffers() if buffer.layout is torch.strided]  # others are not written in place
    buffers = [(buffer, buffer.data, buffer.detach().clone()) for buffer in dense]
    parameters = [(parameter, parameter.data, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with torch.no_grad(), same_attributes(model), _same_randomness(model), _plain_attention():
        try:
            with guard:
                yield
        finally:
            for parameter, data, requires_grad, grad in parameters:
                if _is_elsewhere(parameter, data):
                    parameter.data = data
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            guard.restore()
            for buffer, data, values in buffers:
                if _is_elsewhere(buffer, data):
                    buffer.data = data
                buffer.copy_(values)


def _is_elsewhere(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    return bool(held(tensor).data_ptr() != held(data).data_ptr())


class _WriteGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Saves a parameter before an operation writes to its memory."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters: dict[int, list[nn.Parameter]] = {}
        for parameter in parameters:
            self._parameters.setdefault(held(parameter).untyped_storage().data_ptr(), []).append(parameter)
        self._saved: list[tuple[nn.Parameter, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        if schema.is_mutable:
            named = kwargs or {}
            for position, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._save(args[position] if position < len(args) else named.get(argument.name))
        return func(*args, **(kwargs or {}))

    def _save(self, target: Any) -> None:
        for tensor in target if isinstance(target, (list, tuple)) else (target,):
            if isinstance(tensor, torch.Tensor):
                for parameter in self._parameters.pop(held(tensor).untyped_storage().data_ptr(), ()):
                    self._saved.append((parameter, parameter.detach().clone()))

    def restore(self) -> None:
        for parameter, values in self._saved:
            parameter.copy_(values)


@contextlib.contextmanager
def _same_randomness(model: nn.Module) -> Iterator[None]:
    """Put back the state of torch's generators, NumPy's and Python's, and of generators that modules hold."""
    own = [
        (value, value.get_state())
        for module in model.modules()
        for value in module.__dict__.values()
        if isinstance(value, torch.Generator)
    ]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (the state that models draw from, not ours)
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in own:
            generator.set_state(state)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep torch.nn's transformers from merging a layer into one inference operation, past the modules that it consists of."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
