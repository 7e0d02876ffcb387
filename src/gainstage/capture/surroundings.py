"""What holds while a model is traced, whichever way: arguments checked, marks on module calls, nothing left behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import io
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from gainstage.capture.lowered import CallMark
from gainstage.errors import CaptureError, InputError
from gainstage.graph.attributes import hookable
from gainstage.graph.flatten import tensor_leaves

Loss = Callable[[Any], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be captured: a module, the arguments of one call, and what stands for the output (``loss``).

    ``buffers``: values of buffers that lie on the meta device, by name. ``names``: parameter name -> canonical name. ``draw``: of
    the random numbers of a run, where an earlier look at the model has found the one to take.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Loss | None
    buffers: Mapping[str, torch.Tensor]
    names: Mapping[str, str]
    draw: int | None = None


def check_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse what forward does not take.

    Raises:
        InputError: arguments that forward does not take, or tensors of size zero.
    """
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


def on_device_of(
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


def copied(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Copies that share nothing with the originals; results of earlier computations that lie around are copied as values.

    Raises:
        CaptureError: something that Python cannot copy.
    """
    attributes = [value for module in model.modules() for value in module.__dict__.values()]
    computed = [tensor for tensor in tensor_leaves((attributes, args, dict(kwargs))) if not tensor.is_leaf]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in computed}
    try:
        copies: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] = copy.deepcopy((model, args, dict(kwargs)), memo)
    except Exception as error:
        raise CaptureError(f"the model or an input cannot be copied: {type(error).__name__}: {error}") from error
    return copies


@contextlib.contextmanager
def past_kept() -> Iterator[None]:
    """What is there already is left out of collections of garbage: each would look through all modules of all libraries."""
    if gc.get_freeze_count() > 0:  # the caller's own, which would not be put back, or that of another thread
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings of changes to come in torch itself, and what it prints and logs when it fails."""
    printed = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    sys.stderr.write(printed.getvalue())  # reached on success only: what the model itself had to say


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same random numbers in each trace; the generators of torch, NumPy and Python are put back where they were."""
    devices = range(torch.cuda.device_count())
    host, host_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that models draw from
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(host)
            np.random.set_state(host_numpy)  # noqa: NPY002


@contextlib.contextmanager
def plain_modules() -> Iterator[None]:
    """Keep torch's own modules from shortcuts that hide what is computed.

    Transformer layers merge into one inference operation, and look whether a mask is the causal one to take a shortcut with the
    same result, which a trace cannot know. A reentrant checkpoint runs without gradients, and runs again for the backward pass.
    """
    enabled, detect = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True  # noqa: ARG005
    CheckpointFunction.apply = lambda function, _preserve, *args: function(*args)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CheckpointFunction.apply  # that of its base class shows again
        torch.backends.mha.set_fastpath_enabled(enabled)
        transformer._detect_is_causal_mask = detect


@contextlib.contextmanager
def marked_calls(model: nn.Module, loss: Loss | None, mark: Callable[[torch.Tensor, CallMark], None]) -> Iterator[None]:
    """Hook every module while it is traced, so that ``mark`` is told of each tensor that a module call returns.

    The hook of the root returns the tensors of the output alone, so that no output class has to be known to export.
    """
    counts: dict[str, int] = {}

    def hook_for(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> list[torch.Tensor] | None:
            call = counts[path] = counts.get(path, -1) + 1
            tensors = tensor_leaves(output)
            for position, tensor in enumerate(tensors):
                mark(tensor, CallMark(path, call, position))
            if path:
                return None
            return tensors if loss is None else [_scalar(loss(output))]

        return hook

    handles = [module.register_forward_hook(hook_for(path)) for path, module in hookable(model)]
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
