"""What forward stores on modules, and how to undo it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def hookable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that run in Python, by path: scripted ones take no hooks and keep no attributes."""
    return [(path, module) for path, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)]


@contextlib.contextmanager
def same_attributes(model: nn.Module) -> Iterator[None]:
    """Put back the attributes of every module, and the contents of its containers (a list that forward appends to)."""
    before = [(module, dict(module.__dict__), _contents(module)) for _, module in hookable(model)]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, entries in contents:
                _refill(container, entries)


def _contents(module: nn.Module) -> list[tuple[Any, list[Any]]]:
    """The containers of a module, also those inside of others, with what they hold."""
    found: dict[int, tuple[Any, list[Any]]] = {}
    stack = list(module.__dict__.values())
    while stack:
        value = stack.pop()
        if isinstance(value, (dict, list, set, deque)) and id(value) not in found:
            found[id(value)] = value, _entries(value)
            stack += value.values() if isinstance(value, dict) else value
    return list(found.values())


def _entries(container: Any) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _refill(container: Any, entries: list[Any]) -> None:
    now = _entries(container)
    if len(now) == len(entries) and all(_is_same(a, b) for a, b in zip(now, entries, strict=True)):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(entries)
    else:
        container.extend(entries)


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, tuple) and isinstance(b, tuple) and len(a) == 2 == len(b) and a[0] is b[0] and a[1] is b[1])
