"""The modes of torch that see every operation of an outline: it computes shapes alone, and is written on a tape.

What a model holds and is fed stays as it is. An operation meets twins of it on the meta device, and what it returns says that it
lies where the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.overrides import TorchFunctionMode

from gainstage.capture.assemble import value_of
from gainstage.capture.checks import passing
from gainstage.capture.lowered import ASSERTIONS
from gainstage.capture.provenance import current_line
from gainstage.capture.recorder import DECISIONS, INDEXINGS, LEAVING, PLACES, READS, has_size_of_values
from gainstage.capture.refusal import BRANCHES, unknown_size
from gainstage.capture.tape import Read, Tape
from gainstage.errors import CaptureError
from gainstage.graph import short_name
from gainstage.graph.flatten import tensor_leaves

aten = torch.ops.aten
nondeterministic_seeded = torch.Tag.nondeterministic_seeded

_META = torch.device("meta")
_OWN: Any = torch.Tensor
_PLACES: Mapping[Any, Callable[[torch.device], Any]] = {
    _OWN.device.__get__: lambda home: home,
    _OWN.is_cpu.__get__: lambda home: home.type == "cpu",
    _OWN.is_cuda.__get__: lambda home: home.type == "cuda",
    _OWN.is_meta.__get__: lambda home: home.type == "meta",
}
_HANDLES = frozenset({_OWN.data.__get__, _OWN.requires_grad.__set__, _OWN.requires_grad_})  # what they do is done to the twin
_COPIES = {aten.lift_fresh.default: aten.lift_fresh_copy.default}  # what is written into a constant is not the constant's
# What reads or changes a tensor without being an operation.
_UNSEEN = LEAVING | {
    _OWN.data.__set__, _OWN.grad.__get__, _OWN.grad.__set__,
    _OWN.retain_grad, _OWN.register_hook, _OWN.backward, torch.autograd.grad, _OWN.__deepcopy__, _OWN.__reduce_ex__,
    _OWN.data_ptr, _OWN.storage, _OWN.untyped_storage, _OWN.set_, _OWN.share_memory_, _OWN.apply_, _OWN.map_, _OWN.map2_,
    _OWN.get_device, _OWN.cuda, _OWN.pin_memory, _OWN.new, _OWN.new_tensor, _OWN.module_load,
}  # fmt: skip


class Unclear(Exception):  # noqa: N818 - a signal to choose another way, not an error
    """An outline cannot tell how the model goes on."""


@dataclass(slots=True)
class Twins:
    """Tensors on the meta device in the place of those that a model holds and is fed; ``home`` is where it lies."""

    home: torch.device
    varying: set[int] = field(default_factory=set)  # memory that holds what parameters, inputs or random numbers decide
    _of: dict[int, torch.Tensor] = field(default_factory=dict)  # id of a tensor -> its twin
    _alive: list[torch.Tensor] = field(default_factory=list)  # so that no id is used twice
    _memory: set[int] = field(default_factory=set)

    def find(self, tensor: torch.Tensor) -> torch.Tensor:
        """The twin of a tensor, or the tensor itself if it has none."""
        return self._of.get(id(tensor), tensor)

    def make(self, tensor: torch.Tensor) -> torch.Tensor:
        """A twin of a tensor, or the one that it has.

        Raises:
            Unclear: it is no plain tensor, lies elsewhere, or shares its memory with another one.
        """
        if (known := self._of.get(id(tensor))) is not None:
            return known
        is_plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
        if not is_plain or memory(tensor) in self._memory or (tensor.dim() > 0 and tensor.device != self.home):
            raise Unclear
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)
        self._of[id(tensor)] = twin.requires_grad_(tensor.requires_grad)
        self._memory.add(memory(tensor))
        self._alive.append(tensor)
        return twin


def memory(tensor: torch.Tensor) -> int:
    """Which memory a tensor shows."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def outlining(tape: Tape, twins: Twins) -> Iterator[None]:
    """Write on a tape what would run inside."""
    with enable_python_dispatcher(), _Functions(tape, twins), _Shapes(tape, twins):
        yield


