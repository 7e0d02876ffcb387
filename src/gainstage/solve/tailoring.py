"""Which activations of a network would have to be changed, and how, so that depth leaves its inputs distinguishable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch

from gainstage.graph import Graph, ModuleCall, Node
from gainstage.graph.families import argument
from gainstage.plan import ActivationPlan, TailoredActivation
from gainstage.policies import Tailoring
from gainstage.signal import Value
from gainstage.signal.quadrature import Array
from gainstage.signal.tailoring import Tailored, cosine_map, cosine_slope, leaky_cosine, tailored_slope, tailored_smooth
from gainstage.solve.network import Map, through_network

_TAILORED = f"{TailoredActivation.__module__}.{TailoredActivation.__qualname__}"
_LEAKY = frozenset({"relu", "leaky_relu"})
_SMOOTH = frozenset({"gelu", "silu", "mish", "tanh", "sigmoid", "softplus", "log_sigmoid", "celu", "elu"})
_KINKED = frozenset({"relu6", "hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "threshold", "prelu", "selu"})
_ACTIVATIONS = _LEAKY | _SMOOTH | _KINKED


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """One activation between a signal and a contraction. ``refused``: why it is not to be changed; "" where it can be."""

    node: Node  # whose result is the activation's
    path: str
    module_type: str
    values: Array  # the function that it is at present, on the grid of its Gaussian input
    refused: str = ""
    is_done: bool = False  # tailored already

    @property
    def is_leaky(self) -> bool:
        return self.node.short_name in _LEAKY

    @property
    def is_open(self) -> bool:
        return not self.refused and not self.is_done

    @property
    def negative_slope(self) -> float:
        if self.node.short_name == "relu":
            return 0.0
        given = argument(self.node, 1)
        return 0.01 if given is None else float(given)

    def function(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The activation itself, on tensors."""
        op: Any = self.node.op
        return lambda t: op(t, *self.node.args[1:], **self.node.kwargs)


def propose_activations(
    graph: Graph, values: Mapping[str, Any], between: Iterable[str], tailoring: Tailoring
) -> tuple[tuple[ActivationPlan, ...], tuple[str, ...]]:
    """Changes to activation modules, and notes for what is left alone.

    Args:
        graph: the captured model.
        values: results of its nodes.
        between: nodes that lie between the place where a signal arises and a contraction that reads it.
        tailoring: what the network's map of cosines is to be.
    """
    sites = list(_sites(graph, values, set(between)))
    solver = _Solver(graph, values, sites, tailoring)
    if not sites or not solver.is_needed():
        return (), ("activations are left as they are: at this depth inputs stay distinguishable",)
    notes = [
        f"activations: {site.node.op_name} in {site.node.provenance} is not tailored: {site.refused}"
        for site in sites
        if site.refused
    ]
    open_sites = [site for site in sites if site.is_open]
    changes = [*solver.leaky([s for s in open_sites if s.is_leaky]), *solver.smooth([s for s in open_sites if not s.is_leaky])]
    return tuple(changes), (*dict.fromkeys(notes), *solver.notes)


def _sites(graph: Graph, values: Mapping[str, Any], between: set[str]) -> Iterator[_Site]:
    """Activations on the way of the signal; those that gate another tensor, or make an output, are none."""
    own = {(call.path, call.outputs) for call in graph.calls if call.module_type.startswith("torch.nn.modules.activation.")}
    inside = {name for call in graph.calls if call.module_type == _TAILORED for name in _nodes_of(graph, call)}
    for call in graph.calls:
        if call.module_type == _TAILORED and call.outputs and call.outputs[0] in between:
            node = graph.by_name[call.outputs[0]]
            yield _Site(node=node, path=call.path, module_type=_TAILORED, values=_grid(values, node), is_done=True)
    for node in graph.nodes:
        if node.name not in between or node.name in inside or node.short_name not in _ACTIVATIONS:
            continue
        path, kind = node.provenance.module_path, node.provenance.module_type
        refused = _refusal(node, is_module=(path, (node.name,)) in own)
        yield _Site(node=node, path=path, module_type=kind, values=_grid(values, node), refused=refused)


def _nodes_of(graph: Graph, call: ModuleCall) -> Iterator[str]:
    prefix = f"{call.path}."
    for node in graph.nodes:
        path = node.provenance.module_path
        if path == call.path or path.startswith(prefix):
            yield node.name


def _grid(values: Mapping[str, Any], node: Node) -> Array:
    value = values[node.name]
    assert isinstance(value, Value)
    return value.marginal.values


