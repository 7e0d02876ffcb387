"""A plan's fields as JSON, and back: every field is checked, nothing is guessed and nothing is run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from gainstage.errors import InputError, PlanFormatError, nearest
from gainstage.plan.activation import ActivationPlan
from gainstage.plan.distribution import Block, Distribution, Family, ParameterPlan, Passage
from gainstage.plan.mixing import Mixing

SCHEMA_VERSION = 4

_T = TypeVar("_T")

# What a message quotes, at most: a damaged plan may hold anything.
_QUOTED = 80
_LONGEST_REASON = 400


def write_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data, as in the JSON form.

    Args:
        fields: the arguments that make the plan, by name.
    """
    spreads = fields["spreads"]
    calls = {
        call: {"second_moments": list(values), "spreads": list(spreads.get(call, ()))}
        for call, values in fields["predictions"].items()
    }
    return {
        "version": SCHEMA_VERSION,
        **{key: fields[key] for key in ("policy", "balance", "fingerprint", "training")},
        "notes": list(fields["notes"]),
        "activations": [{**asdict(change), "derivation": list(change.derivation)} for change in fields["activations"]],
        "parameters": {name: _parameter_to_dict(parameter) for name, parameter in fields["parameters"].items()},
        "predictions": calls,
    }


def _parameter_to_dict(parameter: ParameterPlan) -> dict[str, Any]:
    return {
        "shape": list(parameter.shape),
        "dtype": parameter.dtype,
        "aliases": list(parameter.aliases),
        "role": parameter.role,
        "distribution": _distribution_to_dict(parameter.distribution),
        "blocks": [_block_to_dict(block) for block in parameter.blocks],
        "output_dims": list(parameter.output_dims),
        "derivation": list(parameter.derivation),
        "passage": None if (passage := parameter.passage) is None else asdict(passage),
        "branches": parameter.branches,
    }


def _block_to_dict(block: Block) -> dict[str, Any]:
    entries = {"dim": block.dim, "start": block.start, "stop": block.stop}
    return entries | {"distribution": _distribution_to_dict(block.distribution), "role": block.role}


def _distribution_to_dict(distribution: Distribution) -> dict[str, Any]:
    found = {"family": distribution.family.value, "mean": distribution.mean, "std": distribution.std}
    mixing = distribution.mixing
    if mixing is None:
        return found
    return found | {"mixing": {"stream": mixing.stream, "rank": mixing.rank, "columns": mixing.columns, "matrix": mixing.text}}


# Reading. A place is the path into the JSON text that a message names: parameters['fc.weight'].shape[0].


def read_fields(text: object) -> dict[str, Any]:
    """The arguments that make the plan of a JSON text.

    Raises:
        PlanFormatError: for anything but the text of a plan; the message says where.
    """
    value = _parse(text)
    version = _integer(_entries(value, "").get("version"), "version")
    if version != SCHEMA_VERSION:
        raise _wrong(
            "version",
            f"the plan has schema version {_quoted(version)}, this release reads version {SCHEMA_VERSION}; "
            "use the release of gainstage that wrote it, or make the plan again",
        )
    entries = _record(
        value,
        "",
        ("version", "policy", "balance", "fingerprint", "training", "notes", "activations", "parameters", "predictions"),
    )
    if not isinstance(entries["training"], bool):
        raise _expected("true or false", entries["training"], "training")
    predictions, spreads = {}, {}
    for call, prediction in _entries(entries["predictions"], "predictions").items():
        place = f"predictions[{_quoted(call)}]"
        pair = _record(prediction, place, ("second_moments", "spreads"))
        predictions[call] = _items(pair["second_moments"], f"{place}.second_moments", _number)
        if values := _items(pair["spreads"], f"{place}.spreads", _number):
            spreads[call] = values
    return {
        "policy": _text(entries["policy"], "policy"),
        "balance": _text(entries["balance"], "balance"),
        "fingerprint": _text(entries["fingerprint"], "fingerprint"),
        "training": entries["training"],
        "notes": _items(entries["notes"], "notes", _text),
        "activations": _items(entries["activations"], "activations", _read_activation),
        "parameters": {
            name: _read_parameter(name, parameter, f"parameters[{_quoted(name)}]")
            for name, parameter in _entries(entries["parameters"], "parameters").items()
        },
        "predictions": predictions,
        "spreads": spreads,
    }


def checked(make: Callable[[], _T], place: str) -> _T:
    """What the constructors refuse is, here, wrong in the text."""
    try:
        return make()
    except InputError as error:
        raise _wrong(place, str(error)) from error


def _wrong(place: str, reason: str) -> PlanFormatError:
    shown = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."
    return PlanFormatError(f"{place or 'The plan'}: {shown}.")


