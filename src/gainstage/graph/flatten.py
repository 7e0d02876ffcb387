"""One order for the tensors of a structured value, so that a captured call and a forward hook count alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """Tensors of a structured value, in order: pytree's order, and fields in order for dataclasses pytree does not know.

    Args:
        value: what a module takes or returns: tensors, containers, dataclasses, anything. Objects of other
            classes (a key-value cache, a number, None) hold no tensors in this sense.

    Returns:
        The tensors, repetitions included.
    """
    return list(_walk(value))


def _walk(value: Any) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for member in dataclasses.fields(leaf):
                yield from _walk(getattr(leaf, member.name))