def _refusal(node: Node, *, is_module: bool) -> str:
    """Why an activation is not to be changed; "" where it can be."""
    name = node.short_name
    if not is_module:
        return "it is a function inside of forward, not a module of torch.nn of its own"
    if name in _KINKED:
        return "its kinks leave no smooth family to solve in"
    if name == "elu" and float(argument(node, 1) or 1.0) != 1.0:
        return "it has a kink where its slope is not 1"
    return ""


class _Solver:
    """The maps of one network, with some of its activations changed."""

    def __init__(self, graph: Graph, values: Mapping[str, Any], sites: list[_Site], tailoring: Tailoring) -> None:
        self.graph = graph
        self.values = values
        self.sites = sites
        self.tailoring = tailoring
        self.notes: list[str] = []
        self.cosine = self._network(0.0, {site.node.name: cosine_map(site.values) for site in sites})
        slopes = {site.node.name: partial(_times, cosine_slope(site.values)) for site in sites}
        self.slope = self._network(1.0, slopes)

    def _network(self, start: float, maps: Mapping[str, Map]) -> float:
        return through_network(self.graph, self.values, start, maps)

    def is_needed(self) -> bool:
        """Whether the network as it is makes inputs alike, or tears them apart."""
        return self.cosine > self.tailoring.cosine or self.slope > self.tailoring.slope

    def present(self) -> str:
        return f"as it is, the network takes cosine 0 to {self.cosine:.4g}, and multiplies small differences by {self.slope:.3g}"

    def leaky(self, sites: list[_Site]) -> Iterator[ActivationPlan]:
        """ReLUs, by their slope: smooth ones keep cosines once they are tailored, others do what they do."""
        if not sites:
            return
        others = {site.node.name: cosine_map(site.values) for site in self.sites if not site.is_open}
        names = [site.node.name for site in sites]

        def network(change: Map) -> float:
            return self._network(0.0, others | dict.fromkeys(names, change))

        if network(lambda c: c) > self.tailoring.cosine:
            self.notes.append("activations: those that are not tailored alone make inputs alike: no slope of the others helps")
            return
        slope = tailored_slope(network, self.tailoring.cosine, min(site.negative_slope for site in sites))
        reached = network(partial(leaky_cosine, slope))
        gamma = sqrt(2.0 / (1.0 + slope**2))
        lines = (
            "C(c) = c + (1 - a)^2 / (pi (1 + a^2)) (sqrt(1 - c^2) - c arccos c) maps cosines through LeakyReLU of slope a",
            f"a = {slope:.6g} takes cosine 0 to {reached:.4g} through the whole network (Zhang et al. 2022, arXiv:2203.08120)",
            f"gamma = sqrt(2 / (1 + a^2)) = {gamma:.6g}, so that E[y^2] = E[x^2]",
            self.present(),
        )
        for site in {site.path: site for site in sites}.values():
            yield ActivationPlan(
                module=site.path, module_type=site.module_type, gamma=gamma, negative_slope=slope, derivation=lines
            )

    def smooth(self, sites: list[_Site]) -> Iterator[ActivationPlan]:
        """Smooth activations: curvatures add up along the network where every slope is 1."""
        depth = self._network(0.0, dict.fromkeys((site.node.name for site in sites), _one_more))
        if depth <= 0.0:
            return
        curvature = self.tailoring.curvature / depth
        solved: dict[Any, Tailored | None] = {}
        for site in {site.path: site for site in sites}.values():
            key = (site.node.op, repr((site.node.args[1:], site.node.kwargs)))
            if key not in solved:
                solved[key] = tailored_smooth(site.function(), curvature)
            found = solved[key]
            if found is None:
                self.notes.append(f"activations: no alpha, beta, gamma, delta solve the conditions for {site.path}")
                continue
            lines = (
                "g = gamma f(alpha x + beta) + delta with E[g^2] = E[g g' z] = E[g'^2] = 1, E[g''^2] = curvature, x = z normal",
                f"curvature = {self.tailoring.curvature:g} / {depth:.4g} in a row: {curvature:.4g} (arXiv:2203.08120)",
                self.present(),
            )
            yield ActivationPlan(
                module=site.path, module_type=site.module_type, alpha=found.alpha, beta=found.beta, gamma=found.gamma,
                delta=found.delta, derivation=lines,
            )  # fmt: skip


def _times(factor: float, number: float) -> float:
    return factor * number


def _one_more(number: float) -> float:
    return number + 1.0
