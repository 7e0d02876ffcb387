"""Whether two captures of one model found the same."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from gainstage.graph.model import Graph, Node
from gainstage.graph.real import dense
from gainstage.graph.region import Region


def is_same(graph: Graph, other: Graph) -> bool:
    """Tell whether two graphs agree in everything: operations, their arguments, known values, what was assumed."""
    return all(_is_equal(getattr(graph, part.name), getattr(other, part.name)) for part in fields(Graph) if part.init)


def _is_equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    match one:
        case torch.Tensor():
            return _has_equal_values(one, other)
        case Node() | Region():
            return all(_is_equal(getattr(one, part.name), getattr(other, part.name)) for part in fields(one) if part.init)
        case dict():
            return one.keys() == other.keys() and all(_is_equal(item, other[key]) for key, item in one.items())
        case list() | tuple():
            return len(one) == len(other) and all(_is_equal(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


def _has_equal_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_meta or other.is_meta or one.dtype is not other.dtype or one.layout is not other.layout:
        return False
    return torch.equal(dense(one), dense(other))
