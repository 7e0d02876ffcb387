"""What the user says of a parameter goes before what the graph says, as far as the graph makes it possible."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from gainstage.errors import InputError, RoleConflictError, UnknownNameError
from gainstage.graph import Graph
from gainstage.roles.model import CONTRACTED, Branch, Head, Logits, Merge, Role, Roles, Setter, Stream, Use

_CONTRACTED = CONTRACTED | {Role.TIED_HEAD}
_SCALES = frozenset({Role.NORM_SCALE, Role.LAYER_SCALE})
_ENDS = frozenset({Role.RESIDUAL_END, Role.MERGE_END})
_SHIFTS = frozenset({Role.BIAS, Role.NORM_SHIFT})
_GIVEN = frozenset({Role.DEPTHWISE, Role.RECURRENT, Role.EMBEDDING, Role.SLOPE, Role.UNUSED})  # facts, not intentions


@dataclass(frozen=True, slots=True)
class _Said:
    """One parameter's role by the user's word, with the pattern that says so."""

    role: Role
    pattern: str


def apply_overrides(roles: Roles, graph: Graph, overrides: Mapping[str, str]) -> Roles:
    """Roles as the user wants them.

    The uses of each named parameter take the role, and the structures follow: ``residual_end`` and ``merge_end`` make the
    parameter the only one that sets the level of the first branch that its output reaches; ``output_head`` and ``tied_head``
    likewise the first output; ``query`` and ``key`` move it to that side of its attention logits. With any other role the
    parameter leaves all streams, merges, logits and heads, so that nothing is asked of it there.

    Args:
        roles: what the graph says.
        graph: the captured model.
        overrides: pattern (``*`` and ``?`` as in file names) of parameter names, aliases included, or of module paths -> the
            name of a role. Of a module those parameters take the role that can: its weight, say, and not its bias.

    Raises:
        InputError: what is no mapping.
        UnknownNameError: a pattern that nothing matches, or a role that does not exist.
        RoleConflictError: a role that the graph makes impossible, or two patterns that contradict each other.
    """
    said = _resolve(roles, graph, overrides)
    _check(roles, said)
    renamed = {use: _renamed(use, said) for found in roles.uses.values() for use in found if use.parameter in said}
    uses = {name: tuple(renamed.get(use, use) for use in found) for name, found in roles.uses.items()}
    edit = _Edit(graph, replace(roles, uses=uses), said, renamed)
    return edit.roles_with_structures()


def _resolve(roles: Roles, graph: Graph, overrides: Mapping[str, str]) -> Mapping[str, _Said]:
    if not isinstance(overrides, Mapping):
        raise InputError(f"roles is {type(overrides).__name__}; give a dict, such as roles={{'*.out.weight': 'residual_end'}}.")
    names = {name: info.name for info in graph.parameters.values() for name in (info.name, *info.aliases)}
    modules: dict[str, list[str]] = {}
    for info in graph.parameters.values():
        modules.setdefault(info.module_path, []).append(info.name)
    found: dict[str, _Said] = {}
    for pattern, text in overrides.items():
        role = _role_of(text, pattern)
        matching = dict.fromkeys(canonical for name, canonical in names.items() if fnmatchcase(name, pattern))
        for path in (path for path in modules if fnmatchcase(path, pattern)):
            able = [name for name in modules[path] if any(_takes(use, role) for use in roles.uses[name])]
            matching |= dict.fromkeys(able or modules[path])
        if not matching:
            raise UnknownNameError(f"No parameter and no module is named {pattern!r}.{_nearest(pattern, [*names, *modules])}")
        for name in matching:
            before = found.setdefault(name, _Said(role, pattern))
            if before.role is not role:
                raise RoleConflictError(
                    f"{name} is asked to be two things: {before.role.value} by the pattern {before.pattern!r}, "
                    f"{role.value} by the pattern {pattern!r}. Make one of them narrower."
                )
    return found


def _role_of(text: str, pattern: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        known = [role.value for role in Role]
        raise UnknownNameError(
            f"There is no role {text!r} (for {pattern!r}).{_nearest(text, known)} All roles: {', '.join(known)}."
        ) from None


def _nearest(text: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(text, list(known), n=3, cutoff=0.4)
    return f" Nearest: {', '.join(nearest)}." if nearest else ""


def _check(roles: Roles, said: Mapping[str, _Said]) -> None:
    for name, wish in said.items():
        found = roles.uses[name]
        if not any(_takes(use, wish.role) for use in found):
            reasons = "; ".join(f"by the graph it is {use.role.value}: it {_said_of(use)}" for use in found)
            raise RoleConflictError(
                f"{name} cannot be {wish.role.value}, which the pattern {wish.pattern!r} asks for: "
                f"{reasons or 'by the graph it is unused: it reaches no output'}."
            )


def _said_of(use: Use) -> str:
    """The reason as a predicate of the parameter."""
    return f"is read by {use.node}, where {use.reason}" if use.reason.startswith("its ") else use.reason


def _takes(use: Use, role: Role) -> bool:
    """Tell whether a use can have a role: contractions are contractions, whatever they are for."""
    if role is use.role or (role is Role.KEPT and use.role is not Role.UNUSED):
        return True
    if role in _GIVEN or use.role in _GIVEN - {Role.DEPTHWISE}:
        return False
    kinds = (_CONTRACTED, _SCALES | _ENDS, _SHIFTS)
    return any(role in kind and use.role in kind and not (kind is kinds[1] and use.role in _ENDS) for kind in kinds)


def _renamed(use: Use, said: Mapping[str, _Said]) -> Use:
    wish = said[use.parameter]
    if not _takes(use, wish.role) or use.role is wish.role:
        return use
    return replace(use, role=wish.role, reason=f"is {wish.role.value} by the override {wish.pattern!r}")


@dataclass(frozen=True, slots=True)
class _Edit:
    """Structures that follow their parameters."""

    graph: Graph
    roles: Roles
    said: Mapping[str, _Said]
    renamed: Mapping[Use, Use]

    def roles_with_structures(self) -> Roles:
        streams, merges, heads = self.freed()
        stream_ends = self.ends(Role.RESIDUAL_END, [branch for stream in streams for branch in stream.branches])
        merge_ends = self.ends(Role.MERGE_END, [branch for merge in merges for branch in merge.branches])
        streams = tuple(replace(stream, branches=_with_setters(stream.branches, stream_ends)) for stream in streams)
        merges = tuple(replace(merge, branches=_with_setters(merge.branches, merge_ends)) for merge in merges)
        return replace(
            self.roles,
            streams=streams,
            merges=merges,
            logits=tuple(self.logits(logits) for logits in self.roles.logits),
            heads=self.with_heads(heads),
        )

    def wishes(self, *wanted: Role) -> list[str]:
        return [name for name, wish in self.said.items() if wish.role in wanted]

    def kept(self, setters: tuple[Setter, ...], *wanted: Role) -> tuple[Setter, ...]:
        """Setters, without those that the user wants to be something else; renamed."""
        return tuple(
            replace(setter, use=self.renamed.get(setter.use, setter.use))
            for setter in setters
            if setter.use.parameter not in self.said or self.said[setter.use.parameter].role in wanted
        )

    def freed(self) -> tuple[tuple[Stream, ...], tuple[Merge, ...], tuple[Head, ...]]:
        scales = tuple(_SCALES)
        streams = tuple(
            replace(s, branches=tuple(replace(b, setters=self.kept(b.setters, Role.RESIDUAL_END, *scales)) for b in s.branches))
            for s in self.roles.streams
        )
        merges = tuple(
            replace(m, branches=tuple(replace(b, setters=self.kept(b.setters, Role.MERGE_END, *scales)) for b in m.branches))
            for m in self.roles.merges
        )
        heads = [replace(h, setters=self.kept(h.setters, Role.OUTPUT_HEAD, Role.TIED_HEAD)) for h in self.roles.heads]
        return streams, merges, tuple(head for head in heads if head.setters)

    def logits(self, logits: Logits) -> Logits:
        """Queries and keys change sides where the user says so."""
        both = {Role.QUERY: logits.queries, Role.KEY: logits.keys}
        moved = {
            role: (*self.kept(own, role), *(s for s in self.kept(other, role) if s.use.parameter in self.said))
            for role, own, other in ((Role.QUERY, both[Role.QUERY], both[Role.KEY]), (Role.KEY, both[Role.KEY], both[Role.QUERY]))
        }
        return replace(logits, queries=tuple(dict.fromkeys(moved[Role.QUERY])), keys=tuple(dict.fromkeys(moved[Role.KEY])))

    def ends(self, role: Role, branches: list[Branch]) -> Mapping[str, tuple[Setter, ...]]:
        """For each branch that is the first one that a wished parameter's output reaches: what sets it now."""
        wishes = {name: self.setter(name, role) for name in self.wishes(role)}
        first = self.first_reached([setter.use.node for setter in wishes.values()], {branch.operand for branch in branches})
        given: dict[str, tuple[Setter, ...]] = {}
        for name, setter in wishes.items():
            if setter.use.node not in first:
                raise RoleConflictError(
                    f"{name} cannot be {role.value}, which the pattern {self.said[name].pattern!r} asks for: "
                    f"what {setter.use.node} makes reaches no branch of that kind."
                )
            operand = first[setter.use.node]
            given[operand] = (*given.get(operand, ()), setter)
        return given

    def with_heads(self, heads: tuple[Head, ...]) -> tuple[Head, ...]:
        """A wished head that the graph does not show is one of its own."""
        present = {setter.use.parameter for head in heads for setter in head.setters}
        added = []
        for name in self.wishes(Role.OUTPUT_HEAD, Role.TIED_HEAD):
            if name not in present:
                setter = self.setter(name, self.said[name].role)
                width = self.graph.parameters[name].shape[setter.use.dim]
                added.append(Head(output=setter.use.node, setters=(setter,), width=width))
        return (*heads, *added)

    def setter(self, name: str, role: Role) -> Setter:
        return Setter(next(use for use in self.roles.uses[name] if use.role is role))

    def first_reached(self, starts: list[str], ends: set[str]) -> Mapping[str, str]:
        """Start -> the first of the ends, in execution order, that is computed from it; starts that reach none are left out."""
        bits = {start: 1 << k for k, start in enumerate(dict.fromkeys(starts))}
        below: dict[str, int] = {}
        found: dict[str, str] = {}
        for node in self.graph.nodes:
            own = bits.get(node.name, 0)
            for operand in node.operands():
                own |= below.get(operand, 0)
            below[node.name] = own
            if own and node.name in ends:
                for start, bit in bits.items():
                    if own & bit:
                        found.setdefault(start, node.name)
        return found


def _with_setters(branches: tuple[Branch, ...], given: Mapping[str, tuple[Setter, ...]]) -> tuple[Branch, ...]:
    return tuple(replace(branch, setters=given.get(branch.operand, branch.setters)) for branch in branches)
