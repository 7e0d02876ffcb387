"""Where the walk starts from: what is kept, what a rule sets without looking at signals, and first guesses for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from gainstage.graph import Graph, Node, NodeKind, ParameterInfo, parameters_of_regions
from gainstage.plan import Distribution, Family
from gainstage.policies import FixedStd, Identity, Keep, ModuleDefault, NearChance, Policy, Target, Zero, module_default
from gainstage.propagate import constant_value, evaluate, parameter_value, table_value
from gainstage.roles import Merge, Role, Roles, Stream, Use, is_data
from gainstage.signal import Value
from gainstage.solve.constraint import chance_level, is_contraction, is_lookup
from gainstage.solve.setting import Setting, cut_parameters

KEPT = Distribution(family=Family.KEEP)

# A signal that is multiplied, not contracted: the parameter starts as the identity, whatever its level is for.
_SCALES = frozenset({Role.NORM_SCALE, Role.LAYER_SCALE})
_OTHERS = frozenset({Role.BIAS, Role.NORM_SHIFT, Role.KEPT, Role.LOG_SCALE, Role.SLOPE, Role.RECURRENT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """What is known of the parameters as they are.

    ``moments``: mean and variance of a parameter's values, None where there are none (meta device); ``tables``: the values
    themselves, of those that are kept as data; ``kept``: names to be left alone, with the reason.
    """

    moments: Callable[[str], tuple[float, float] | None]
    kept: Mapping[str, str]
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)


def initial_settings(graph: Graph, roles: Roles, policy: Policy, present: Present) -> dict[str, Setting]:
    """A setting for every parameter of the graph."""
    cuts = cut_parameters(roles, graph.parameters)
    start = _Start(graph, roles, policy, present, readers_of(graph), _parameter_nodes(graph), parameters_of_regions(graph))
    return {name: start.setting(info, index, *cuts[name]) for index, (name, info) in enumerate(graph.parameters.items())}


def effective_role(graph: Graph, roles: Roles, name: str) -> Role:
    """The role that chooses a target: a norm's weight that ends a branch is a scale, not a contraction."""
    role = roles.of(name)
    use = next(iter(roles.uses.get(name, ())), None)
    if use is None or role in _SCALES | _OTHERS:
        return role
    if any(is_contraction(graph.by_name[use.node]) for use in roles.uses[name]):
        return role
    scale = next((use.role for use in roles.uses[name] if use.role in _SCALES), Role.NORM_SCALE)
    return scale if role in (Role.RESIDUAL_END, Role.MERGE_END) else role


def is_weight_gain(graph: Graph, roles: Roles, name: str) -> bool:
    """Whether a parameter scales a weight that is normalised before it is contracted: it alone sets the output's level."""
    uses = roles.uses.get(name, ())
    return roles.of(name) is Role.NORM_SCALE and bool(uses) and is_contraction(graph.by_name[uses[0].node])


