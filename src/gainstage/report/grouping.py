"""Repeated blocks as one row: ``layers.0.fc``, ``layers.1.fc`` ... become ``layers.{0..47}.fc``. Pure functions on dotted names.

A pattern stands for exactly its members: the numbers in braces multiply out to the names of the group, no more and no fewer.
``{0..9}`` is a run, ``{0..9..3}`` a run with a step, ``{0..2,7}`` a list of runs.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

_INDEX = re.compile(r"0|[1-9][0-9]*")  # "07" is a name, not a number: it would not be written back as it was

_Template = tuple[str | None, ...]  # the components of a name, None in place of a number


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are shown as one: the pattern of their names, and their positions in the input, ascending."""

    pattern: str
    members: tuple[int, ...]


def group_names(names: Sequence[str], keys: Sequence[Hashable]) -> tuple[Group, ...]:
    """Group names that differ only in numeric components and have the same key.

    Args:
        names: distinct dotted names, such as module paths or parameter names.
        keys: for each name, what the rows of one group must agree on, such as type and shape.

    Returns:
        Groups in the order of their first members; each name is in exactly one of them.
    """
    alike: dict[tuple[_Template, Hashable], dict[tuple[int, ...], int]] = {}
    for position, (name, key) in enumerate(zip(names, keys, strict=True)):
        components = name.split(".")
        template = tuple(None if _INDEX.fullmatch(component) else component for component in components)
        indices = tuple(int(component) for component in components if _INDEX.fullmatch(component))
        alike.setdefault((template, key), {})[indices] = position
    groups = [
        Group(_pattern(template, block), tuple(sorted(positions[indices] for indices in _multiply(block))))
        for (template, _), positions in alike.items()
        for block in _products(frozenset(positions))
    ]
    return tuple(sorted(groups, key=lambda group: group.members[0]))


def _products(indices: frozenset[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Cut a set of index tuples into Cartesian products, each a tuple of ascending index lists."""
    if indices == {()}:
        return [()]
    last_by_head: dict[tuple[int, ...], list[int]] = {}
    for *head, last in sorted(indices):
        last_by_head.setdefault(tuple(head), []).append(last)
    heads_by_last: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for first, lasts in last_by_head.items():
        heads_by_last.setdefault(tuple(lasts), set()).add(first)
    return [(*block, lasts) for lasts, heads in heads_by_last.items() for block in _products(frozenset(heads))]


def _multiply(block: tuple[tuple[int, ...], ...]) -> Iterable[tuple[int, ...]]:
    if not block:
        yield ()
        return
    for head in _multiply(block[:-1]):
        for last in block[-1]:
            yield (*head, last)


def _pattern(template: _Template, block: tuple[tuple[int, ...], ...]) -> str:
    numbers = iter(block)
    return ".".join(_braces(next(numbers)) if component is None else component for component in template)


def _braces(indices: tuple[int, ...]) -> str:
    """Shortest notation for ascending indices."""
    if len(indices) == 1:
        return str(indices[0])
    steps = {after - before for before, after in pairwise(indices)}
    if len(indices) > 2 and len(steps) == 1 and steps != {1}:
        return f"{{{indices[0]}..{indices[-1]}..{steps.pop()}}}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return "{" + ",".join(",".join(map(str, run)) if len(run) < 3 else f"{run[0]}..{run[-1]}" for run in runs) + "}"
