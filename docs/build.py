"""Fills the generated blocks of README.md and docs/*.md, so that no figure in them is typed by hand.

python -m docs.build [--check]

A block stands between <!-- begin:NAME --> and <!-- end:NAME -->. Figures come from benchmarks/results/*.json, the rest from the
package itself. With --check nothing is written; the exit code is 1 where a block is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.apply import fills_table, shards_table
from benchmarks.calibrate import calibration_table
from benchmarks.cosines import figures as cosine_figures
from benchmarks.faults import faults_table
from benchmarks.neural_tangents import table as kernels_table
from benchmarks.situations.rows import HEADINGS, SITUATIONS, cells
from benchmarks.speed import large_table, stages_table
from benchmarks.zoo import summary as zoo
from torch import nn

import gainstage as gs
from gainstage.policies import (
    EqualContribution,
    FanScaled,
    FixedStd,
    KeyVariance,
    Level,
    NearChance,
    StreamShare,
    Target,
    find_policy,
)
from gainstage.policies.registry import POLICIES
from gainstage.roles import Role

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
NOT_MEASURED = "*Not measured yet.*"

_BLOCK = re.compile(r"(<!-- begin:(?P<name>[a-z]+) -->\n).*?(<!-- end:(?P=name) -->)", re.DOTALL)


def built(page: str) -> str:
    """A page with all its blocks filled."""
    return _BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match['name']]().strip()}\n{match[3]}", page)


def stale() -> list[Path]:
    """Pages with a block that is out of date."""
    return [page for page in PAGES if (text := page.read_text(encoding="utf-8")) != built(text)]


def results(name: str) -> Any:
    """Figures of a benchmark; nothing where it was not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, figures to the right."""
    marks = ["---" if index == 0 else "---:" for index in range(len(headings))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, marks, *rows))


def timed_table(program: str, name: str, layout: Callable[[Any], tuple[Sequence[str], Sequence[Sequence[str]]]]) -> str:
    """One of the tables of a benchmark of speed, and what it was measured on."""
    measured = results(program).get(name)
    if not measured:
        return NOT_MEASURED
    on = measured["machine"]
    return (
        f"{table(*layout(measured['rows']))}\n\n{on['processor']}, {on['cores']} cores, torch {on['torch']}, "
        f"{on['threads']} thread(s) unless the table says otherwise; load average at the start: {on['load']}."
    )


def percent(value: float) -> str:
    """``1.4``."""
    return f"{100 * value:.1f}"


ACCURACY = {
    "default": "Forward second moments of module outputs, as the modules initialise themselves.",
    "unit": "Forward second moments of module outputs, after applying the policy `unit`.",
    "gradients": "Second moments of the gradients of module outputs and parameters, as the modules initialise themselves.",
    "unit-gradients": "Second moments of the gradients of module outputs and parameters, after applying the policy `unit`.",
}


def accuracy() -> str:
    """A table for each initialization, a row for each model."""
    parts = []
    for policy, found in results("accuracy").items():
        rows = [
            (model["model"], model["failure"] or str(model["draws"]), *_known([model]), *_quantiles(model))
            for model in found["models"]
        ]
        total = ("**all**", "", *_known(found["models"]), *_quantiles(found["all"]))
        headings = ("model", "draws", "quantities", "known to 3 %", "p50 %", "p90 %", "p99 %")
        parts.append(f"{ACCURACY[policy]}\n\n{table(headings, [*rows, total])}")
    return "\n\n".join(parts) or NOT_MEASURED


def _known(models: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """How many quantities there are, and of how many the mean over draws is known well enough to judge by."""
    known = sum(model.get("settled", model["modules"] - len(model["apart"])) for model in models)
    return str(sum(model["modules"] for model in models)), str(known)


def _quantiles(found: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(percent(found[key]) for key in ("p50", "p90", "p99"))


def bands() -> str:
    """How often one draw lies in its predicted band, and predicted over measured spreads: a row for each model, by part."""
    parts = []
    for policy, found in results("accuracy").items():
        if "coverage" not in found["all"]:
            continue
        models = [model for model in found["models"] if "coverage" in model]
        rows = [(name, *_band(model)) for name, model in [*((m["model"], m) for m in models), ("**all**", found["all"])]]
        headings = ("model", "in band %", "where spread > 1 %", "ratio p10", "p50", "p90")
        parts.append(f"{ACCURACY[policy]}\n\n{table(headings, rows)}")
    return "\n\n".join(parts) or NOT_MEASURED


def _band(found: Mapping[str, float]) -> tuple[str, ...]:
    shares = (percent(found[key]) for key in ("coverage", "coverage_loose"))
    return (*shares, *(f"{found[key]:.2f}" for key in ("spread_p10", "spread_p50", "spread_p90")))


def cosines() -> str:
    """Errors of cosines, a row for each model."""
    models = results("cosines").get("models", [])
    if not models:
        return NOT_MEASURED
    rows = [(one["model"], str(one["settled"]), *cosine_figures(one)) for one in models]
    total = ("**all**", str(sum(one["settled"] for one in models)), *cosine_figures(*models))
    sides = [f"{kind} {key}" for kind in ("samples:", "others:") for key in ("p50", "p90", "p99", "within .02, %")]
    return table(("model", "cosines", *sides), [*rows, total])


def faults() -> str:
    """Faults found and false alarms, and the models that they were put into."""
    found = results("faults")
    if not found:
        return NOT_MEASURED
    models = list(dict.fromkeys(alarm["model"] for alarm in found["alarms"]))
    return f"{table(*faults_table(found))}\n\nModels: {', '.join(models)}."


def summary() -> str:
    """The overall figures in a few lines."""
    lines = []
    for policy, found in results("accuracy").items():
        p50, p90, p99 = _quantiles(found["all"])
        lines.append(
            f"- {ACCURACY[policy].rstrip('.')}, {len(found['models'])} reference models, error against the mean over draws, "
            f"where that is known to 3 % ({' of '.join(reversed(_known(found['models'])))}): "
            f"p50 {p50} %, p90 {p90} %, p99 {p99} %."
        )
    lines += [
        f"- {plan['model']} ({plan['parameters'] / 1e9:.0f} billion parameters) without weights, {plan['work']}: "
        f"{plan['processor_seconds']:.0f} processor seconds, {plan['peak_megabytes']:.0f} MB."
        for plan in results("speed").get("large", {}).get("rows", ())
    ]
    return "\n".join(lines) or NOT_MEASURED


def kernels() -> str:
    """Tables at infinite width, and the kernels of neural-tangents."""
    return table(*kernels_table(results("neural_tangents")["rows"]))


def deep() -> str:
    """What examples/deep_plain.py trained."""
    rows = []
    for run in results("depth"):
        curve = run["curve"]
        losses = (f"{loss:.2f}" for loss in (curve[0], curve[len(curve) // 2], curve[-1]))
        rows.append((run["network"], run["start"], f"{run['rate']:g}", *losses, f"{run['accuracy']:.1%}"))
    return table(("network", "start", "best rate", "first loss", "middle", "last", "test accuracy"), rows)


def policies() -> str:
    """A column for each policy, a row for each role."""
    rows = [
        (f"`{role.value}`", *(_target(policy.targets[role]) for policy in POLICIES.values() if policy.name != "torch"))
        for role in Role
    ]
    names = [f"`{name}`" for name in POLICIES if name != "torch"]
    sources = "\n".join(f"- `{policy.name}`: {policy.source}" for policy in POLICIES.values())
    marks = ["---"] * (len(names) + 1)
    lines = ["| " + " | ".join(row) + " |" for row in (("role", *names), marks, *rows)]
    return "\n".join([*lines, "", "`torch` leaves every role to the module's own `reset_parameters`. Sources:", "", sources])


def _target(target: Target) -> str:
    """A target as one would write it in a table."""
    match target:
        case Level(second_moment=level):
            return f"level {level:g}"
        case KeyVariance(variance=variance):
            return f"variance {variance:g} over keys"
        case StreamShare(total=total):
            return f"{total:g}/N of the stream"
        case EqualContribution(second_moment=level):
            return f"equal shares of {level:g}"
        case NearChance(excess=excess):
            return f"chance + {excess:.0%}"
        case FanScaled(gain=gain, fan=fan):
            return f"{gain:g} / {fan.value}"
        case FixedStd(std=std, divided=divided):
            return f"std {std:g}" + (" / sqrt(N)" if divided else "")
    return re.sub(r"(?<!^)([A-Z])", lambda match: f" {match[1]}", type(target).__name__).lower()


def explanation() -> str:
    """What the example of the README prints."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, norm_first=True, activation=nn.functional.silu)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    generator = torch.Generator().manual_seed(0)
    plan = gs.plan(model, (torch.randn(8, 32, 64, generator=generator),), policy=find_policy("unit"))
    return f"```text\n{plan.explain('layers.0.linear2.weight')}\n```"