@dataclass(frozen=True, slots=True)
class _Start:
    graph: Graph
    roles: Roles
    policy: Policy
    present: Present
    readers: Mapping[str, tuple[Node, ...]]
    node_of: Mapping[str | None, str]
    of_regions: frozenset[str]

    def setting(self, info: ParameterInfo, index: int, dim: int, cuts: tuple[int, ...]) -> Setting:
        count = len(cuts) - 1
        blank = Setting(info=info, index=index, dim=dim, cuts=cuts, means=(0.0,) * count, variances=(0.0,) * count)
        reason = self.present.kept.get(info.name)
        if reason is not None:
            return self.kept(blank, reason)
        role = effective_role(self.graph, self.roles, info.name)
        return self.by_target(blank, role, self.policy.targets[role])

    def by_target(self, blank: Setting, role: Role, target: Target) -> Setting:
        if role is Role.UNUSED and self.graph.rung == "tape":
            return self.unseen(blank)
        if isinstance(target, Keep):
            return self.kept(blank, "nothing is known of what it is for: it reaches no output" if role is Role.UNUSED else "")
        if isinstance(target, ModuleDefault):
            return self.by_module(blank)
        if role is Role.LAYER_SCALE and not self.is_setter(blank.info.name):
            return self.kept(blank, "it scales a signal that no demand is made on")
        if role is Role.TEMPERATURE:
            return self.temperature(blank)
        if isinstance(target, Zero):
            return replace(blank, is_fixed=True)
        use = self.roles.uses[blank.info.name][0] if self.roles.uses.get(blank.info.name) else None
        if role in _SCALES or isinstance(target, Identity):
            return self.identity(blank, use)
        if isinstance(target, FixedStd):
            return self.with_std(blank, target)
        return blank.with_all(mean=0.0, variance=self.guess(blank.info, use, target))

    def guess(self, info: ParameterInfo, use: Use | None, target: Target) -> float:
        """A variance to start from: right for a unit input, so that a tied head need not go back to the embedding."""
        if use is None:
            return 1.0
        head = next((head for head in self.roles.heads if any(s.use.parameter == info.name for s in head.setters)), None)
        if head is None or not isinstance(target, NearChance):
            return 1.0 / nominal_fan_of(use, info, self.graph)
        setter = next(setter.use for setter in head.setters if setter.use.parameter == info.name)
        return chance_level(head.width, target.excess) / nominal_fan_of(setter, info, self.graph)

    def kept(self, blank: Setting, reason: str) -> Setting:
        mean, variance, said = self.statistics(blank.info)
        lines = tuple(line for line in (reason, said) if line)
        kept = blank.with_all(mean=mean, variance=variance)
        name = blank.info.name
        is_table = is_data(self.graph, name, self.roles.of(name))
        if name in self.of_regions and name in self.present.tables and not self.present.tables[name].is_meta:
            return replace(kept, is_fixed=True, given=KEPT, table=constant_value(self.present.tables[name]), lines=lines)
        table = table_value(self.present.tables[name], blank.index) if is_table and name in self.present.tables else None
        return replace(kept, is_fixed=True, given=KEPT, table=table, lines=lines)

    def statistics(self, info: ParameterInfo) -> tuple[float, float, str]:
        """Mean and variance of present values; on the meta device of what stands for them."""
        present = self.present.moments(info.name)
        if present is not None:
            return (*present, "")
        default = self.default_of(info)
        if default is not None:
            return default.mean, default.std**2, f"no values at hand: taken to be as {info.module_type} draws them"
        if len(info.shape) > 1:
            return 0.0, 0.02**2, "no values at hand: taken to have mean 0 and std 0.02"
        return 1.0, 0.0, "no values at hand: taken to be ones"

    def default_of(self, info: ParameterInfo) -> Distribution | None:
        weight = self.graph.parameters.get(f"{info.module_path}.weight" if info.module_path else "weight")
        return module_default(info, None if weight is None else weight.shape)

    def by_module(self, blank: Setting) -> Setting:
        default = self.default_of(blank.info)
        if default is None:
            return self.kept(blank, f"no reset_parameters of torch.nn is known for {blank.info.module_type}")
        drawn = blank.with_all(mean=default.mean, variance=default.std**2)
        return replace(drawn, is_fixed=True, given=default, lines=(f"as {blank.info.module_type} draws it by itself",))

    def unseen(self, blank: Setting) -> Setting:
        """A parameter that a run did not come by: weights for an input of second moment 1, others as by their module.

        What holds one number throughout is no weight, whatever its shape: a shift or a log-scale, which would shift and scale.
        """
        shape = blank.info.shape
        if len(shape) < 2:
            return self.by_module(blank)
        present = self.present.moments(blank.info.name)
        if present is not None and present[1] == 0.0:
            return self.kept(blank, "not on the path that was seen, and one number throughout")
        fan_in = math.prod(shape[1:])
        drawn = blank.with_all(mean=0.0, variance=1.0 / max(fan_in, 1))
        line = f"not on the path that was seen: Var(w) = 1 / {fan_in}, right for a contraction of an input with E[x^2] = 1"
        return replace(drawn, is_fixed=True, lines=(line,))

    def identity(self, blank: Setting, use: Use | None) -> Setting:
        if is_weight_gain(self.graph, self.roles, blank.info.name):
            return blank.with_all(mean=1.0, variance=0.0)  # such modules divide by the root of the fan-in themselves
        slope, offset, _ = (1.0, 0.0, False) if use is None else self.effect(blank, use)
        return replace(blank, slope=slope, offset=offset).with_all(mean=(1.0 - offset) / slope, variance=0.0)

    def temperature(self, blank: Setting) -> Setting:
        """Present values, to be scaled where nothing else sets the level of the logits."""
        name = blank.info.name
        if not any(setter.use.parameter == name for logits in self.roles.logits for setter in logits.temperatures):
            return self.kept(blank, "queries and keys set the level of the logits")
        mean, _, said = self.statistics(blank.info)
        slope, offset, is_exponential = self.effect(blank, self.roles.uses[name][0])
        start = replace(blank, slope=slope, offset=offset, is_exponential=is_exponential, lines=(said,) if said else ())
        return start.with_all(mean=mean, variance=0.0)

    def effect(self, blank: Setting, use: Use) -> tuple[float, float, bool]:
        """Slope and offset of what reaches the use, through casts, views and an added constant, and whether of its logarithm.

        Told by what reaches it for 0, 1 and 2.
        """
        chain, last = self.chain(blank.info.name, use.node)
        if not chain:
            return 1.0, 0.0, False
        reached = [self.reaching(blank, chain, last, number) for number in (0.0, 1.0, 2.0)]
        is_exponential = min(reached) > 0.0 and math.isclose(reached[0] * reached[2], reached[1] ** 2, rel_tol=1e-4)
        at_zero, at_one = (math.log(number) if is_exponential else number for number in reached[:2])
        return (at_one - at_zero, at_zero, is_exponential) if at_one != at_zero else (1.0, 0.0, False)

    def chain(self, parameter: str, stop: str) -> tuple[list[Node], str]:
        """Nodes between a parameter and its use that read the parameter and constants only; the last of them."""
        chain: list[Node] = []
        name = self.node_of.get(parameter, "")
        while name:
            following = [node for node in self.readers.get(name, ()) if node.name != stop]
            if any(node.name == stop for node in self.readers.get(name, ())) or len(following) != 1:
                return chain, name
            others = [self.graph.by_name[other] for other in following[0].operands() if other != name]
            if any(other.kind is not NodeKind.CONSTANT for other in others):
                return chain, name
            chain.append(following[0])
            name = following[0].name
        return chain, name

    def reaching(self, blank: Setting, chain: list[Node], last: str, number: float) -> float:
        values: dict[str, object] = {self.node_of[blank.info.name]: parameter_value(blank.info, blank.index, number, 0.0)}
        for node in chain:
            for operand in node.operands():
                if operand not in values:
                    values[operand] = evaluate(self.graph.by_name[operand], values, no_value, no_value, self.graph)
            values[node.name] = evaluate(node, values, no_value, no_value, self.graph)
        reached = values[last]
        return reached.mean if isinstance(reached, Value) else number

    def is_setter(self, name: str) -> bool:
        """Whether a parameter sets the level of a branch."""
        groups: list[Stream | Merge] = [*self.roles.streams, *self.roles.merges]
        branches = [branch for group in groups for branch in group.branches]
        return any(setter.use.parameter == name for branch in branches for setter in branch.setters)

    def with_std(self, blank: Setting, target: FixedStd) -> Setting:
        count = self.branches(blank.info.name) if target.divided else 1
        std = target.std / math.sqrt(count)
        text = f"std = {target.std:g}" + (f" / sqrt({count}) = {std:.4g}: one of {count} residual branches" if count > 1 else "")
        return replace(blank.with_all(mean=0.0, variance=std**2), is_fixed=True, lines=(text,))

    def branches(self, name: str) -> int:
        """How many branches the stream has that this parameter ends a branch of."""
        for stream in self.roles.streams:
            if any(setter.use.parameter == name for branch in stream.branches for setter in branch.setters):
                return len(stream.branches)
        return 1


def no_value(thing: object) -> Value:
    """For nodes that read neither parameters nor inputs."""
    raise AssertionError(thing)


def _parameter_nodes(graph: Graph) -> dict[str | None, str]:
    return {node.parameter: node.name for node in graph.nodes if node.kind is NodeKind.PARAMETER}


def readers_of(graph: Graph) -> dict[str, tuple[Node, ...]]:
    """Nodes that read each node, in execution order."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in dict.fromkeys(node.operands()):
            found.setdefault(name, []).append(node)
    return {name: tuple(nodes) for name, nodes in found.items()}


def nominal_fan_of(use: Use, info: ParameterInfo, graph: Graph) -> float:
    """Fan-in by the shape of the weight: the product of the dimensions that do not index outputs; 1 for a look-up."""
    if is_lookup(graph.by_name[use.node]):
        return 1.0
    return float(math.prod(size for dim, size in enumerate(info.shape) if dim not in use.output_dims))
