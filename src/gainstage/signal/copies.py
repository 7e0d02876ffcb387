"""Copies of immutable values with changes: what the algebra does most."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import cache
from itertools import repeat
from operator import attrgetter
from types import MemberDescriptorType
from typing import Any, Protocol, TypeVar, cast

T = TypeVar("T")

_set = MemberDescriptorType.__set__


def replace(value: T, /, **changes: Any) -> T:
    """As :func:`dataclasses.replace`, in a third of its time, for a dataclass with slots; what is no argument is copied, too."""
    kind: type = type(value)
    slots, read, check = _slots_of(kind)
    made: T = object.__new__(kind)
    deque(map(_set, slots.values(), repeat(made), read(value)), 0)
    for name, change in changes.items():
        _set(slots[name], made, change)
    if check is not None:
        check(made)
    return made


class _Memory(Protocol):
    made: list[tuple[object, object, object]]  # operand, how, result


class Remembered(Protocol):
    """A value whose distribution keeps what was made of it: copies of the value share that."""

    @property
    def marginal(self) -> _Memory:
        """The distribution."""


def once(operand: Remembered, how: object, make: Callable[[], T]) -> T:
    """What was made of the very same operand in an equal way before, or what is made now.

    A part of a concatenation meets the same operations again in each layer that reads it.
    """
    made_before = operand.marginal.made
    for before, manner, result in made_before:
        if before is operand and manner == how:
            return cast("T", result)
    made = make()
    made_before.append((operand, how, made))
    return made


@cache
def _slots_of(kind: type) -> tuple[Mapping[str, MemberDescriptorType], Callable[[Any], Any], Callable[[Any], None] | None]:
    """Slots by name, what reads them all, and what checks a value that was made."""
    names: tuple[str, ...] = kind.__slots__  # type: ignore[attr-defined]
    return {name: kind.__dict__[name] for name in names}, attrgetter(*names), kind.__dict__.get("__post_init__")
