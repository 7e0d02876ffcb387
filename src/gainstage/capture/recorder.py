"""The modes of torch that see every operation of a run, and write it on a tape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gainstage.capture.assemble import value_of
from gainstage.capture.lowered import ASSERTIONS
from gainstage.capture.tape import Tape
from gainstage.graph import short_name
from gainstage.graph.flatten import tensor_leaves

aten = torch.ops.aten

READS = frozenset({aten.item.default, aten.is_nonzero.default, aten._local_scalar_dense.default, aten.equal.default})
PLACES = frozenset({aten.where.default, aten.nonzero_numpy.default})  # where a condition holds, a tensor for each dimension
DECISIONS = frozenset({aten.is_nonzero.default, aten.equal.default})
LEAVING = frozenset({torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.__dlpack__})
INDEXINGS = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """Write on a tape what runs inside."""
    with ExitStack() as modes:
        modes.enter_context(enable_python_dispatcher())
        modes.enter_context(_Functions(tape))
        modes.enter_context(_Operations(tape))
        yield


class _Operations(SchemaCheckMode):  # type: ignore[no-untyped-call]
    """Sees operations before autograd and before they are decomposed; only kin of this class may stand there."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.__dict__["_dispatch_key"] = DispatchKey.PreDispatch
        self._tape = tape

    def __torch_dispatch__(self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:  # inside torch.func: the operands are wrapped
            with _Plain(self._tape):
                return func(*args, **(kwargs or {}))
        return _write(self._tape, func, args, kwargs or {})


class _Plain(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees operations after all transformations, on plain tensors."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    def __torch_dispatch__(self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _write(self._tape, func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees what is no operation: no_grad, NumPy, and operations on functions."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            self._tape.is_tracked = bool(args[0])
        elif func in LEAVING:
            self._tape.read(args[0])
        elif func is torch.ops.higher_order.cond:
            predicate, then, otherwise, operands = args
            with self:
                return (then if bool(predicate) else otherwise)(*operands)
        elif isinstance(func, HigherOrderOperator):
            return _write(self._tape, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _write(tape: Tape, op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation and put it on the tape."""
    name = short_name(op)
    if name in ASSERTIONS:
        return op(*args, **kwargs)
    if op in READS:
        return _read(tape, op, args)
    if op in PLACES:
        places = op(*args)
        tape.find(args[0], places)
        return places
    if name == "masked_select":
        op, args = aten.index.Tensor, _as_indexing(*args)
    if name in INDEXINGS or op is aten.index.Tensor:
        args = (args[0], _without_masks(tape, args[1]), *args[2:])
    written, named = tape.refer_all(args), tape.refer_all(kwargs)
    result = op(*args, **kwargs)
    if has_size_of_values(op, name):
        tape.freeze(op, written, result)
    else:
        tape.record(op, written, named, result)
    return result


def _read(tape: Tape, op: Any, args: tuple[Any, ...]) -> Any:
    """What the run sees in tensors; on the meta device what can be computed, or else True or 1."""
    tensors = tensor_leaves(args)
    for tensor in tensors:
        tape.read(tensor)
    if not any(tensor.is_meta for tensor in tensors):
        return op(*args)
    values = [value_of(tape.lowered, tape.refer(tensor)) if tensor.is_meta else tensor for tensor in tensors]
    known = [value for value in values if value is not None]
    if len(known) == len(values):
        return op(*known)
    return True if op in DECISIONS or tensors[0].dtype is torch.bool else 1.0 if tensors[0].is_floating_point() else 1


def has_size_of_values(op: Any, name: str) -> bool:
    """Whether values decide the shape of what an operation returns; an index by a condition is left to the caller."""
    return name not in INDEXINGS and torch.Tag.dynamic_output_shape in getattr(op, "tags", ())


def _as_indexing(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x, mask = torch.broadcast_tensors(x, mask)  # type: ignore[no-untyped-call]
    return x, [mask]


def _without_masks(tape: Tape, indices: Any) -> list[Any]:
    """Indices with the places of its True entries for each mask, as they are in this run."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
            places = index.nonzero(as_tuple=True)
            tape.find(index, places)
            found.extend(places)
        else:
            found.append(index)
    return found
