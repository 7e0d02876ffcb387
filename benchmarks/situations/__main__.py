"""The eight situations, asked for and measured on models of other people.

python -m benchmarks.situations [--only attention]

Prints a table for each situation and writes benchmarks/results/situations.json, where those that were not run again keep
their rows. The exit code is 1 where something that was asked for was not measured.
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
    only = parser.parse_args().only
    one_thread()
    found: dict[str, list[dict[str, Any]]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in SITUATIONS if only is None else (only,):
        found[name] = [row.to_dict() for row in import_module(f"benchmarks.situations.{name}").measure()]
        show(name, found[name])
        ordered = {known: found[known] for known in SITUATIONS if known in found}
        RESULTS.write_text(json.dumps(ordered, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if all(row["ok"] for rows in found.values() for row in rows) else 1


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
