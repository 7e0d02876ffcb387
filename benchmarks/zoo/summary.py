"""Tables over the rows of the zoo benchmark."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from benchmarks.zoo.load import ZOOS, zoo_models
from benchmarks.zoo.row import ZooRow, quantiles

RESULTS = Path(__file__).parents[1] / "results" / "zoo.jsonl"
SHOWN = 12  # of the worst
TOTAL_HEADINGS = (
    "zoo", "listed", "run", "planned", "by export", "by a run", "ops ruled %", "plan s p50", "largest", "slow", "MB largest",
    "draws fewest", "outputs", "p50 %", "p90 %", "p99 %", "apart",
)  # fmt: skip
FAILURE_HEADINGS = ("model", "reason")
SAMPLED_HEADINGS = ("operation", "nodes", "models")
WORST_HEADINGS = ("model", "p90 %", "worst output", "error %", "draws")


def read_rows(path: Path = RESULTS) -> dict[tuple[str, str], ZooRow]:
    """The last row of each model."""
    if not path.exists():
        return {}
    rows = [ZooRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row.zoo, row.model): row for row in rows}


def totals(rows: Sequence[ZooRow]) -> list[tuple[str, ...]]:
    """A line for each zoo and one for all."""
    groups = {zoo: [row for row in rows if row.zoo == zoo] for zoo in ZOOS}
    lines = [_total(zoo, len(zoo_models(zoo)), group) for zoo, group in groups.items() if group]
    return [*lines, _total("all", sum(len(zoo_models(zoo)) for zoo in ZOOS), rows)] if rows else []


def _total(name: str, listed: int, rows: Sequence[ZooRow]) -> tuple[str, ...]:
    planned = [row for row in rows if row.plan_seconds > 0.0]
    errors = [error for row in rows for error in row.errors]
    ruled, sampled = sum(row.ruled for row in rows), sum(row.sampled for row in rows)
    seconds = [row.plan_seconds for row in planned] or [0.0]
    return (
        name,
        str(listed),
        str(len(rows)),
        str(len(planned)),
        str(sum(row.rung == "export" for row in rows)),
        str(sum(row.rung == "tape" for row in rows)),
        f"{100 * ruled / max(1, ruled + sampled):.1f}",
        f"{np.median(seconds):.1f}",
        f"{max(seconds):.1f}",
        str(sum(row.is_slow for row in planned)),
        f"{max((row.megabytes for row in planned), default=0.0):.0f}",
        str(min((row.draws for row in rows if row.draws), default=0)),
        str(len(errors)),
        *(f"{100 * value:.1f}" for value in quantiles(errors)),
        str(sum(row.apart for row in rows)),
    )


def failures(rows: Sequence[ZooRow]) -> list[tuple[str, str]]:
    """Each model that did not come through, and why."""
    return [(f"{row.zoo}:{row.model}", row.failure) for row in rows if row.failure]


def most_sampled(rows: Sequence[ZooRow]) -> list[tuple[str, ...]]:
    """The operations that were run on samples most often, for want of a rule that covers the call."""
    nodes: Counter[str] = Counter()
    for row in rows:
        nodes.update(row.sampled_ops)
    return [(op, str(count), str(sum(op in row.sampled_ops for row in rows))) for op, count in nodes.most_common(SHOWN)]


def worst(rows: Sequence[ZooRow]) -> list[tuple[str, ...]]:
    """The models with the largest error in nine of ten of their outputs."""
    ranked = sorted((row for row in rows if row.errors), key=lambda row: -quantiles(row.errors)[1])
    return [
        (
            f"{row.zoo}:{row.model}",
            f"{100 * quantiles(row.errors)[1]:.1f}",
            row.worst[0][0],
            f"{100 * row.worst[0][1]:.1f}",
            str(row.draws),
        )
        for row in ranked[:SHOWN]
    ]
