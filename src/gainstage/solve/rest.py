"""Biases at which a flow rests: with weights of zero its scales are 1, and its log-determinant is 0 whatever the input is.

A library's function of a scale need not be 1 at 0 (softplus is log 2 there), nor the slope between a spline's bins. The bias c of
such a network's last layer is where

    E[l(c)^2] is least,     l(c): the layer's term of the log-determinant, its weights zero, over inputs,

found on real tensors, layer by layer. It is taken where it brings the term to nothing and leaves it a slope: functions that are
bounded by 1, as a sigmoid is, come near it where they hardly move any more, and are left where their library put them. On the way
there the deviation that is asked of the log-determinant takes outputs so wide that the bend of the function counts, and how far
from Gaussian they are: at half of its slope that of four layers comes out a tenth too large, at a quarter half as large again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import torch

from gainstage.graph import Graph, Node, NodeKind
from gainstage.graph.families import CONTRACTIONS
from gainstage.propagate.host import run_on_host
from gainstage.propagate.interpret import resolve
from gainstage.roles import Role, Roles, Setter
from gainstage.signal import Value
from gainstage.signal.sampling import draw
from gainstage.solve.priors import constants_value
from gainstage.solve.setting import Setting

_SILENT = 1e-4  # rms of a term that is as good as 0: rounding
_GONE = 1e-2  # what may be left of the rms of a term
_LIVELY = 0.25  # of the slope at a bias of 0: what must be left of it
_REACH = 4.0  # biases that are tried, on either side
_STEP = 0.05  # for slopes


def resting_biases(
    graph: Graph,
    roles: Roles,
    settings: Mapping[str, Setting],
    tables: Mapping[str, torch.Tensor],
    source: Callable[[Node], Value],
) -> dict[str, Setting]:  # fmt: skip
    """Settings of the biases of scales that are not at rest at 0.

    Args:
        graph: of a flow.
        roles: with its log-determinant.
        settings: of all parameters.
        tables: values of parameters, for those that are kept.
        source: statistics of inputs that are not at hand.
    """
    assert roles.log_determinant is not None
    if any(node.kind is NodeKind.CONSTANT and node.value is not None and node.value.is_meta for node in graph.nodes):
        return {}
    run = _Run(graph, roles, settings, tables, source)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            run.run()
    except (RuntimeError, IndexError, ValueError, TypeError):
        return {}  # an operation that does not run apart from the model
    return run.found


@final
@dataclass(slots=True)
class _Run:
    """One pass over real tensors, which stops at each scale network's last layer to look for its bias."""

    graph: Graph
    roles: Roles
    settings: Mapping[str, Setting]
    tables: Mapping[str, torch.Tensor]
    source: Callable[[Node], Value]
    silent: frozenset[str] = field(init=False)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    values: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Name the weights that are to be zero."""
        determinant = self.roles.log_determinant
        assert determinant is not None
        self.silent = frozenset(setter.use.parameter for setter in (*determinant.setters, *determinant.shifts))

    def run(self) -> None:
        determinant = self.roles.log_determinant
        assert determinant is not None
        setters = {setter.use.node: setter for setter in determinant.setters}
        terms = self.terms(determinant.node)
        for node in self.graph.nodes:
            self.settled(node)
            if node.name in setters:
                self.settle(node, setters[node.name], terms)

    def settled(self, node: Node) -> None:
        """Have the value of a node, once."""
        if node.name not in self.values:
            self.values[node.name] = self.compute(node, self.values) if node.kind is NodeKind.OP else self.given(node)

    def given(self, node: Node) -> Any:
        """A parameter as it is set, weights of scales and shifts zero; a constant; an input, drawn where it is not at hand."""
        if node.parameter is not None:
            setting = self.settings[node.parameter]
            if setting.given is not None and node.parameter in self.tables:
                return self.tables[node.parameter].detach().cpu()
            deviation = 0.0 if node.parameter in self.silent else setting.variance**0.5
            drawn = setting.mean + deviation * torch.from_numpy(self.random.standard_normal(setting.info.shape))
            return drawn.to(setting.info.dtype)
        if node.value is not None and not node.value.is_meta:
            return node.value.detach().cpu()
        return draw([self.source(node)], self.random)[0].float()

    def compute(self, node: Node, values: Mapping[str, Any]) -> Any:
        arguments = [resolve(argument, values) for argument in node.args]
        return run_on_host(node, arguments, {name: resolve(argument, values) for name, argument in node.kwargs.items()})

    def terms(self, determinant: str) -> list[str]:
        """Terms of the sum that the log-determinant is, in order."""
        found, stack = set(), [determinant]
        while stack:
            node = self.graph.by_name[stack.pop()]
            if node.op_name.startswith("aten.add"):
                stack += node.operands()
            else:
                found.add(node.name)
        return [node.name for node in self.graph.nodes if node.name in found]

    def settle(self, node: Node, setter: Setter, terms: Sequence[str]) -> None:
        """Look for the bias of one layer, and go on with it."""
        bias = self.bias_of(node)
        between, term = self.way(node, terms)
        if bias is None or term is None:
            return
        rows = torch.zeros(bias.info.shape)
        for start, stop in setter.use.rows or ((0, len(rows)),):
            rows[start:stop] = 1.0
        still = self.values[node.name]
        spatial = still.dim() - 2 if node.op_name.startswith("aten.conv") else 0
        whole = rows.reshape([-1, *[1] * spatial])

        def of(c: float) -> torch.Tensor:
            values = {**self.values, node.name: still + (c * whole).to(still.dtype)}
            for other in between:
                values[other.name] = self.compute(other, values)
            result: torch.Tensor = values[term]
            return result.double()

        c = rest_of(of)
        if c != 0.0:
            self.values[node.name] = still + (c * whole).to(still.dtype)
            self.found[bias.info.name] = _resting(bias, rows, c)

    def bias_of(self, node: Node) -> Setting | None:
        """The bias of a layer, where it starts at zero and is free to be set."""
        for name in node.operands():
            parameter = self.graph.by_name[name].parameter
            if parameter is not None and self.roles.of(parameter) is Role.BIAS:
                setting = self.settings[parameter]
                is_free = setting.given is None and setting.mean == setting.variance == 0.0 and len(setting.info.shape) == 1
                return setting if is_free and parameter not in self.found else None
        return None

    def way(self, node: Node, terms: Sequence[str]) -> tuple[list[Node], str | None]:
        """Operations from a layer's output to the first term that it reaches without a contraction; what they read is settled."""
        reached = {node.name}
        for other in self.graph.nodes:
            if other.short_name not in CONTRACTIONS and any(name in reached for name in other.operands()):
                reached.add(other.name)
        term = next((name for name in terms if name in reached), None)
        leading = {term}
        for other in reversed(self.graph.nodes):
            if other.name in leading and other.name not in self.values:
                leading.update(other.operands())
        missing = [other for other in self.graph.nodes if other.name in leading and other.name not in self.values]
        for other in missing:
            if other.name not in reached:
                self.settled(other)
        return [other for other in missing if other.name in reached], term


