"""The plan: what every parameter is to be drawn from, and why. Immutable; JSON both ways."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch

from gainstage.errors import InputError, PlanFormatError, PlanMismatchError, UnknownNameError

SCHEMA_VERSION = 1

_T = TypeVar("_T")

# A normal value strays beyond 7 deviations once in 4e11 draws; a finite number of the parameter's type must hold that much.
_LARGEST_DEVIATION = 7.0


class Family(Enum):
    """Distributions of a parameter's entries."""

    KEEP = "keep"  # leave the present values
    CONSTANT = "constant"  # every entry equals mean
    NORMAL = "normal"
    TRUNCATED_NORMAL = "truncated_normal"  # cut at 2 deviations of the parent normal; std is that of the result
    UNIFORM = "uniform"
    ORTHOGONAL = "orthogonal"
    DELTA_ORTHOGONAL = "delta_orthogonal"

    @property
    def is_matrix(self) -> bool:
        """The entries are drawn together, as a matrix, and not one by one."""
        return self in (Family.ORTHOGONAL, Family.DELTA_ORTHOGONAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How the entries of one parameter are drawn: a family with the mean and standard deviation of an entry.

    ``std`` is that of the values as written: a truncated normal's parent is wider, and an orthogonal matrix is scaled so
    that the mean of its squared entries is ``std**2``. That matrix has the parameter's output dimensions as rows and all
    others as columns; the smaller side is orthonormal up to scale. A delta-orthogonal kernel of shape [channels, channels,
    taps...] is such a matrix in its centre tap and zero in the others, and ``std**2`` is the mean over all taps, so that
    fan-in times ``std**2`` means the same for every family.

    Raises:
        InputError: numbers that are not finite, a negative ``std``, a constant that varies, an orthogonal mean.
    """

    family: Family
    mean: float = 0.0
    std: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        for name, number in (("mean", self.mean), ("std", self.std)):
            if not math.isfinite(number):
                raise InputError(f"{name} of a distribution is {number}; it must be finite")
        if self.std < 0:
            raise InputError(f"std of a distribution is {self.std}; it cannot be negative")
        if self.family is Family.CONSTANT and self.std:
            raise InputError(f"a constant has std 0, not {self.std}; choose normal or uniform for values that differ")
        if self.family.is_matrix and self.mean:
            raise InputError(f"the entries of an {self.family.value} matrix have mean 0, not {self.mean}")

    def __str__(self) -> str:
        """In words: ``normal, mean 0, std 0.0417``."""
        if self.family is Family.KEEP:
            return "kept as it is"
        if self.family is Family.CONSTANT:
            return f"constant {self.mean:.4g}"
        name = self.family.value.replace("_", " ")
        return f"{name}, std {self.std:.4g}" if self.family.is_matrix else f"{name}, mean {self.mean:.4g}, std {self.std:.4g}"


@dataclass(frozen=True, slots=True)
class Block:
    """A slice of a parameter with a distribution of its own: ``parameter[start:stop]`` along dimension ``dim``.

    A fused projection has one block for each of query, key and value.
    """

    dim: int
    start: int
    stop: int
    distribution: Distribution

    def __str__(self) -> str:
        """As one would index: ``[0:64]`` along dimension 0, ``[:, 0:64]`` along dimension 1."""
        return f"[{':, ' * self.dim}{self.start}:{self.stop}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterPlan:
    """What is written into one parameter. ``blocks`` is empty for a parameter with one distribution.

    Blocks lie along one dimension, in order, without overlap; entries outside of them follow ``distribution``.
    ``output_dims``: the dimensions of the parameter that index outputs; the others are summed over (fan-in).

    Raises:
        InputError: blocks outside of the shape, a family that the shape does not allow, values beyond the element type.
    """

    name: str
    aliases: tuple[str, ...] = ()
    shape: tuple[int, ...]
    dtype: str  # "float32"
    role: str
    distribution: Distribution
    blocks: tuple[Block, ...] = ()
    output_dims: tuple[int, ...] = (0,)
    derivation: tuple[str, ...] = ()  # lines of text, formula first, numbers filled in

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn into this shape and element type."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"{self.name}: {self.dtype!r} is not a floating-point type; write float32, bfloat16, ...")
        if any(size < 1 for size in self.shape):
            raise InputError(f"{self.name}: a dimension of shape {list(self.shape)} is not positive")
        if len(set(self.output_dims)) < len(self.output_dims) or any(dim < 0 for dim in self.output_dims):
            raise InputError(f"{self.name}: output_dims {list(self.output_dims)} are not different dimensions counted from 0")
        end = 0
        for block in self.blocks:
            if block.dim != self.blocks[0].dim or not 0 <= block.dim < len(self.shape):
                raise InputError(f"{self.name}: block {block} is not along the dimension of the first block, or there is none")
            if not end <= block.start < block.stop <= self.shape[block.dim]:
                raise InputError(f"{self.name}: block {block} overlaps another, or lies outside of shape {list(self.shape)}")
            end = block.stop
        for distribution in (self.distribution, *(block.distribution for block in self.blocks)):
            if abs(distribution.mean) + _LARGEST_DEVIATION * distribution.std > torch.finfo(dtype).max:
                raise InputError(f"{self.name}: {distribution} does not fit into {self.dtype}")
            if distribution.family.is_matrix:
                self._check_matrix(distribution.family)

    def _check_matrix(self, family: Family) -> None:
        if len(self.shape) < 2 or not self.output_dims or any(dim >= len(self.shape) for dim in self.output_dims):
            raise InputError(f"{self.name}: shape {list(self.shape)} with output_dims {list(self.output_dims)} is no matrix")
        if family is Family.DELTA_ORTHOGONAL and (
            self.output_dims not in ((0,), (1,)) or any(block.dim > 1 for block in self.blocks)
        ):
            raise InputError(f"{self.name}: a delta-orthogonal kernel has the shape [channels, channels, taps...]")

    def __str__(self) -> str:
        """Header and derivation, as :meth:`Plan.explain` shows them."""
        lines = [f"{self.name}  {list(self.shape)} {self.dtype}, {self.role}"]
        if self.aliases:
            lines.append(f"tied to {', '.join(self.aliases)}: one tensor, drawn once")
        if self.blocks:
            lines += [f"{block}  {block.distribution}" for block in self.blocks]
            covered = sum(block.stop - block.start for block in self.blocks)
            lines += [f"elsewhere  {self.distribution}"] if covered < self.shape[self.blocks[0].dim] else []
        else:
            lines.append(str(self.distribution))
        return "\n".join([*lines, *(f"  {line}" for line in self.derivation)])


class ParameterFacts(Protocol):
    """What a plan is compared with: the table entry of a captured graph, or a parameter as it is found in a model."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the whole parameter."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names of the same tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that apply needs and verify checks, for one model.

    Equal plans compare equal, and ``Plan.from_json(plan.to_json()) == plan`` holds to the last bit.

    Args:
        policy: name of the targets that the plan was solved for.
        parameters: canonical name -> what is written, in the model's own order.
        fingerprint: of the graph that the plan was solved on.
        training: the mode of the model that the plan was solved for.
        predictions: "path@call" -> second moments of the outputs of that module call, averaged over draws and inputs.
        spreads: "path@call" -> predicted deviations of the logs of these second moments from one draw to another.
        notes: what a reader has to know, one sentence each.

    Raises:
        InputError: parameters under other names than their own, predictions that are negative or not finite.
    """

    policy: str
    parameters: Mapping[str, ParameterPlan]
    fingerprint: str
    training: bool
    predictions: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    spreads: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    version: int = field(default=SCHEMA_VERSION, init=False)

    def __post_init__(self) -> None:
        """Freeze the mappings and check that they agree with each other."""
        taken: set[str] = set()
        for key, parameter in self.parameters.items():
            if key != parameter.name:
                raise InputError(f"the plan of {parameter.name!r} stands under the name {key!r}")
            for name in (key, *parameter.aliases):
                if name in taken:
                    raise InputError(f"{name!r} names two parameters of the plan")
                taken.add(name)
        for call, values in (*self.predictions.items(), *self.spreads.items()):
            if any(not math.isfinite(value) or value < 0 for value in values):
                raise InputError(f"the predictions of {call} are {list(values)}; they must be finite and not negative")
        for call, values in self.spreads.items():
            if len(self.predictions.get(call, ())) != len(values):
                raise InputError(f"{call} has {len(values)} spreads for {len(self.predictions.get(call, ()))} predictions")
        for name in ("parameters", "predictions", "spreads"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __repr__(self) -> str:
        """One line."""
        return f"Plan(policy={self.policy!r}, {len(self.parameters)} parameters, training={self.training})"

    def __reduce__(self) -> tuple[Callable[[str], Plan], tuple[str]]:
        """Pickle as JSON, so that a plan can be sent to other processes."""
        return Plan.from_json, (self.to_json(),)

    def explain(self, name: str) -> str:
        """The distribution of one parameter and how it was derived, as text.

        Args:
            name: any name of the parameter; a tied parameter has several.

        Raises:
            UnknownNameError: for a name that the plan does not have.
        """
        for parameter in self.parameters.values():
            if name == parameter.name or name in parameter.aliases:
                return str(parameter)
        known = [known for parameter in self.parameters.values() for known in (parameter.name, *parameter.aliases)]
        raise UnknownNameError(f"The plan has no parameter {name!r}{_nearest(name, known)}.")

    def check_fits(self, parameters: Mapping[str, ParameterFacts]) -> None:
        """Compare names, ties, shapes and element types with those of a model.

        Args:
            parameters: canonical name -> shape, dtype and aliases, as in ``Graph.parameters``.

        Raises:
            PlanMismatchError: at the first difference, in the plan's order.
        """
        for name, planned in self.parameters.items():
            found = parameters.get(name)
            if found is None:
                raise PlanMismatchError(f"The plan has {name!r}, the model has not{_nearest(name, parameters)}. {_REPLAN}")
            if tuple(found.shape) != planned.shape:
                raise PlanMismatchError(f"{name} is planned as {list(planned.shape)}, but is {list(found.shape)}. {_REPLAN}")
            if (dtype := str(found.dtype).removeprefix("torch.")) != planned.dtype:
                raise PlanMismatchError(f"{name} is planned as {planned.dtype}, but is {dtype}. {_REPLAN}")
            if set(found.aliases) != set(planned.aliases):
                raise PlanMismatchError(
                    f"{name} is planned {_tied(planned.aliases)}, but is {_tied(found.aliases)}. "
                    "Tie the weights again (to_empty unties them), or make a plan of this model."
                )
        for name in parameters:
            if name not in self.parameters:
                raise PlanMismatchError(f"The model has {name!r}, the plan has not{_nearest(name, self.parameters)}. {_REPLAN}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the JSON form."""
        calls = {
            call: {"second_moments": list(values), "spreads": list(self.spreads.get(call, ()))}
            for call, values in self.predictions.items()
        }
        return {
            "version": self.version,
            "policy": self.policy,
            "fingerprint": self.fingerprint,
            "training": self.training,
            "notes": list(self.notes),
            "parameters": {name: _parameter_to_dict(parameter) for name, parameter in self.parameters.items()},
            "predictions": calls,
        }

    def to_json(self) -> str:
        """The whole plan as JSON text, which :meth:`from_json` reads back exactly."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that :meth:`to_json` wrote. Every field is checked; nothing is guessed and nothing is run.

        Raises:
            PlanFormatError: for anything else; the message says where in the text.
        """
        return _read_plan(_parse(text))


_REPLAN = "Make a plan of this model."


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""


def _tied(aliases: Sequence[str]) -> str:
    return f"tied to {', '.join(aliases)}" if aliases else "not tied"


def _parameter_to_dict(parameter: ParameterPlan) -> dict[str, Any]:
    return {
        "shape": list(parameter.shape),
        "dtype": parameter.dtype,
        "aliases": list(parameter.aliases),
        "role": parameter.role,
        "distribution": _distribution_to_dict(parameter.distribution),
        "blocks": [
            {"dim": b.dim, "start": b.start, "stop": b.stop, "distribution": _distribution_to_dict(b.distribution)}
            for b in parameter.blocks
        ],
        "output_dims": list(parameter.output_dims),
        "derivation": list(parameter.derivation),
    }


def _distribution_to_dict(distribution: Distribution) -> dict[str, Any]:
    return {"family": distribution.family.value, "mean": distribution.mean, "std": distribution.std}


# Reading. A place is the path into the JSON text that a message names: parameters["fc.weight"].shape[0].


def _parse(text: str) -> object:
    if not isinstance(text, str):
        raise PlanFormatError(f"A plan is read from text, not from {type(text).__name__}; open the file and pass its text.")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise PlanFormatError("The text is nested too deeply for a plan.") from error
    except ValueError as error:
        raise PlanFormatError(f"The text is no JSON, or was cut short: {error}.") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    read = dict(pairs)
    if len(read) < len(pairs):
        names = [name for name, _ in pairs]
        raise PlanFormatError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object.")
    return read


def _refuse_constant(name: str) -> object:
    raise PlanFormatError(f"{name} stands in the text; numbers of a plan are finite.")


def _expected(what: str, value: object, place: str) -> PlanFormatError:
    shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return PlanFormatError(f"{place or 'The plan'}: expected {what}, found {shown[:80]}.")


def _entries(value: object, place: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _expected("an object", value, place)
    return value


def _record(value: object, place: str, keys: tuple[str, ...]) -> dict[str, object]:
    """An object with exactly these keys."""
    entries = _entries(value, place)
    for key in entries:
        if key not in keys:
            raise PlanFormatError(f"{place or 'The plan'}: unknown key {key[:80]!r}{_nearest(key[:80], keys)}.")
    for key in keys:
        if key not in entries:
            raise PlanFormatError(f"{place or 'The plan'}: {key!r} is missing.")
    return entries


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise _expected("text", value, place)
    return value


def _integer(value: object, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _expected("an integer", value, place)
    return value


def _number(value: object, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _expected("a number", value, place)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise PlanFormatError(f"{place}: the number is too large.")
    return number


def _items(value: object, place: str, read: Callable[[object, str], _T]) -> tuple[_T, ...]:
    if not isinstance(value, list):
        raise _expected("a list", value, place)
    return tuple(read(item, f"{place}[{index}]") for index, item in enumerate(value))


def _made(make: Callable[[], _T], place: str) -> _T:
    """What the constructors refuse is, here, wrong in the text."""
    try:
        return make()
    except InputError as error:
        raise PlanFormatError(f"{place or 'The plan'}: {error}.") from error


def _read_distribution(value: object, place: str) -> Distribution:
    entries = _record(value, place, ("family", "mean", "std"))
    families = {family.value: family for family in Family}
    family = _text(entries["family"], f"{place}.family")
    if family not in families:
        raise PlanFormatError(f"{place}.family: unknown family {family[:80]!r}; known are {', '.join(families)}.")
    mean, std = (_number(entries[key], f"{place}.{key}") for key in ("mean", "std"))
    return _made(lambda: Distribution(family=families[family], mean=mean, std=std), place)


def _read_block(value: object, place: str) -> Block:
    entries = _record(value, place, ("dim", "start", "stop", "distribution"))
    dim, start, stop = (_integer(entries[key], f"{place}.{key}") for key in ("dim", "start", "stop"))
    return Block(dim, start, stop, _read_distribution(entries["distribution"], f"{place}.distribution"))


def _read_parameter(name: str, value: object, place: str) -> ParameterPlan:
    keys = ("shape", "dtype", "aliases", "role", "distribution", "blocks", "output_dims", "derivation")
    entries = _record(value, place, keys)
    fields: dict[str, Any] = {
        "shape": _items(entries["shape"], f"{place}.shape", _integer),
        "dtype": _text(entries["dtype"], f"{place}.dtype"),
        "aliases": _items(entries["aliases"], f"{place}.aliases", _text),
        "role": _text(entries["role"], f"{place}.role"),
        "distribution": _read_distribution(entries["distribution"], f"{place}.distribution"),
        "blocks": _items(entries["blocks"], f"{place}.blocks", _read_block),
        "output_dims": _items(entries["output_dims"], f"{place}.output_dims", _integer),
        "derivation": _items(entries["derivation"], f"{place}.derivation", _text),
    }
    return _made(lambda: ParameterPlan(name=name, **fields), place)


def _read_plan(value: object) -> Plan:
    version = _integer(_entries(value, "").get("version"), "version")
    if version != SCHEMA_VERSION:
        raise PlanFormatError(
            f"The plan has schema version {version}; this release reads version {SCHEMA_VERSION}. "
            "Use the release of gainstage that wrote it, or make the plan again."
        )
    keys = ("version", "policy", "fingerprint", "training", "notes", "parameters", "predictions")
    entries = _record(value, "", keys)
    if not isinstance(entries["training"], bool):
        raise _expected("true or false", entries["training"], "training")
    training = entries["training"]
    parameters = {
        name: _read_parameter(name, parameter, f"parameters[{name[:80]!r}]")
        for name, parameter in _entries(entries["parameters"], "parameters").items()
    }
    predictions, spreads = {}, {}
    for call, prediction in _entries(entries["predictions"], "predictions").items():
        place = f"predictions[{call[:80]!r}]"
        pair = _record(prediction, place, ("second_moments", "spreads"))
        predictions[call] = _items(pair["second_moments"], f"{place}.second_moments", _number)
        if values := _items(pair["spreads"], f"{place}.spreads", _number):
            spreads[call] = values
    fields: dict[str, Any] = {key: _text(entries[key], key) for key in ("policy", "fingerprint")}
    fields["notes"] = _items(entries["notes"], "notes", _text)
    return _made(lambda: Plan(parameters=parameters, predictions=predictions, spreads=spreads, training=training, **fields), "")
