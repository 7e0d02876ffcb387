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
    parser.add_argument("--model", default="", help="models whose package or name has this in it")
    chosen = parser.parse_args()
    one_thread()
    found: dict[str, list[dict[str, Any]]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in SITUATIONS if chosen.only is None else (chosen.only,):
        found[name] = measured(name, chosen.model, found.get(name, []))
        show(name, found[name])
        ordered = {known: found[known] for known in SITUATIONS if known in found}
        RESULTS.write_text(json.dumps(ordered, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if all(row["ok"] for rows in found.values() for row in rows) else 1


def measured(name: str, wanted: str, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one situation in their order: of the models that are wanted anew, of the others as known."""
    rows: list[dict[str, Any]] = []
    for one in import_module(f"benchmarks.situations.{name}").measurements():
        if wanted in f"{one.package} {one.model}":
            rows += [row.to_dict() for row in one.rows()]
        else:
            rows += [row for row in known if (row["package"], row["model"]) == (one.package, one.model)]
    return rows


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
