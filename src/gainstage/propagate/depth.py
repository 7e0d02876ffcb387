"""Does depth erase the difference between two inputs, or blow it up? Read off the tables along the network's main path.

Two inputs that share a fraction c of their second moment (the cosine) are told apart by what is left, ``1 - c``. In a network
of equal layers it approaches its fixed point like ``exp(-l / xi)`` over l layers, xi being the depth scale, and a network is hard
to train once it is deeper than about 6 xi (Schoenholz et al. 2017, arXiv:1611.01232, section 5; Poole et al. 2016,
arXiv:1606.05340). Where nearby inputs are torn apart instead, small differences grow like ``exp(l / xi)``: chaos. Both are
measured here on the tables of the network as it is, whatever its layers are:

- forward, ``1 - c`` of one station over that of the one before;
- backward, ``E[|J d|^2] / E[y^2]`` for a small difference d of the size of the signal, which for independent weights at the
  outputs is ``n E[g^2] E[x^2]`` up to a constant: how much it falls from one station to the next is how much differences grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from gainstage.findings import Finding, FindingKind

DEPTH_SCALES = (
    6.0  # that a network may be deep (Schoenholz et al. 2017, section 5): 0.25 % of a difference is left, or it grew 400-fold
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A place on the main path where the signal is made anew: by weights, or as a sum of branches.

    ``cosine``: between two samples. ``sensitivity``: of the outputs to a small difference here that is as large as the signal, up
    to a factor common to all stations. ``averages``: whether there are fewer positions than at the station before: what differs
    between two maps of noise is lost in an average for good reasons, and is not counted as erased by depth. ``normalises``:
    whether anything was normalised since the station before: gradients that grow there belong to weights whose scale cancels,
    which networks live with.
    """

    node: str
    module: str
    second_moment: float
    cosine: float
    sensitivity: float
    resolution: float  # what the element type resolves, relative
    batch: int
    averages: bool = False
    normalises: bool = False

    @property
    def apart(self) -> float:
        """``1 - cosine``: the share of the second moment that tells two inputs apart."""
        return max(1.0 - self.cosine, 0.0)


@dataclass(frozen=True, slots=True)
class Depth:
    """The main path of a network, from the input to the last place before the outputs."""

    stations: tuple[Station, ...]

    @property
    def erased(self) -> tuple[float, ...]:
        """At each station, ``-log`` of what is left of the difference between two inputs, averages over positions apart."""
        pairs = pairwise(self.stations)
        return _summed(0.0 if after.averages else _log(before.apart) - _log(after.apart) for before, after in pairs)

    @property
    def grown(self) -> tuple[float, ...]:
        """At each station, log of the factor that small differences have grown by, relative to the signal, norms apart."""
        pairs = pairwise(self.stations)
        return _summed(0.0 if after.normalises else _log(before.sensitivity) - _log(after.sensitivity) for before, after in pairs)

    @property
    def scale(self) -> float:
        """Stations over which differences shrink or grow e-fold, whichever is faster; infinite where they stay."""
        rate = max(self.erased[-1], self.grown[-1], 0.0) / max(len(self.stations) - 1, 1)
        return 1.0 / rate if rate > 0.0 else math.inf

    def findings(self) -> tuple[Finding, ...]:
        """What the depth does to inputs, if it is more than networks train with."""
        found = []
        if (last := _first_beyond(self.erased)) is not None:
            found.append(self._collapse(last))
        if (last := _first_beyond(self.grown)) is not None:
            found.append(self._chaos(last))
        return tuple(found)

    def _collapse(self, place: int) -> Finding:
        station, end = self.stations[place], self.stations[-1]
        blind = next((s for s in self.stations if s.apart < s.resolution**2), None)
        lost = f" From {_named(blind)} on it is below what the element type resolves." if blind is not None else ""
        first, layers = self.stations[0], len(self.stations) - 1
        return Finding(
            kind=FindingKind.INDISTINGUISHABLE,
            where=station.module,
            evidence=(
                f"these {layers} layers cannot tell inputs apart: they differ by {first.apart:.2g} of the second moment at "
                f"{_named(first)}, {station.apart:.2g} at {_named(station)} and {_small(end.apart)} at {_named(end)}; "
                f"depth scale {self.scale:.2g} layers.{lost}"
            ),
            remedy=(
                "Plan it (gs.initialize); where levels are right already and the activation does it, use policy 'isometric' with "
                "gs.tailor, or norms or residual branches."
            ),
        )

    def _chaos(self, place: int) -> Finding:
        station, factor = self.stations[place], math.exp(min(self.grown[place], 700.0))
        return Finding(
            kind=FindingKind.CHAOTIC,
            where=station.module,
            evidence=(
                f"small differences between two inputs grow {factor:.2g}-fold in second moment, relative to the signal, from "
                f"{_named(self.stations[0])} to {_named(station)}, and gradients as much on their way back; "
                f"depth scale {self.scale:.2g} layers."
            ),
            remedy="Lower the weights (gs.initialize), or use policy 'isometric' with gs.tailor, or norms or residual branches.",
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        rows = [{"node": s.node, "module": s.module, "second_moment": s.second_moment, "cosine": s.cosine} for s in self.stations]
        logs = zip(self.erased, self.grown, strict=True)
        return {
            "scale": self.scale if math.isfinite(self.scale) else None,
            "stations": [{**row, "erased": erased, "grown": grown} for row, (erased, grown) in zip(rows, logs, strict=True)],
        }


def _first_beyond(logs: Sequence[float]) -> int | None:
    """The first station after which it stays beyond the bound."""
    if logs[-1] <= DEPTH_SCALES:
        return None
    within = [i for i, number in enumerate(logs) if number <= DEPTH_SCALES]
    return within[-1] + 1  # the first is 0


def _summed(steps: Iterable[float]) -> tuple[float, ...]:
    return tuple(accumulate(steps, initial=0.0))


def _log(number: float) -> float:
    return math.log(max(number, 1e-300))


def _named(station: Station) -> str:
    return station.module or station.node


def _small(number: float) -> str:
    return f"{number:.2g}" if number > 1e-15 else "less than 1e-15"
