"""The stage itself: a graph in, the roles of its parameters out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gainstage.graph import Graph
from gainstage.roles.attention import Attention, find_attentions
from gainstage.roles.claims import Claims, Settled
from gainstage.roles.flows import find_scales, find_shifts
from gainstage.roles.gates import find_gates
from gainstage.roles.heads import Output, find_outputs, find_routers
from gainstage.roles.merges import Siblings, find_siblings, summands
from gainstage.roles.model import Branch, Head, LogDeterminant, Logits, Merge, Role, Roles, Stream
from gainstage.roles.override import apply_overrides
from gainstage.roles.sites import Site, find_sites
from gainstage.roles.streams import Chain, Residual, find_residuals, link
from gainstage.roles.walk import Found, Walked, walk_back
from gainstage.roles.wiring import Wiring, wire


def infer_roles(graph: Graph, overrides: Mapping[str, str] | None = None, *, log_determinant: str | None = None) -> Roles:
    """What every parameter of a model is for.

    Args:
        graph: a captured model.
        overrides: patterns of parameter names -> the name of a role; what each does is said at ``apply_overrides``.
        log_determinant: the node that is one, in a flow.

    Returns:
        Uses of all parameters, and the structures that they are part of.

    Raises:
        UnknownNameError: a pattern that matches no parameter, or a role that does not exist.
        RoleConflictError: a role that the graph makes impossible, or two patterns that contradict each other.
    """
    wiring = wire(graph)
    roles = _Inference(wiring, find_sites(wiring), log_determinant).roles()
    return apply_overrides(roles, graph, overrides) if overrides else roles


@dataclass(frozen=True, slots=True)
class _Parts:
    """Everything that was found, by node number, before parameters are cut into uses."""

    attentions: tuple[Attention, ...]
    chains: tuple[Chain, ...]
    branches: Mapping[int, tuple[tuple[int, Walked], ...]]  # addition -> operands that are added, with what sets each
    siblings: tuple[tuple[Siblings, tuple[Walked, ...]], ...]
    outputs: tuple[tuple[Output, tuple[Found, ...]], ...]


@dataclass(frozen=True, slots=True)
class _Inference:
    wiring: Wiring
    sites: Mapping[int, tuple[Site, ...]]
    log_determinant: str | None = None

    def roles(self) -> Roles:
        claims = Claims(self.wiring.graph, tuple(site for found in self.sites.values() for site in found))
        parts = self.parts()
        self.claim(claims, parts)
        if self.log_determinant is None:
            return self.built(claims.settle(), parts)
        scales = find_scales(self.wiring, self.sites, self.wiring.number[self.log_determinant])
        claims.add(scales, Role.COUPLING_SCALE, f"the log-determinant {self.log_determinant} is a direct function of it")
        made = [found.site for found in scales]
        others = (self.wiring.number[name] for name in self.wiring.graph.outputs if name != self.log_determinant)
        shifts = tuple(found for i in others for found in find_shifts(self.wiring, self.sites, i, made))
        claims.add(shifts, Role.COUPLING_SHIFT, "is added to what the flow transforms")
        settled = claims.settle()
        determinant = LogDeterminant(self.log_determinant, settled.setters(scales), settled.setters(shifts))
        return replace(self.built(settled, parts), log_determinant=determinant)

    def name(self, i: int) -> str:
        return self.wiring.nodes[i].name

    def parts(self) -> _Parts:
        wiring, sites = self.wiring, self.sites
        attentions = find_attentions(wiring, sites)
        on_logits = frozenset(node for attention in attentions for node in attention.path)
        residuals = find_residuals(wiring, sites, on_logits)
        branches = {i: self.branches(residual, residuals) for i, residual in residuals.items()}
        inside = {node for attention in attentions for walked in (attention.query, attention.key) for node in walked.nodes}
        sums = {i for residual in residuals.values() for i in self.inner_sums(residual, residuals)}
        siblings = find_siblings(wiring, residuals, inside | on_logits | sums)
        merges = tuple((merge, walks) for merge in siblings if (walks := self.sibling_walks(merge)))
        return _Parts(attentions, link(wiring, residuals), branches, merges, self.outputs())

    def branches(self, residual: Residual, residuals: Mapping[int, Residual]) -> tuple[tuple[int, Walked], ...]:
        barrier = frozenset({residual.skip})
        operands = summands(self.wiring, residual.branch, residuals)
        return tuple((i, walk_back(self.wiring, self.sites, i, barrier=barrier)) for i in operands)

    def inner_sums(self, residual: Residual, residuals: Mapping[int, Residual]) -> set[int]:
        """Sums of siblings that are flattened into branches of a stream."""
        operands = set(summands(self.wiring, residual.branch, residuals))
        found: set[int] = set()
        stack = [residual.branch] if residual.branch not in operands else []
        while stack:
            i = stack.pop()
            found.add(i)
            stack += [j for j in self.wiring.signals[i] if j not in operands]
        return found

    def sibling_walks(self, merge: Siblings) -> tuple[Walked, ...]:
        """What sets each sibling; () where all are made by the same uses: parts of one tensor put together again."""
        barriers = []
        for i in merge.operands:
            nodes = walk_back(self.wiring, self.sites, i, with_rows=False).nodes
            others = [other for other in merge.operands if other != i]
            barriers.append(frozenset(n for n in nodes if any(self.wiring.is_computed_from(other, n) for other in others)))
        pairs = list(zip(merge.operands, barriers, strict=True))
        bare = [walk_back(self.wiring, self.sites, i, barrier=shared, with_rows=False) for i, shared in pairs]
        sources = [{id(found.site) for found in walked.found} for walked in bare]
        if all(source == sources[0] for source in sources):
            return ()
        return tuple(walk_back(self.wiring, self.sites, i, barrier=shared) for i, shared in pairs)

    def outputs(self) -> tuple[tuple[Output, tuple[Found, ...]], ...]:
        found = []
        for output in find_outputs(self.wiring, self.sites):
            setters = tuple(Found(s, None, s.degree) for s in self.sites[output.contraction] if s.sets_level)
            gains = tuple(item for item in setters if not item.site.is_contraction)
            found.append((output, gains or setters))
        return tuple(found)

    def claim(self, claims: Claims, parts: _Parts) -> None:
        """Everything that structures say of the uses they are made of."""
        embedded = {s.parameter for found in self.sites.values() for s in found if s.role is Role.EMBEDDING}
        for output, found in parts.outputs:
            for item in found:
                is_tied = item.site.parameter in embedded
                role = Role.TIED_HEAD if is_tied else Role.OUTPUT_HEAD
                also = ", and its rows are looked up at the input" if is_tied else ""
                claims.add([item], role, f"makes the output {self.name(output.output)} of the model{also}")
        for attention in parts.attentions:
            self.claim_attention(claims, attention)
        softmaxes = {attention.softmax for attention in parts.attentions}
        for contraction, chooser in find_routers(self.wiring, self.sites, softmaxes).items():
            routed = [Found(s, None, s.degree) for s in self.sites[contraction] if s.is_contraction]
            claims.add(routed, Role.ROUTER, f"{self.name(chooser)} weighs or chooses by its outputs")
        for add, branches in parts.branches.items():
            for operand, walked in branches:
                text = f"sets the level of the branch {self.name(operand)} that {self.name(add)} adds to its stream"
                claims.add(walked.found, Role.RESIDUAL_END, text)
        for merge, walks in parts.siblings:
            verb = "adds to" if merge.is_sum else "concatenates with"
            for walked in walks:
                claims.add(walked.found, Role.MERGE_END, f"sets the level of what {self.name(merge.node)} {verb} its siblings")
        for product, walked in find_gates(self.wiring, self.sites):
            claims.add(
                walked.found, Role.GATE, f"its output multiplies another tensor in {self.name(product)}, through a nonlinearity"
            )

    def claim_attention(self, claims: Claims, attention: Attention) -> None:
        softmax = self.name(attention.softmax)
        for walked, role, other in (
            (attention.query, Role.QUERY, attention.key), (attention.key, Role.KEY, attention.query)
        ):  # fmt: skip
            partners = dict.fromkeys(found.site.parameter for found in other.found if found.site.is_contraction)
            partner = " and ".join(partners) or "the other operand"
            cancels = "; a norm between cancels its scale" if walked.is_normalised else ""
            claims.add(walked.found, role, f"its product with {partner} feeds the softmax of {softmax}{cancels}")
        if attention.value is not None:
            claims.add(attention.value.found, Role.VALUE, f"its output is averaged by the softmax of {softmax}")

    def built(self, settled: Settled, parts: _Parts) -> Roles:
        return Roles(
            uses=settled.uses,
            streams=tuple(self.stream(settled, chain, parts) for chain in parts.chains),
            merges=tuple(
                Merge(
                    node=self.name(merge.node),
                    is_sum=merge.is_sum,
                    branches=tuple(
                        Branch(operand=self.name(i), setters=settled.setters(walked.found))
                        for i, walked in zip(merge.operands, walks, strict=True)
                    ),
                )
                for merge, walks in parts.siblings
            ),
            logits=tuple(self.logits(settled, attention) for attention in parts.attentions),
            heads=tuple(
                Head(
                    output=self.name(output.contraction),
                    setters=settled.setters(found),
                    width=self.width(output, found),
                )
                for output, found in parts.outputs
            ),
        )

    def width(self, output: Output, found: tuple[Found, ...]) -> int:
        shape = self.wiring.shape(output.contraction)
        return shape[found[0].site.axis] if found and shape else 1

    def stream(self, settled: Settled, chain: Chain, parts: _Parts) -> Stream:
        pairs = [(step.add, operand, walked) for step in chain.steps for operand, walked in parts.branches[step.add]]
        return Stream(
            first=self.name(chain.first),
            adds=tuple(self.name(add) for add, _, _ in pairs),
            branches=tuple(Branch(operand=self.name(i), setters=settled.setters(walked.found)) for _, i, walked in pairs),
        )

    def logits(self, settled: Settled, attention: Attention) -> Logits:
        sides = [self.nearest(walked) for walked in (attention.query, attention.key)]
        is_normalised = attention.query.is_normalised or attention.key.is_normalised
        scalings = (site for i in sorted(attention.path) for site in self.sites.get(i, ()) if site.role is Role.TEMPERATURE)
        has_lever = not is_normalised or any(sides)
        return Logits(
            node=self.name(attention.node),
            queries=settled.setters(sides[0]),
            keys=settled.setters(sides[1]),
            is_normalised=is_normalised,
            temperatures=() if has_lever else settled.setters(Found(site, None, site.degree) for site in scalings),
        )

    def nearest(self, walked: Walked) -> tuple[Found, ...]:
        """The uses that set the level of queries or keys: the scale of a norm between, if there is one."""
        scales = tuple(found for found in walked.found if not found.site.is_contraction)
        return scales if walked.is_normalised else walked.found
