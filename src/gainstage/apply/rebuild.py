"""Values of buffers that a model built on the meta device never had: rotary tables, running statistics, masks, indices.

A buffer is a function of its module's configuration, so the module itself knows it. Four ways to ask are tried, in this
order: what torch's norms offer to reset their statistics; what Transformers calls on every module of a model that it loads;
the module's own methods for that purpose; the constructor again, of the module or of one around it, where the arguments can
be read back from attributes. Each is asked twice, over different rubbish in memory, other values of the parameters and another
seed: what comes out the same is a function of the configuration, and believed. A rebuilt module also has to agree with the
present one in everything that can be compared.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

# Methods without arguments by which modules compute their buffers anew: timm's, torchtitan's, and torch's own custom.
_METHODS = ("init_non_persistent_buffers", "_init_self_buffers", "reset_buffers", "reset_parameters", "init_weights")

# Arguments that say where and in which precision a module is built, which the rebuilt tensors are told afterwards.
_FACTORY = frozenset({"device", "dtype"})

# What memory holds when a module is asked for the first and the second time: a byte, and the value of some parameters.
_RUBBISH = ((0xA5, 0.75), (0x5A, -1.25))

# Entries at the start of a parameter that get the value: one page of memory. The rest is never touched, and takes none.
_TOUCHED = 1024

# A module with more parameters than this is rebuilt without drawing them.
_LARGE = 2**26


def missing_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers, and tensors kept as plain attributes, that lie on the meta device; of this module alone."""
    attributes = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in {**module._buffers, **attributes}.items() if value is not None and value.is_meta}