def rest_of(term: Callable[[float], torch.Tensor]) -> float:
    """The c at which a term is nothing and can still move, else 0."""

    def size(c: float) -> float:
        return math.sqrt(float(term(c).square().mean()))

    def slope(c: float) -> float:
        return math.sqrt(float((term(c + _STEP) - term(c - _STEP)).square().mean()))

    present = size(0.0)
    if not _SILENT < present < math.inf:
        return 0.0
    step = _REACH / 8.0
    nearest = min((step * k for k in range(-8, 9)), key=size)
    c = _least(size, nearest - step, nearest + step)
    is_rest = size(c) < max(_GONE * present, _SILENT) and slope(c) > _LIVELY * slope(0.0)
    return c if is_rest else 0.0


def _least(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-6) -> float:
    """Where a function with one minimum between two points has it, by golden sections."""
    ratio = (5.0**0.5 - 1.0) / 2.0
    while high - low > tolerance:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if function(left) < function(right) else (left, high)
    return (low + high) / 2.0


def _resting(setting: Setting, rows: torch.Tensor, c: float) -> Setting:
    line = f"b = {c:.4g} where it makes scales: there the library's functions of it are 1, and with weights of zero log det is 0"
    if bool(rows.all()):
        return replace(setting.with_all(mean=c, variance=0.0), is_fixed=True, lines=(*setting.lines, line))
    known = c * rows.double()
    start = setting.with_all(mean=float(known.mean()), variance=float(known.var(correction=0)))
    numbers = tuple(known.tolist())
    return replace(start, is_fixed=True, prior=numbers, table=constants_value(numbers), lines=(*setting.lines, line))
