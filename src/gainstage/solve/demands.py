"""From roles and a policy to demands: which parts of which parameters are scaled for what. Each part answers to one demand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from gainstage.errors import RoleConflictError
from gainstage.graph import Graph, NodeKind, TensorMeta
from gainstage.policies import EqualContribution, FanScaled, KeyVariance, Level, NearChance, Policy, StreamShare
from gainstage.roles import Branch, Head, Logits, Merge, Role, Roles, Setter, Stream, Use
from gainstage.solve.constraint import Demand, Goal, Kind, Lever, Own, Quantity, chance_level, is_contraction
from gainstage.solve.initial import is_weight_gain
from gainstage.solve.setting import Part, Setting, covers, parts_of
from gainstage.solve.shares import check_shares, relative_shares, share_of

# Levels that gradients may have a say in. Elsewhere the level is about what the signal means: how peaked an attention is, how far
# a gate opens, which share a branch has, how near chance a head is.
_BALANCED = frozenset({Role.DEPTHWISE, Role.HIDDEN})

# Roles that a structure of the graph gives a weight, and what it demands. Any other role yields to them. A branch of a stream and
# one of a merge are alike: the first turn of an unrolled iteration merges with its input, the later ones add to a stream.
_DEMANDING = {
    Role.TIED_HEAD: Kind.HEAD,
    Role.OUTPUT_HEAD: Kind.HEAD,
    Role.QUERY: Kind.LOGITS,
    Role.KEY: Kind.LOGITS,
    Role.RESIDUAL_END: Kind.STREAM,
    Role.MERGE_END: Kind.STREAM,
}


@dataclass(frozen=True)
class Demands:
    """All demands on one model, and what answers to each."""

    levels: tuple[Demand, ...]
    own: tuple[Own, ...]

    @cached_property
    def own_of(self) -> Mapping[str, Own]:
        """By the name of the parameter."""
        return {own.use.parameter: own for own in reversed(self.own)}

    @cached_property
    def answering(self) -> Mapping[str, Sequence[tuple[Demand, Sequence[Part]]]]:
        """Demands that a parameter answers to, and with which parts, by its name."""
        found: dict[str, list[tuple[Demand, list[Part]]]] = {}
        for demand in self.levels:
            parts: dict[str, list[Part]] = {}
            for part in (lever.part for group in demand.groups for lever in group):
                parts.setdefault(part[0], []).append(part)
            for name, own in parts.items():
                found.setdefault(name, []).append((demand, own))
        return found


def collect_demands(
    graph: Graph, roles: Roles, policy: Policy, settings: Mapping[str, Setting], logdet_std: float | None = None
) -> Demands:
    """What the policy demands of this model, in the order in which parts are claimed.

    The log-determinant of a flow and a tied head go first; then attention logits, residual streams, merges (an outer one before
    those inside of it) and the other heads; what is left answers to its own contraction.
    """
    check_shares(policy.shares, roles, graph)
    claims = _Claims(graph, roles, policy, settings)
    if logdet_std:
        claims.determinant(logdet_std)
    tied = [head for head in roles.heads if _is_tied(head, roles)]
    for head in tied:
        claims.head(head, Role.TIED_HEAD)
    for logits in roles.logits:
        claims.logits(logits)
    for stream in roles.streams:
        claims.stream(stream)
    for merge, _ in sorted(claims.merged, key=lambda pair: -len(pair[1])):
        claims.merge(merge)
    for head in roles.heads:
        if head not in tied:
            claims.head(head, Role.OUTPUT_HEAD)
    for use in claims.weight_gains.values():
        claims.gain(use)
    return Demands(tuple(claims.levels), tuple(claims.own()))


def _is_tied(head: Head, roles: Roles) -> bool:
    return any(roles.of(setter.use.parameter) is Role.TIED_HEAD for setter in head.setters)


@dataclass(slots=True)
class _Claims:
    graph: Graph
    roles: Roles
    policy: Policy
    settings: Mapping[str, Setting]
    levels: list[Demand] = field(default_factory=list)
    taken: dict[Part, Use] = field(default_factory=dict)
    carriers: set[str] = field(init=False)
    weight_gains: Mapping[str, Use] = field(init=False)  # by the contraction
    merged: Sequence[tuple[Merge, set[Part]]] = field(init=False)  # and all parts that set a level of its branches

    def __post_init__(self) -> None:
        self.carriers = _carriers(self.graph)
        self.merged = [
            (merge, {lever.part for branch in merge.branches for lever in self.levers(branch.setters)})
            for merge in self.roles.merges
        ]
        self.weight_gains = {
            uses[0].node: uses[0] for name, uses in self.roles.uses.items() if is_weight_gain(self.graph, self.roles, name)
        }

    def levers(self, setters: Iterable[Setter]) -> tuple[Lever, ...]:
        """Parts of these setters that may be scaled, free or taken."""
        found: dict[Part, Lever] = {}
        for setter in setters:
            setting = self.settings[setter.use.parameter]
            if setting.is_fixed or setter.power == 0.0:
                continue
            for part in parts_of(setter.use, setting.cuts):
                found.setdefault(part, Lever(part, setter.use, setter.power))
        return tuple(found.values())

    def free(self, levers: Sequence[Lever]) -> tuple[Lever, ...]:
        """Those that answer to no demand yet.

        Raises:
            RoleConflictError: there is none, as all answer to a demand of another kind through another use.
        """
        free = tuple(lever for lever in levers if lever.part not in self.taken)
        if levers and not free:
            pairs = [(self.taken[lever.part], lever.use) for lever in levers]
            if all(_contradict(taken, use) for taken, use in pairs):
                raise _conflict(*pairs[0])
        return free

    def claim(self, demand: Demand) -> None:
        """Add a demand; its parts answer to it alone."""
        self.levels.append(demand)
        self.taken.update({lever.part: lever.use for group in demand.groups for lever in group})

    def target(self, role: Role) -> object:
        return self.policy.targets[role]

    def head(self, head: Head, role: Role) -> None:
        target = self.target(role)
        levers = self.free(self.levers(head.setters))
        if isinstance(target, NearChance) and levers:
            goal = Goal(constant=chance_level(head.width, target.excess))
            is_tied = role is Role.TIED_HEAD and head.width > 1
            self.claim(
                Demand(
                    kind=Kind.HEAD,
                    node=head.output,
                    quantity=Quantity.LOSS_ABOVE_CHANCE if is_tied else Quantity.SECOND_MOMENT,
                    goal=goal,
                    groups=(levers,),
                    width=head.width,
                    prior=self.prior_square(head),
                )
            )

    def prior_square(self, head: Head) -> float:
        """Mean square of the class priors in the head's bias, which add to what its weight makes."""
        biases = (setting for setting in self.settings.values() if setting.prior)
        found = (s for s in biases if any(use.node == head.output for use in self.roles.uses[s.info.name]))
        return sum(setting.mean**2 + setting.variance for setting in found)

    def determinant(self, std: float) -> None:
        """The scales of all layers take one factor: the log-determinant is a sum over them. Shifts are as quiet as scales."""
        found = self.roles.log_determinant
        assert found is not None
        if levers := self.free(self.levers((*found.setters, *found.shifts))):
            goal, quantity = Goal(constant=std**2), Quantity.VARIANCE
            self.claim(Demand(kind=Kind.DETERMINANT, node=found.node, quantity=quantity, goal=goal, groups=(levers,)))

    def logits(self, logits: Logits) -> None:
        target = self.target(Role.QUERY)
        sides = (logits.queries, logits.keys, logits.temperatures)
        groups = tuple(group for side in sides if (group := self.free(self.levers(side))))
        if isinstance(target, KeyVariance) and groups:
            goal = Goal(constant=target.variance)
            self.claim(Demand(kind=Kind.LOGITS, node=logits.node, quantity=Quantity.KEY_VARIANCE, goal=goal, groups=groups))

    def stream(self, stream: Stream) -> None:
        target = self.target(Role.RESIDUAL_END)
        if not isinstance(target, StreamShare):
            return
        count = len(stream.branches)
        shares = relative_shares(stream.branches, self.policy.shares, self.graph)
        for branch in stream.branches:
            levers = self.free(self.leading(branch))
            if levers:
                goal = Goal(terms=((stream.first, shares[branch.operand] * target.total / count),))
                self.claim(
                    Demand(
                        kind=Kind.STREAM,
                        node=branch.operand,
                        quantity=Quantity.SECOND_MOMENT,
                        goal=goal,
                        groups=(levers,),
                        count=count,
                        share=shares[branch.operand],
                    )
                )

    def leading(self, branch: Branch) -> tuple[Lever, ...]:
        """What sets a branch's level; of siblings that merge inside of it the first only, which the others follow."""
        levers = self.levers(branch.setters)
        parts = {lever.part for lever in levers}
        followers: set[Part] = set()
        for merge, inside in self.merged:
            if inside and covers(parts, inside) and not any(b.operand == branch.operand for b in merge.branches):
                siblings = [own for b in merge.branches if (own := {lever.part for lever in self.levers(b.setters)})]
                followers |= set().union(*siblings[1:]) - siblings[0]
        return tuple(lever for lever in levers if lever.part not in followers)

    def merge(self, merge: Merge) -> None:
        target = self.target(Role.MERGE_END)
        if not isinstance(target, EqualContribution) or any(merge.node in stream.adds for stream in self.roles.streams):
            return
        led = [(branch, self.leading(branch)) for branch in merge.branches]
        # one that answers to another demand in part, as a stream does, would hardly follow what is left of its levers
        open_branches = [(branch, levers) for branch, levers in led if levers and levers == self.free(levers)]
        free = {branch.operand for branch, _ in open_branches}
        anchors = [branch for branch in merge.branches if branch.operand not in free and branch.operand in self.carriers]
        if not open_branches or len(open_branches) + len(anchors) < 2:
            return
        among = anchors or [branch for branch, _ in open_branches]
        usual = sum(share_of(branch, self.policy.shares, self.graph) for branch in among) / len(among)
        widths = {branch.operand: 1 if merge.is_sum else self._width(merge, branch) for branch in merge.branches}
        for branch, levers in open_branches:
            width = widths[branch.operand]
            share = share_of(branch, self.policy.shares, self.graph) / usual
            if anchors:
                terms = tuple((other.operand, share * widths[other.operand] / width / len(anchors)) for other in anchors)
                goal = Goal(terms=terms)
            else:
                whole = 1.0 if merge.is_sum else sum(widths.values())
                goal = Goal(constant=share * target.second_moment * whole / (len(open_branches) * width))
            self.claim(
                Demand(
                    kind=Kind.MERGE,
                    node=branch.operand,
                    quantity=Quantity.SECOND_MOMENT,
                    goal=goal,
                    groups=(levers,),
                    count=len(open_branches) + len(anchors),
                    width=0 if merge.is_sum else width,
                    share=share,
                )
            )

    def _width(self, merge: Merge, branch: Branch) -> int:
        """Channels of a concatenated branch; 1 where the concatenation is along another dimension (tokens, positions)."""
        node = self.graph.by_name[merge.node]
        meta = self.graph.by_name[branch.operand].meta
        assert isinstance(meta, TensorMeta)
        rank = len(meta.shape)
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        dim = int(dim) % rank
        is_channel = dim == 1 if rank >= 4 else dim == rank - 1
        return meta.shape[dim] if is_channel else 1

    def gain(self, use: Use) -> None:
        target = self.target(Role.HIDDEN)
        levers = self.free(self.levers([Setter(use)]))
        if isinstance(target, Level) and levers:
            goal = Goal(constant=target.second_moment)
            self.claim(Demand(kind=Kind.GAIN, node=use.node, quantity=Quantity.SECOND_MOMENT, goal=goal, groups=(levers,)))

    def own(self) -> list[Own]:
        """For each contracted parameter the rule of its first contraction."""
        found = []
        for name, uses in self.roles.uses.items():
            setting = self.settings[name]
            role = self.roles.of(name)
            contracted = [use for use in uses if is_contraction(self.graph.by_name[use.node])]
            own = [use for use in contracted if use.role is role] if role is Role.TIED_HEAD else []
            use = next(iter(own or contracted), None)
            if setting.is_fixed or setting.variance == 0.0 or use is None:
                continue
            target = self.target(role)
            rule = target if isinstance(target, Level | FanScaled) else Level()
            parts = {(name, part) for part in range(len(setting.variances))} - self.taken.keys()
            starts = (bool(parts) or role is not Role.TIED_HEAD) and use.node not in self.weight_gains
            is_balanced = bool(parts) and isinstance(target, Level) and role in _BALANCED
            found.append(Own(use=use, target=rule, parts=frozenset(parts), starts=starts, is_balanced=is_balanced))
        return found


def _contradict(first: Use, second: Use) -> bool:
    kinds = _DEMANDING.get(first.role), _DEMANDING.get(second.role)
    return first.node != second.node and None not in kinds and kinds[0] is not kinds[1]


def _conflict(first: Use, second: Use) -> RoleConflictError:
    name = first.parameter
    return RoleConflictError(
        f"{name} is asked to be two things, and has one scale: {first.role.value} in {first.node} ({first.reason}) and "
        f"{second.role.value} in {second.node} ({second.reason}). Say which of them counts, roles={{{name!r}: "
        f"{first.role.value!r}}}, or leave it as it is, keep=[{name!r}]."
    )


def _carriers(graph: Graph) -> set[str]:
    """Nodes with a signal from an input or a contraction; a table that is added as it is, is none."""
    return graph.following(node.name for node in graph.nodes if node.kind is NodeKind.INPUT or is_contraction(node))