@final
class Rebuilder:
    """Asks modules for their buffers.

    Args:
        seed: of torch's generator meanwhile.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._built: dict[int, tuple[nn.Module, nn.Module] | None] = {}  # by identity of the module, which its caller keeps

    def rebuild(self, path: Sequence[str], modules: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
        """Values of the missing tensors of one module, on the CPU; those that cannot be found out are left out.

        Args:
            path: names of the children that lead from the model to the module.
            modules: on that path, the model first, the module last.
        """
        module = modules[-1]
        missing = missing_tensors(module)
        values: dict[str, torch.Tensor] = {}
        for attempt in self._attempts(path, modules):
            first, second = (attempt(run) for run in range(len(_RUBBISH)))
            for name, value in first.items():
                expected = missing[name]
                fits = value.shape == expected.shape and value.is_floating_point() == expected.is_floating_point()
                if fits and name not in values and name in second and _is_same(value, second[name]):
                    values[name] = value.to(expected.dtype)
            if len(values) == len(missing):
                break
        return values

    def _attempts(self, path: Sequence[str], modules: Sequence[nn.Module]) -> Iterator[Callable[[int], dict[str, torch.Tensor]]]:
        module = modules[-1]
        for call in _calls(modules):
            yield lambda run, call=call: self._by_call(module, call, run)  # type: ignore[misc]
        for depth in reversed(range(len(modules))):
            yield lambda run, depth=depth: self._by_constructor(path[depth:], modules[depth:], modules[:depth], run)  # type: ignore[misc]

    def _by_call(self, module: nn.Module, call: Callable[[], object], run: int) -> dict[str, torch.Tensor]:
        """What the call makes of the buffers."""
        missing = missing_tensors(module)
        byte, value = _RUBBISH[run]
        with _set_aside(module, value), self._seeded(run), _ParametersLeft(value):
            for name, tensor in missing.items():
                rubbish = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                rubbish.view(-1).view(torch.uint8).fill_(byte)
                (module._buffers if name in module._buffers else vars(module))[name] = rubbish
            try:
                call()
            except Exception:  # noqa: BLE001  (whatever the user's method raises: it is no way to the values)
                return {}
            return _held(module, missing)

    def _by_constructor(
        self, path: Sequence[str], modules: Sequence[nn.Module], around: Sequence[nn.Module], run: int
    ) -> dict[str, torch.Tensor]:
        """What the same place has in a new module."""
        owner, module = modules[0], modules[-1]
        if id(owner) not in self._built:
            self._built[id(owner)] = self._construct(owner, around)
        built = self._built[id(owner)]
        again: nn.Module | None = built[run] if built else None
        for name in path:
            again = again._modules.get(name) if again is not None else None
        return {} if again is None or not _is_like(again, module) else _held(again, missing_tensors(module))

    def _construct(self, owner: nn.Module, around: Sequence[nn.Module]) -> tuple[nn.Module, nn.Module] | None:
        large = sum(parameter.numel() for parameter in owner.parameters()) > _LARGE
        built = []
        try:
            arguments = _recovered_arguments(owner, around)
            for run, (_, value) in enumerate(_RUBBISH):
                with self._seeded(run), torch.device("cpu"), _ParametersLeft(value) if large else nullcontext():
                    built.append(type(owner)(**arguments))
        except Exception:  # noqa: BLE001  (the arguments are a guess; any error says that it was wrong)
            return None
        first, second = built
        return (first, second) if _is_like(first, owner) else None

    @contextmanager
    def _seeded(self, run: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed((self._seed + run) % 2**63)
            yield


def _calls(modules: Sequence[nn.Module]) -> Iterator[Callable[[], object]]:
    """What can be called to have a module compute its buffers."""
    module = modules[-1]
    if isinstance(module, _NormBase):
        yield module.reset_running_stats
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    for owner in reversed(modules) if transformers is not None else ():
        if isinstance(owner, transformers.PreTrainedModel):
            yield lambda owner=owner: owner._init_weights(module)  # type: ignore[misc]
            break
    for name in _METHODS:
        method = getattr(type(module), name, None)
        if method is not None:
            yield lambda method=method: method(module)  # type: ignore[misc]


def _held(module: nn.Module, names: Mapping[str, object]) -> dict[str, torch.Tensor]:
    held = {**vars(module), **module._buffers}
    tensors = ((name, held.get(name)) for name in names)
    return {name: tensor.detach().cpu() for name, tensor in tensors if isinstance(tensor, torch.Tensor) and not tensor.is_meta}


def _is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Bit by bit, so that NaN equals itself."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    first, second = (each.contiguous().view(-1).view(torch.uint8) for each in (first, second))
    return torch.equal(first, second)


@contextmanager
def _set_aside(module: nn.Module, value: float) -> Iterator[None]:
    """Everything that the module and its children hold is as before when this ends; meanwhile all tensors are others."""
    held = [(each, dict(vars(each)), dict(each._parameters), dict(each._buffers)) for each in module.modules()]
    for each, attributes, parameters, buffers in held:
        for holder, tensors in ((vars(each), attributes), (each._buffers, buffers)):
            holder.update({name: value.clone() for name, value in tensors.items() if isinstance(value, torch.Tensor)})
        for name, parameter in parameters.items():
            if parameter is not None:
                memory = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                memory.view(-1)[:_TOUCHED].fill_(value)
                each._parameters[name] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for each, attributes, parameters, buffers in held:
            vars(each).clear()
            vars(each).update(attributes)
            each._parameters.clear()
            each._parameters.update(parameters)
            each._buffers.clear()
            each._buffers.update(buffers)


def _recovered_arguments(module: nn.Module, around: Sequence[nn.Module]) -> dict[str, Any]:
    """Arguments by the attributes of their names; a configuration object also from the nearest module that keeps one.

    Raises:
        LookupError: an argument that nobody keeps: its default may not be what was given.
    """
    arguments = {}
    for name, parameter in list(inspect.signature(type(module).__init__).parameters.items())[1:]:
        if name in _FACTORY:
            continue
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY}:
            raise LookupError(name)
        for owner in (module, *reversed(around)):
            value = vars(owner).get(name, _ABSENT)
            if value is not _ABSENT and (owner is module or not _is_plain(value)):
                arguments[name] = value
                break
        else:
            raise LookupError(name)
    return arguments


_ABSENT = object()


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


def _is_like(again: nn.Module, module: nn.Module) -> bool:
    """Whether a rebuilt module has the tensors, the children and the numbers of the one that it stands for."""
    own = vars(nn.Module()).keys()
    numbers = {name: value for name, value in vars(again).items() if _is_plain(value) and name not in own}
    return (
        _shapes(again._parameters) == _shapes(module._parameters)
        and _shapes(again._buffers) == _shapes(module._buffers)
        and again._modules.keys() == module._modules.keys()
        and all(vars(module).get(name, _ABSENT) == value for name, value in numbers.items())
    )


def _shapes(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, tuple[int, ...] | None]:
    return {name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()}


class _ParametersLeft(TorchFunctionMode):
    """Writes into a parameter only put a value at its start: drawing them would take long, and memory."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        is_write = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        written = args[0] if args else (kwargs or {}).get("tensor")  # torch.nn.init hands it on by name
        if is_write and isinstance(written, nn.Parameter):
            if written.is_contiguous():
                written.detach().view(-1)[:_TOUCHED].fill_(self._value)
            return written
        return func(*args, **(kwargs or {}))