def calibration() -> str:
    """Calibration against LSUV."""
    found = results("calibrate")
    return table(*calibration_table(found["rows"])) if found else NOT_MEASURED


def situation(name: str) -> str:
    """What one of the eight situations asks for, and what was measured."""
    rows = results("situations").get(name)
    return table(HEADINGS, [cells(row) for row in rows]) if rows else NOT_MEASURED


def zoo_rows(headings: Sequence[str], lines: Callable[[Sequence[Any]], Sequence[Sequence[str]]]) -> str:
    """A table over the models of the zoos."""
    rows = list(zoo.read_rows().values())
    if not rows:
        return NOT_MEASURED
    found = [[cell.replace("|", "/") for cell in line] for line in lines(rows)]
    return table(headings, found) if found else "*None.*"


BLOCKS: Mapping[str, Callable[[], str]] = {
    **{name: partial(situation, name) for name in SITUATIONS},
    "accuracy": accuracy,
    "bands": bands,
    "calibration": calibration,
    "cosines": cosines,
    "deep": deep,
    "explanation": explanation,
    "faults": faults,
    "fills": lambda: timed_table("apply", "fills", fills_table),
    "kernels": kernels,
    "large": lambda: timed_table("speed", "large", large_table),
    "numpy": lambda: timed_table("apply", "numpy", fills_table),
    "policies": policies,
    "shards": lambda: timed_table("apply", "shards", shards_table),
    "stages": lambda: timed_table("speed", "stages", stages_table),
    "summary": summary,
    "zoofailures": lambda: zoo_rows(zoo.FAILURE_HEADINGS, zoo.failures),
    "zoosampled": lambda: zoo_rows(zoo.SAMPLED_HEADINGS, zoo.most_sampled),
    "zoos": lambda: zoo_rows(zoo.TOTAL_HEADINGS, zoo.totals),
    "zooworst": lambda: zoo_rows(zoo.WORST_HEADINGS, zoo.worst),
}


def main() -> int:
    """Write, or look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    pages = stale()
    for page in pages:
        print(f"{page.relative_to(ROOT)} is out of date")
        if not parser.parse_args().check:
            page.write_text(built(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if pages and parser.parse_args().check else 0


if __name__ == "__main__":
    sys.exit(main())
