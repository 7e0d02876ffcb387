"""One real forward pass: the second moment of every tensor that a module call returns, and what every softmax looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gainstage.apply.pieces import sharded_again
from gainstage.errors import InputError
from gainstage.graph import tensor_leaves, whole
from gainstage.verify.untouched import untouched

FEW_KEYS = 8  # a softmax over fewer entries may well put half of its weight on one
_QUERIES = 64  # rows of one attention that are looked at
_NEEDS_GRADIENTS = "does not require grad"  # what torch says of a derivative that is taken where none are recorded

CallKey = tuple[str, int]  # module path, number of the call


@dataclass(frozen=True, slots=True)
class Measurement:
    """One tensor: sums of its squares, so that parts of a batch can be put together.

    Args:
        shape: samples lie along the first dimension, or windows and heads of them, sample by sample.
        samples: size of the batch.
        squares: sum of the squares at each index of the first dimension, in float64, on the host.
    """

    shape: tuple[int, ...]
    samples: int
    squares: torch.Tensor

    @property
    def second_moment(self) -> float:
        """Mean of the squares."""
        return float(self._moments().mean())

    @property
    def sampling_error(self) -> float:
        """Relative sampling error of the second moment; 0 where unknown.

        Entries of one sample depend on each other; samples are independent given the weights. So the error is the deviation
        between the means of the samples over the square root of their number, widened for few samples (the deviation of
        Student's t with ``samples - 1`` degrees of freedom, which has none for less than four samples: then it is not
        widened). Over inputs, for this one draw of weights.
        """
        moments = self._moments()
        second = float(moments.mean())
        if len(moments) == 1 or second <= 0.0:
            return 0.0
        degrees = len(moments) - 1
        widening = (degrees / (degrees - 2)) ** 0.5 if degrees > 2 else 1.0
        error: float = moments.std().item() / second / len(moments) ** 0.5 * widening
        return error

    @property
    def is_finite(self) -> bool:
        """All entries are."""
        return self.second_moment < float("inf")

    def _moments(self) -> torch.Tensor:
        """Of each sample; of all entries where they cannot be told apart."""
        rows = self.samples if len(self.squares) % self.samples == 0 else 1
        return self.squares.reshape(rows, -1).sum(1) * (rows / math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class AttentionMeasurement:
    """One softmax with at least FEW_KEYS visible keys: averages over queries, for the module call that ran it."""

    path: str
    largest_weight: float
    logit_std: float
    keys: float


@dataclass(slots=True)
class Pass:
    """What one forward pass showed. ``calls``: by module call, in the order in which the calls returned."""

    calls: dict[CallKey, dict[int, Measurement]] = field(default_factory=dict)
    types: dict[CallKey, str] = field(default_factory=dict)
    attentions: list[AttentionMeasurement] = field(default_factory=list)
    first_losses: dict[int, tuple[float, float]] = field(default_factory=dict)


def run_forward(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    modules: Iterable[tuple[str, nn.Module]],
    look_at_output: Callable[[Mapping[int, torch.Tensor]], Mapping[int, tuple[float, float]]],
) -> Pass:
    """Run the model once, measure, and leave it as it was; once more where it differentiates inside of forward, as for forces.

    Args:
        model: in the mode that is to be measured.
        args: positional arguments of forward; the model gets copies.
        kwargs: keyword arguments of forward; the model gets copies.
        modules: what is measured, by path.
        look_at_output: is given the tensors that the model returns, by their place among them.

    Raises:
        InputError: forward failed; the message quotes the reason.
    """
    samples = samples_in(args, kwargs)

    def run(*, with_gradients: bool) -> Pass:
        found = Pass()
        copies = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, dict(kwargs)))
        with (
            untouched(model),
            _hooked(modules, found, samples) as stack,
            AttentionWatch(found, stack),
            sharded_again(model),
        ):
            try:
                with torch.set_grad_enabled(with_gradients):
                    output = model(*copies[0], **copies[1])
            except Exception as error:
                place = f" in module {stack[-1]!r}" if stack and stack[-1] else ""
                raise InputError(f"The forward pass failed{place}: {type(error).__name__}: {error}") from error
            found.first_losses.update(look_at_output(dict(enumerate(map(whole, tensor_leaves(output))))))
        return found

    try:
        return run(with_gradients=False)
    except InputError as error:
        if _NEEDS_GRADIENTS not in str(error.__cause__):
            raise
        return run(with_gradients=True)


def samples_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Size of the batch: of the first dimension of the first input that has one."""
    return next((leaf.shape[0] for leaf in tensor_leaves((args, dict(kwargs))) if leaf.dim() > 0), 1)


