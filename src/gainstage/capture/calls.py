"""Module calls: which nodes hold what each call returned."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from torch import nn

from gainstage.capture.lowered import CallMark, Lowered
from gainstage.graph import ModuleCall


def canonical_paths(model: nn.Module) -> dict[str, str]:
    """Module path -> first path of the same module, for modules that stand in several places."""
    first: dict[int, str] = {}
    return {path: first.setdefault(id(module), path) for path, module in model.named_modules(remove_duplicate=False)}


def module_calls(lowered: Lowered, varying: AbstractSet[str], model: nn.Module) -> tuple[ModuleCall, ...]:
    """The calls of modules that made a node, in the order in which they return.

    Args:
        lowered: nodes with the marks of the calls that returned them.
        varying: names of the nodes that are in the graph and no constants.
        model: the module itself, for the types.

    Returns:
        One entry per call; constants and dropped values are left out of its outputs, and ``positions`` counts them.
    """
    returned: dict[tuple[str, int], dict[int, str]] = {}
    own: set[tuple[str, int]] = set()
    for node in lowered.nodes:
        for mark in lowered.marks.get(node.name, ()):
            if mark.path and node.name in varying:
                returned.setdefault((mark.path, mark.call), {})[mark.position] = node.name
                if any(path == mark.path for path, _ in lowered.stacks.get(node.name, ())):
                    own.add((mark.path, mark.call))
    returned[("", 0)] = {position: name for position, name in enumerate(lowered.outputs) if name in varying}
    types = {path: type(module) for path, module in model.named_modules()}
    return tuple(
        ModuleCall(
            path=path,
            call=call,
            module_type=f"{types[path].__module__}.{types[path].__qualname__}",
            outputs=tuple(name for _, name in sorted(places.items())),
            positions=tuple(sorted(places)),
        )
        for (path, call), places in returned.items()
        if (path, call) in own or not path
    )


def marks_by_readers(lowered: Lowered) -> dict[str, list[CallMark]]:
    """Marks where none were recorded: a call returned what it made and what is read outside of it, in order."""
    readers: dict[str, list[frozenset[tuple[str, int]]]] = {name: [frozenset()] for name in lowered.outputs}
    for node in lowered.nodes:
        for name in node.operands():
            readers.setdefault(name, []).append(frozenset(lowered.stacks.get(node.name, ())))
    marks: dict[str, list[CallMark]] = {}
    counts: dict[tuple[str, int], int] = {}
    for node in lowered.nodes:
        for path, call in lowered.stacks.get(node.name, ()):
            if path and any((path, call) not in stack for stack in readers.get(node.name, ())):
                position = counts[path, call] = counts.get((path, call), -1) + 1
                marks.setdefault(node.name, []).append(CallMark(path, call, position))
    return marks
