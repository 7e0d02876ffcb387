"""What the caller measured, put to the model's inputs: tokens into the example, moments to the nodes of the graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gainstage.errors import InputError, UnknownNameError, nearest
from gainstage.inputs.statistics import InputStatistics, TokenStatistics

Measured = InputStatistics | TokenStatistics


def with_tokens(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Measured | Mapping[str, Measured] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs, with tokens in proportion to their frequencies where these were measured.

    Raises:
        InputError: no such input is among the example inputs, or it holds no integers.
    """
    named = inputs if isinstance(inputs, Mapping) else {"": inputs}
    chosen = {name: tokens for name, tokens in named.items() if isinstance(tokens, TokenStatistics)}
    if not chosen:
        return args, dict(kwargs)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    for name, tokens in chosen.items():
        found = name or next((known for known, value in bound.arguments.items() if _is_tokens(value)), "")
        if not _is_tokens(bound.arguments.get(found)):
            raise InputError(
                f"inputs: tokens were measured, and {found or 'no example input'!r} holds none of type int32 or int64"
            )
        bound.arguments[found] = tokens.drawn(bound.arguments[found])
    return bound.args, dict(bound.kwargs)


def _is_tokens(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64) and not value.is_meta


def by_name(inputs: Measured | Mapping[str, Measured] | None, known: Iterable[str]) -> dict[str, InputStatistics]:
    """Statistics for each floating-point input; those without a name are for the first.

    Args:
        inputs: as the caller gave them.
        known: names of the model's floating-point inputs, in order.

    Raises:
        UnknownNameError: no input has such a name.
        InputError: another thing than statistics.
    """
    if inputs is None:
        return {}
    named: Mapping[str, object] = inputs if isinstance(inputs, Mapping) else {next(iter(known), ""): inputs}
    for name, statistics in named.items():
        if not isinstance(statistics, (InputStatistics, TokenStatistics)):
            raise InputError(f"inputs: expected what gainstage.measure_inputs returns, found {type(statistics).__name__}")
        if isinstance(statistics, InputStatistics) and name not in known:
            raise UnknownNameError(
                f"inputs: the model has no floating-point input {name!r}{nearest(name, known)}; "
                f"it has {', '.join(known) or 'none'}"
            )
    return {name: statistics for name, statistics in named.items() if isinstance(statistics, InputStatistics)}