def _expected(what: str, value: object, place: str) -> PlanFormatError:
    shown = _quoted(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return _wrong(place, f"expected {what}, found {shown}")


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def _parse(text: object) -> object:
    if not isinstance(text, str):
        raise PlanFormatError(f"A plan is read from text, not from {type(text).__name__}; open the file and pass its text.")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise PlanFormatError("The text is nested too deeply for a plan.") from error
    except ValueError as error:
        told = f"The text is no JSON, or was cut short: {error}."
        raise PlanFormatError(f"{told} It reads like a path: pass the file's text." if _is_path(text) else told) from error


def _is_path(text: str) -> bool:
    """One line that ends as a file's name does."""
    return text.endswith(".json") and "\n" not in text


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    read = dict(pairs)
    if len(read) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise PlanFormatError(f"{_quoted(name)} stands twice in one object.")
    return read


def _refuse_constant(name: str) -> object:
    raise PlanFormatError(f"{name} stands in the text; numbers of a plan are finite.")


def _entries(value: object, place: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _expected("an object", value, place)
    return value


def _record(value: object, place: str, keys: tuple[str, ...]) -> dict[str, object]:
    """An object with exactly these keys."""
    entries = _entries(value, place)
    for key in entries:
        if key not in keys:
            raise _wrong(place, f"unknown key {_quoted(key)}{nearest(key[:_QUOTED], keys)}")
    for key in keys:
        if key not in entries:
            raise _wrong(place, f"{key!r} is missing")
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
        raise _wrong(place, "the number is too large")
    return number


def _items(value: object, place: str, read: Callable[[object, str], _T]) -> tuple[_T, ...]:
    if not isinstance(value, list):
        raise _expected("a list", value, place)
    return tuple(read(item, f"{place}[{index}]") for index, item in enumerate(value))


def _read_distribution(value: object, place: str) -> Distribution:
    is_mixed = _entries(value, place).get("family") == Family.MIXED.value  # the one that has more to say
    entries = _record(value, place, ("family", "mean", "std", "mixing") if is_mixed else ("family", "mean", "std"))
    families = {family.value: family for family in Family}
    family = _text(entries["family"], f"{place}.family")
    if family not in families:
        raise _wrong(f"{place}.family", f"unknown family {_quoted(family)}; known are {', '.join(families)}")
    mean, std = (_number(entries[key], f"{place}.{key}") for key in ("mean", "std"))
    mixing = _read_mixing(entries["mixing"], f"{place}.mixing") if is_mixed else None
    return checked(lambda: Distribution(family=families[family], mean=mean, std=std, mixing=mixing), place)


def _read_mixing(value: object, place: str) -> Mixing:
    entries = _record(value, place, ("stream", "rank", "columns", "matrix"))
    stream, matrix = (_text(entries[key], f"{place}.{key}") for key in ("stream", "matrix"))
    rank, columns = (_integer(entries[key], f"{place}.{key}") for key in ("rank", "columns"))
    return checked(lambda: Mixing.of_text(matrix, stream=stream, rank=rank, columns=columns), place)


def _read_block(value: object, place: str) -> Block:
    entries = _record(value, place, ("dim", "start", "stop", "distribution", "role"))
    dim, start, stop = (_integer(entries[key], f"{place}.{key}") for key in ("dim", "start", "stop"))
    distribution = _read_distribution(entries["distribution"], f"{place}.distribution")
    return Block(dim, start, stop, distribution, _text(entries["role"], f"{place}.role"))


def _read_activation(value: object, place: str) -> ActivationPlan:
    factors = ("alpha", "beta", "gamma", "delta")
    entries = _record(value, place, ("module", "module_type", *factors, "negative_slope", "derivation"))
    slope = entries["negative_slope"]
    read: dict[str, Any] = {
        "module": _text(entries["module"], f"{place}.module"),
        "module_type": _text(entries["module_type"], f"{place}.module_type"),
        **{name: _number(entries[name], f"{place}.{name}") for name in factors},
        "negative_slope": None if slope is None else _number(slope, f"{place}.negative_slope"),
        "derivation": _items(entries["derivation"], f"{place}.derivation", _text),
    }
    return checked(lambda: ActivationPlan(**read), place)


def _read_passage(value: object, place: str) -> Passage:
    entries = _record(value, place, ("origin", "forward", "backward"))
    forward, backward = (_number(entries[key], f"{place}.{key}") for key in ("forward", "backward"))
    return checked(lambda: Passage(origin=_text(entries["origin"], f"{place}.origin"), forward=forward, backward=backward), place)


def _read_parameter(name: str, value: object, place: str) -> ParameterPlan:
    keys = ("shape", "dtype", "aliases", "role", "distribution", "blocks", "output_dims", "derivation", "passage", "branches")
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
        "passage": None if entries["passage"] is None else _read_passage(entries["passage"], f"{place}.passage"),
        "branches": _integer(entries["branches"], f"{place}.branches"),
    }
    return checked(lambda: ParameterPlan(name=name, **fields), place)
