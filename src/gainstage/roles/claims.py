"""From claims on rows of parameters to uses: rows that every claim treats alike make one use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from gainstage.graph import Graph
from gainstage.roles.coordinates import distinct
from gainstage.roles.model import Role, Setter, Use
from gainstage.roles.sites import Site
from gainstage.roles.walk import Found

_ORDER = {role: k for k, role in enumerate(Role)}


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """Rows of one use that a structure needs apart, and the role that it gives them (None: none of its own)."""

    found: Found
    role: Role | None
    reason: str = ""


@dataclass(slots=True)
class Claims:
    """All claims on a model; built up by the structures, settled once."""

    graph: Graph
    sites: tuple[Site, ...]
    made: dict[int, list[Claim]] = field(default_factory=dict)  # by id of the site

    def add(self, found: Iterable[Found], role: Role | None, reason: str = "") -> None:
        """Claim what a walk found. Only a contraction takes a role from a structure; scales and look-ups keep their own."""
        for item in found:
            given = role if item.site.is_contraction else None
            self.made.setdefault(id(item.site), []).append(Claim(item, given, reason))

    def settle(self) -> Settled:
        """Uses of all parameters."""
        cells: dict[int, tuple[tuple[torch.Tensor | None, Use], ...]] = {}
        uses: dict[str, list[Use]] = {name: [] for name in self.graph.parameters}
        for site in sorted(self.sites, key=lambda site: site.node):
            cut = tuple(self._cells(site))
            cells[id(site)] = cut
            uses[site.parameter] += [use for _, use in cut]
        return Settled(cells, {name: tuple(found) for name, found in uses.items()})

    def _cells(self, site: Site) -> Iterable[tuple[torch.Tensor | None, Use]]:
        claims = self.made.get(id(site), [])
        info = self.graph.parameters[site.parameter]
        partial = [claim for claim in claims if claim.found.rows is not None]
        all_rows = None if site.rows is None else distinct(site.rows)
        if not partial or all_rows is None:
            whole = all_rows is None or len(all_rows) == info.shape[site.dim]
            yield None, self._use(site, claims, () if whole or all_rows is None else ranges(all_rows))
            return
        signature = torch.zeros(info.shape[site.dim], dtype=torch.int64)
        for bit, rows in enumerate(_distinct([claim.found.rows for claim in partial if claim.found.rows is not None])):
            signature[rows] += 1 << bit
        for code in dict.fromkeys(signature[all_rows].tolist()):
            rows = all_rows[signature[all_rows] == code]
            inside = [c for c in claims if c.found.rows is None or bool(torch.isin(rows[0], c.found.rows))]
            yield rows, self._use(site, inside, ranges(rows))

    def _use(self, site: Site, claims: list[Claim], rows: tuple[tuple[int, int], ...]) -> Use:
        role, reason = site.role, site.reason
        for claim in claims:
            if claim.role is not None and _ORDER[claim.role] < _ORDER[role]:
                role, reason = claim.role, claim.reason
        return Use(
            parameter=site.parameter,
            node=self.graph.nodes[site.node].name,
            role=role,
            rows=rows,
            dim=site.dim,
            output_dims=site.output_dims,
            reason=reason,
        )


@dataclass(frozen=True, slots=True)
class Settled:
    """Uses by parameter, and by site for what refers to them."""

    cells: Mapping[int, tuple[tuple[torch.Tensor | None, Use], ...]]
    uses: Mapping[str, tuple[Use, ...]]

    def setters(self, found: Iterable[Found]) -> tuple[Setter, ...]:
        """What a walk found, as uses."""
        setters: dict[tuple[str, str, tuple[tuple[int, int], ...]], Setter] = {}
        for item in found:
            for rows, use in self.cells[id(item.site)]:
                if item.rows is None or rows is None or bool(torch.isin(rows[0], item.rows)):
                    setters.setdefault((use.parameter, use.node, use.rows), Setter(use, item.power))
        return tuple(setters.values())


def _distinct(found: list[torch.Tensor]) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    for rows in found:
        if not any(len(rows) == len(other) and bool((rows == other).all()) for other in kept):
            kept.append(rows)
    return kept[:62]


def ranges(rows: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Ascending coordinates as half-open ranges."""
    values = rows.tolist()
    found: list[list[int]] = []
    for value in values:
        if found and found[-1][1] == value:
            found[-1][1] = value + 1
        else:
            found.append([value, value + 1])
    return tuple((start, stop) for start, stop in found)