class _Functions(TorchFunctionMode):
    """Sees what is no operation: where a tensor lies, no_grad, and what an outline has no answer to."""

    def __init__(self, tape: Tape, twins: Twins) -> None:
        super().__init__()
        self._tape, self._twins = tape, twins

    def __torch_function__(self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _PLACES and args[0].is_meta:
            return _PLACES[func](self._twins.home)
        if func in _HANDLES:
            twin = met(self._tape, self._twins, args[0])
            with torch._C.DisableTorchFunction():
                return func(twin, *args[1:], **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            if torch.is_grad_enabled() != self._tape.is_tracked:  # inside of an autograd.Function
                raise Unclear
            self._tape.is_tracked = bool(args[0])
        elif func in _UNSEEN or isinstance(func, HigherOrderOperator) or (func is _OWN.type and len(args) == 1 and not kwargs):
            raise Unclear
        elif func is _OWN.__setitem__ and isinstance(args[2], (bool, int, float)) and self._twins.home.type == "cpu":
            args = (*args[:2], _number(args[2], args[0].dtype))
        return func(*args, **(kwargs or {}))


def _number(value: float, dtype: torch.dtype) -> torch.Tensor:
    """What torch makes of a number that is written into a tensor on the host, without an operation."""
    with torch._C._DisablePythonDispatcher():
        return torch.tensor(value, dtype=dtype, device="cpu")


class _Shapes(SchemaCheckMode):  # type: ignore[no-untyped-call]
    """Sees operations before autograd and before they are decomposed; only kin of this class may stand there."""

    def __init__(self, tape: Tape, twins: Twins) -> None:
        super().__init__()
        self.__dict__["_dispatch_key"] = DispatchKey.PreDispatch
        self._tape, self._twins, self._results = tape, twins, _Results(twins.home)

    def __torch_dispatch__(self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if short_name(func) in ASSERTIONS:
            return None
        func = _COPIES.get(func, func)
        if _is_transformed():
            raise Unclear
        with torch._C.DisableTorchFunction(), torch._C._DisablePythonDispatcher():
            if func in READS:
                return self._read(func, args)
            if deciding := _deciding(func, args):
                raise self._no_size(func, deciding)
            args, kwargs = _each(args, self._met), _each(kwargs or {}, self._met)
            written, named = self._tape.refer_all(args), self._tape.refer_all(kwargs)
            result = self._results.of(func, _each(args, _on_meta), _each(kwargs, _on_meta))
            self._tape.record(func, written, named, result)
            self._follow(func, tensor_leaves((args, kwargs)), tensor_leaves(result))
        return result

    def _follow(self, op: OpOverload, operands: list[torch.Tensor], results: list[torch.Tensor]) -> None:
        """Give up where gradients are cut off from what varies: torch.export has regions of their own for that."""
        if nondeterministic_seeded in op.tags or not self._twins.varying.isdisjoint(map(memory, operands)):
            if not self._tape.is_tracked:
                raise Unclear
            self._twins.varying.update(map(memory, results))

    def _met(self, argument: Any) -> Any:
        return met(self._tape, self._twins, argument) if isinstance(argument, torch.Tensor) else argument

    def _read(self, op: OpOverload, args: tuple[torch.Tensor, ...]) -> Any:
        """What the model sees in values that are known, or are what it checks.

        Raises:
            CaptureError: it branches on others.
        """
        names = [self._tape.refer(self._met(tensor)) for tensor in args]
        values = [value_of(self._tape.lowered, name) for name in names]
        if any(value is None for value in values):
            values = [value_of(passing(self._tape.lowered), name) for name in names]
            self._tape.reads += [Read(name, current_line()) for name in names]
        if all(value is not None for value in values):
            return op(*values)
        if op in DECISIONS:
            raise CaptureError(BRANCHES, current_line())
        raise Unclear

    def _value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return value_of(self._tape.lowered, self._tape.refer(self._met(tensor)))

    def _no_size(self, op: OpOverload, deciding: list[torch.Tensor]) -> Exception:
        """Where parameters, inputs or random numbers decide a size, torch.export refuses as well."""
        if "put" not in short_name(op) and any(self._value(tensor) is None for tensor in deciding):
            return unknown_size(short_name(op), current_line())
        return Unclear()


def met(tape: Tape, twins: Twins, given: torch.Tensor) -> torch.Tensor:
    """What an operation meets in the place of a tensor that the model holds or has made outside of all operations.

    Raises:
        Unclear: it was made in a way that is no operation.
    """
    with torch._C.DisableTorchFunction(), torch._C._DisablePythonDispatcher():
        tensor = twins.find(given)
        if tape.knows(tensor):
            return tensor
        if tensor.is_meta:
            raise Unclear
        twin = twins.make(tensor)
        tape.hold_source(twin, tape.name("constant"), tensor)
        return twin


def _is_transformed() -> bool:
    """Whether operations are not what they seem here."""
    is_under_func = torch._C._functorch.peek_interpreter_stack() is not None
    return (
        is_under_func
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
    )


def _deciding(op: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors whose values decide the shape of what an operation returns."""
    if short_name(op) in INDEXINGS or op is aten.index.Tensor:
        return [index for index in tensor_leaves(args[1]) if index.dtype in (torch.bool, torch.uint8)]
    return tensor_leaves(args)[-1:] if op in PLACES or has_size_of_values(op, short_name(op)) else []


@dataclass(frozen=True, slots=True)
class _Layout:
    """All of a tensor but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Layout:
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def made(self, device: torch.device) -> torch.Tensor:
        """A tensor of this layout; one that takes a gradient may be written to, as the result of an operation may."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return tensor.requires_grad_().clone() if self.requires_grad else tensor


@dataclass(slots=True)
class _Results:
    """What operations return on the meta device; new tensors of one layout are computed once."""

    home: torch.device
    _known: dict[Any, list[_Layout]] = field(default_factory=dict)

    def of(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation."""
        if "device" not in kwargs and _takes_device(op) and not tensor_leaves(args):
            kwargs = {**kwargs, "device": _META}
        key = op, torch.is_grad_enabled(), _key(args), _key(tuple(kwargs.items()))
        is_one = len(op._schema.returns) == 1
        if (known := self._known.get(key)) is not None:
            return known[0].made(_META) if is_one else tuple([layout.made(_META) for layout in known])
        result = op(*args, **kwargs)
        parts = [result] if is_one else list(result)
        if op._schema.is_mutable or not _are_new(parts, (args, kwargs)):
            return result
        layouts = [_Layout.of(part) for part in parts]
        if op is aten.scaled_dot_product_attention.default:
            layouts = [replace(layouts[0], stride=self._stride_at_home(op, args, kwargs))]
            result = layouts[0].made(_META)
        if all(layout.made(_META).stride() == layout.stride for layout in layouts):
            self._known[key] = layouts
        return result

    def _stride_at_home(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Where the model lies an operation may have other kernels, which lay results out in another way."""

        def moved(argument: Any) -> Any:
            return _Layout.of(argument).made(self.home) if isinstance(argument, torch.Tensor) else argument

        with FakeTensorMode():
            return tuple(op(*_each(args, moved), **_each(kwargs, moved)).stride())


@lru_cache(maxsize=256)
def _takes_device(op: OpOverload) -> bool:
    return any(argument.name == "device" for argument in op._schema.arguments)


def _key(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.requires_grad
    if isinstance(argument, (list, tuple)):
        return tuple([_key(item) for item in argument])
    return type(argument), argument  # one and True are equal


def _are_new(results: list[Any], given: Any) -> bool:
    """Whether these are tensors, each with memory of its own."""
    if not all(isinstance(result, torch.Tensor) for result in results):
        return False
    taken = [memory(tensor) for tensor in results]
    return len({*taken}) == len(taken) and all(memory(tensor) not in taken for tensor in tensor_leaves(given))


def _each(argument: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(argument, dict):
        return {key: _each(item, change) for key, item in argument.items()}
    if isinstance(argument, (list, tuple)):
        return type(argument)([_each(item, change) for item in argument])
    return change(argument)


def _on_meta(argument: Any) -> Any:
    return _META if isinstance(argument, torch.device) else argument
