"""Replaces writes in place by values: after it, every node means the same at any time.

Memory is followed through the storages that export's fake tensors share. A value that shares the memory of an operand is
a view of it; the views of one root form a family. A write into a member makes a new value for the root (a slice is
scattered back), and the other members are read from it again, by repeating their view operations, when they are used.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch._ops import OpOverload

from gainstage.capture.lowered import CallMark, Lowered
from gainstage.capture.views import is_identity, scatter_into_base
from gainstage.capture.writes import Step, functional_write, is_handle_change, written_operand
from gainstage.graph import Node, NodeKind, Ref


class NotFunctional(Exception):  # noqa: N818 - a signal to choose another way, not an error
    """A write that cannot be expressed as a value here; carries the node."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node


def functionalise(lowered: Lowered) -> Lowered:
    """The same computation without writes in place.

    Args:
        lowered: nodes as exported.

    Returns:
        Nodes of which none changes an operand; outputs and marks refer to the values that a user would see.

    Raises:
        NotFunctional: a write through a view that cannot be scattered back, or an operation that writes elsewhere.
    """
    if not any(_is_write(node) for node in lowered.nodes):
        return lowered
    families = _Families(lowered)
    marks: dict[str, list[CallMark]] = {}
    stacks = dict(lowered.stacks)
    for node in lowered.nodes:
        before = len(families.nodes)
        families.take(node)
        value = families.value_of[node.name]
        marks.setdefault(value, []).extend(lowered.marks.get(node.name, ()))
        stacks.update((made.name, lowered.stacks[node.name]) for made in families.nodes[before:])
    outputs = [families.read(name) for name in lowered.outputs]
    return dataclasses.replace(lowered, nodes=families.nodes, outputs=outputs, marks=marks, stacks=stacks)


def _is_write(node: Node) -> bool:
    return isinstance(node.op, OpOverload) and node.op._schema.is_mutable


class _Families:
    """Which values share memory, and which node holds each one's present contents."""

    def __init__(self, lowered: Lowered) -> None:
        self.nodes: list[Node] = []
        self.value_of: dict[str, str] = {}  # name in the exported graph -> node that holds its contents
        self._storages = lowered.storages
        self._definitions: dict[str, Node] = {}  # exported name -> exported node
        self._metas: dict[str, Any] = {}  # node -> meta
        self._base: dict[str, str] = {}  # view -> what it is a view of
        self._root: dict[str, str] = {}
        self._version: dict[str, int] = {}  # of a root: how often its memory was written
        self._valid: dict[str, int] = {}  # the version that value_of belongs to
        self._taken = {node.name for node in lowered.nodes}

    def take(self, node: Node) -> None:
        """Take over one node of the exported graph."""
        self._definitions[node.name] = node
        if _is_write(node):
            self._take_write(node)
            return
        storage = self._storages.get(node.name)
        shared = (name for name in node.operands() if storage is not None and self._storages.get(name) == storage)
        self._join(node, next(shared, None) or _returned_operand(node))
        self._append(self._present(node))
        self._hold(node.name, node.name)

    def read(self, name: str) -> str:
        """The node that holds the present contents of an exported value, made anew if a write has gone over it."""
        if self._valid[name] != self._version[self._root[name]]:  # never so for a root
            definition = self._definitions[name]
            if is_identity(definition):
                self._hold(name, self.read(self._base[name]))
            elif steps := functional_write(self._present(definition), self._metas) if _is_write(definition) else None:
                self._hold(name, self._append_steps(steps, dataclasses.replace(definition, name=self._fresh(name))))
            else:
                renewed = dataclasses.replace(self._present(definition), name=self._fresh(name))
                self._append(renewed)
                self._hold(name, renewed.name)
        return self.value_of[name]

    def _take_write(self, node: Node) -> None:
        target = written_operand(node)
        if target is None:
            raise NotFunctional(node)
        self._join(node, target.name)
        present = self._present(node)
        if self._is_data(target.name):  # what is written to parameter.data is the parameter's own value, and takes its gradient
            present = dataclasses.replace(present, args=(Ref(self.read(self._base[target.name])), *present.args[1:]))
        steps = functional_write(present, self._metas)
        if steps is None:
            raise NotFunctional(node)
        value = self._append_steps(steps, node) or present.args[1].name  # no step: the value is what was copied
        if not is_handle_change(node):
            self._write(target.name, value, node)
        self._hold(node.name, value)

    def _is_data(self, name: str) -> bool:
        """Whether a value is a parameter outside of autograd."""
        is_detached = self._definitions[name].op is torch.ops.aten.detach.default
        return is_detached and self._definitions[self._base[name]].kind is NodeKind.PARAMETER

    def _write(self, name: str, value: str, writer: Node) -> None:
        """Give an exported value new contents, and its root accordingly."""
        if name not in self._base:
            self._version[name] += 1
        else:
            base, view = self._base[name], self._definitions[name]
            if view.op is operator.getitem and isinstance(self._definitions[base].meta, tuple):
                base = self._base.get(base, base)  # a piece of a split is a view of what was split
            self._write(base, self._merged(view, base, value, writer), writer)
        self._hold(name, value)

    def _merged(self, view: Node, base: str, value: str, writer: Node) -> str:
        if is_identity(view):
            return value
        present_base = self.read(base)
        source = self._definitions[view.args[0].name] if view.op is operator.getitem else view
        steps = scatter_into_base(view, source, Ref(present_base), self._metas[present_base], Ref(value))
        if steps is None:
            raise NotFunctional(writer)
        merged = self._append_steps(steps, dataclasses.replace(writer, name=self._fresh(f"{writer.name}_merged")))
        assert merged
        return merged

    def _append_steps(self, steps: tuple[Step, ...], origin: Node) -> str:
        """Append steps, each reading the one before it where it says PREVIOUS; the last takes the name of the origin."""
        name = ""
        for number, step in enumerate(steps):
            previous, name = name, origin.name if number == len(steps) - 1 else self._fresh(origin.name)
            args = tuple(Ref(previous) if argument is Step.PREVIOUS else argument for argument in step.args)
            self._append(dataclasses.replace(origin, name=name, op=step.op, args=args, kwargs=step.kwargs, meta=step.meta))
        return name

    def _present(self, node: Node) -> Node:
        """The node, reading the present contents of its operands."""
        if all(self.read(name) == name for name in node.operands()):
            return node
        return dataclasses.replace(
            node, args=self._replaced(node.args), kwargs={key: self._replaced(item) for key, item in node.kwargs.items()}
        )

    def _replaced(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            return Ref(self.read(argument.name))
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._replaced(item) for item in argument)
        return argument

    def _append(self, node: Node) -> None:
        self.nodes.append(node)
        self._metas[node.name] = node.meta

    def _join(self, node: Node, base: str | None) -> None:
        if base is None:
            self._root[node.name] = node.name
            self._version[node.name] = 0
        else:
            self._base[node.name] = base
            self._root[node.name] = self._root[base]

    def _hold(self, name: str, value: str) -> None:
        self.value_of[name] = value
        self._valid[name] = self._version[self._root[name]]

    def _fresh(self, name: str) -> str:
        number = 1
        while f"{name}_v{number}" in self._taken:
            number += 1
        self._taken.add(f"{name}_v{number}")
        return f"{name}_v{number}"


def _returned_operand(node: Node) -> str | None:
    """The operand that an idle dropout hands back as it is; export's fake tensors do not show it."""
    operand = node.args[0] if node.args else None
    return operand.name if is_identity(node) and isinstance(operand, Ref) and "dropout" in node.op_name else None
