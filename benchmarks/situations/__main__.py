"""The eight situations, asked for and measured on models of other people.

python -m benchmarks.situations [--only attention] [--model swin]

Prints a table for each situation and writes benchmarks/results/situations.json, where what was not run again keeps its
rows. The exit code is 1 where something that was asked for was not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.measure import one_thread
from benchmarks.situations.rows import HEADINGS, SITUATIONS, cells
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parents[1] / "results" / "situations.json"


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SITUATIONS, help="one situation")
    parser.add_argument("--model", default="", help="models whose package or name has this in it, in any case")
    chosen = parser.parse_args()
    one_thread()
    for name in SITUATIONS if chosen.only is None else (chosen.only,):
        anew = measured(name, chosen.model.lower())
        if chosen.only and all(rows is None for _, rows in anew):
            parser.error(f"no model of {name} has {chosen.model!r} in it: {', '.join(model for (_, model), _ in anew)}")
        found = _written()  # now: another run may have ended meanwhile
        known = found.get(name, [])
        found[name] = [row for of, rows in anew for row in (known_of(known, *of) if rows is None else rows)]
        show(name, found[name])
        ordered = {situation: found[situation] for situation in SITUATIONS if situation in found}
        RESULTS.write_text(json.dumps(ordered, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if all(row["ok"] for rows in _written().values() for row in rows) else 1


def _written() -> dict[str, list[dict[str, Any]]]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def measured(name: str, wanted: str) -> list[tuple[tuple[str, str], list[dict[str, Any]] | None]]:
    """Packages and models of one situation, in their order, each with its rows; None for those that are not wanted."""
    return [
        (
            (one.package, one.model),
            [row.to_dict() for row in one.rows()] if wanted in f"{one.package} {one.model}".lower() else None,
        )
        for one in import_module(f"benchmarks.situations.{name}").measurements()
    ]


def known_of(rows: list[dict[str, Any]], package: str, model: str) -> list[dict[str, Any]]:
    """Rows of one model."""
    return [row for row in rows if (row["package"], row["model"]) == (package, model)]


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """Print one situation's table."""
    table = Table(title=name)
    for heading in HEADINGS:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(cell.strip("*") for cell in cells(row)))
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
