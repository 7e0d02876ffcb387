"""What a situation reports: one quantity of one model, asked for and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# A module of this package for each: ``measurements() -> list[Measurement]``; a section of docs/situations.md.
SITUATIONS = ("attention", "branches", "activations", "flows", "tasks", "dropout", "rates", "inputs")
DRAWS = 8  # of weights and inputs; what is reported is a mean over them, unless the row says otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One quantity of one model, at all places of the model that have it.

    ``asked``: the range that it is to lie in. ``measured``: the least and the most over the ``places``, each a mean over the
    draws of the real model.
    """

    situation: str
    package: str
    model: str
    quantity: str
    asked: tuple[float, float]
    measured: tuple[float, float]
    places: int

    def __post_init__(self) -> None:
        """A quantity that no place of the model has was not measured."""
        assert self.places > 0, f"{self.model}: {self.quantity} at no place"

    @property
    def ok(self) -> bool:
        """Every place is within the range."""
        return self.asked[0] <= self.measured[0] and self.measured[1] <= self.asked[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        names = ("situation", "package", "model", "quantity", "asked", "measured", "places", "ok")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """All rows of one model, when they are asked for."""

    package: str
    model: str
    rows: Callable[[], Iterable[Row]]


def row_over(values: Iterable[float], **fields: Any) -> Row:
    """The row of these values, one for each place."""
    found = list(values)
    return Row(measured=(min(found), max(found)), places=len(found), **fields)


HEADINGS = ("package", "model", "quantity", "asked", "measured", "places", "")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row as it stands in a table."""
    (low, high), (least, most) = row["asked"], row["measured"]
    return (
        row["package"],
        row["model"],
        row["quantity"],
        f"{low:g} to {high:g}" if low else f"at most {high:.3g}",
        f"{least:.3g} to {most:.3g}" if least != most else f"{least:.3g}",
        str(row["places"]),
        "yes" if row["ok"] else "**no**",
    )
