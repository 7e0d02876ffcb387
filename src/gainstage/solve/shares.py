"""How much each branch is asked to contribute to what it merges into, relative to its siblings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from gainstage.errors import UnknownNameError, nearest
from gainstage.graph import Graph
from gainstage.roles import Branch, Roles


def share_of(branch: Branch, shares: Mapping[str, float], graph: Graph) -> float:
    """The wish of the first pattern that names a parameter that sets the branch, or its module; 1 where none does."""
    names = set(_names(branch, graph))
    return next((share for pattern, share in shares.items() if any(fnmatchcase(name, pattern) for name in names)), 1.0)


def relative_shares(branches: Sequence[Branch], shares: Mapping[str, float], graph: Graph) -> dict[str, float]:
    """By operand, each share over their mean."""
    found = {branch.operand: share_of(branch, shares, graph) for branch in branches}
    mean = sum(found.values()) / max(len(found), 1)
    return {operand: share / mean for operand, share in found.items()}


def check_shares(shares: Mapping[str, float], roles: Roles, graph: Graph) -> None:
    """Every pattern names the end of a branch.

    Raises:
        UnknownNameError: one that does not, with the nearest that do.
    """
    groups = [*(stream.branches for stream in roles.streams), *(merge.branches for merge in roles.merges)]
    known = sorted({name for branches in groups for branch in branches for name in _names(branch, graph)})
    for pattern in shares:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UnknownNameError(
                f"branch_shares: nothing that {pattern!r} names ends a branch{nearest(pattern, known)}. "
                "gainstage inspect --roles shows the parameters with the roles residual_end and merge_end."
            )


def _names(branch: Branch, graph: Graph) -> Iterable[str]:
    for setter in branch.setters:
        info = graph.parameters[setter.use.parameter]
        yield from (info.name, *info.aliases, info.module_path)