@contextmanager
def _hooked(modules: Iterable[tuple[str, nn.Module]], found: Pass, batch: int) -> Iterator[list[str]]:
    """Measure every module call; yields the stack of the modules that are running."""
    stack: list[str] = []
    counts: dict[str, int] = {}

    def enter_for(path: str) -> Any:
        def enter(_module: nn.Module, _args: Any) -> None:
            stack.append(path)

        return enter

    def leave_for(path: str) -> Any:
        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            stack.pop()
            call = counts[path] = counts.get(path, -1) + 1
            found.types[path, call] = f"{type(module).__module__}.{type(module).__qualname__}"
            found.calls[path, call] = {
                position: measure(tensor, batch)
                for position, tensor in enumerate(tensor_leaves(output))
                if tensor.is_floating_point() and tensor.numel() > 0
            }

        return leave

    handles = []
    for path, module in modules:
        handles += [module.register_forward_pre_hook(enter_for(path)), module.register_forward_hook(leave_for(path))]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def measure(tensor: torch.Tensor, samples: int) -> Measurement:
    """Squares of a tensor, summed at each index of its first dimension.

    Args:
        tensor: of at least one entry.
        samples: size of the batch.
    """
    x = whole(tensor.detach())
    rows = x.reshape(x.shape[0] if x.dim() else 1, -1)
    squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    return Measurement(tuple(x.shape), samples, squares.cpu())


class AttentionWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at the weights of every attention, whichever kernel computes it."""

    def __init__(self, found: Pass, stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found
        self._stack = stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        name = func._schema.name.partition("::")[2]
        if name in ("_softmax", "_safe_softmax") and args[0].dim() >= 3:
            self._look(whole(args[0].detach())[:1].movedim(args[1], -1))
        elif name.startswith("_scaled_dot_product_") and not name.endswith("_backward"):
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | named
            self._look(_some_logits({argument: whole(value) for argument, value in given.items()}))
        return result

    def _look(self, logits: torch.Tensor) -> None:
        """Logits [..., keys]; those that are masked are minus infinity, or as good as."""
        if logits.shape[-1] < FEW_KEYS:
            return
        rows = logits.reshape(-1, logits.shape[-1])
        rows = rows[:: max(len(rows) // (8 * _QUERIES), 1)].to(torch.float32)
        visible = rows > torch.finfo(logits.dtype).min / 4
        rows, visible = rows[visible.sum(1) >= FEW_KEYS], visible[visible.sum(1) >= FEW_KEYS]
        if not len(rows) or not bool(rows[visible].isfinite().all()):
            return
        keys = visible.sum(1)
        weights = rows.masked_fill(~visible, -torch.inf).softmax(1)
        centred = (rows - (rows.where(visible, 0.0).sum(1) / keys)[:, None]).where(visible, 0.0)
        variance = float((centred.square().sum(1) / keys).mean())
        path = self._stack[-1] if self._stack else ""
        largest = float(weights.amax(1).mean())
        self._found.attentions.append(AttentionMeasurement(path, largest, variance**0.5, float(keys.double().mean())))


def _some_logits(given: Mapping[str, Any]) -> torch.Tensor:
    """Logits of the first sample and some queries, from the arguments of a fused attention."""
    q, k = given["query"].detach()[:1].float(), given["key"].detach()[:1].float()
    rows = torch.arange(0, q.shape[-2], max(q.shape[-2] // _QUERIES, 1), device=q.device)
    if q.dim() == 4 and k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scale = given.get("scale") or q.shape[-1] ** -0.5
    logits: torch.Tensor = (q[..., rows, :] @ k.transpose(-1, -2)) * scale
    mask = given.get("attn_mask", given.get("attn_bias"))
    if mask is not None:
        shown = mask[:1].expand(*mask[:1].shape[:-2], q.shape[-2], k.shape[-2])[..., rows, :]
        logits = logits.masked_fill(~shown, -torch.inf) if shown.dtype == torch.bool else logits + shown
    if given.get("is_causal"):
        logits = logits.masked_fill(rows[:, None] < torch.arange(k.shape[-2], device=q.device), -torch.inf)
    return logits
