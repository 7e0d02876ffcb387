"""Faults put into reference models on purpose: how many ``gs.verify`` finds, where it puts the blame, and how often it errs.

python -m benchmarks.faults [--only transformers] [--tries 2]

Each model is planned with the policy ``unit`` and applied. Then one fault at a time is put into it, at parameters that a seeded
generator picks, and verified: *found* where the check is not ok, *blamed* where its first fault is at a parameter that was
tampered with. *False alarms* are checks of healthy models that are not ok: after other draws of the plan, and of the model as it
initialises itself, without a plan, where only levels that are not as predicted count (a loud head is no false alarm). Writes
benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.measure import one_thread
from benchmarks.zoo.reference import Example, reference_models
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import gainstage as gs
from gainstage.errors import NonFiniteError
from gainstage.plan import Family
from gainstage.verify import FindingKind

RESULTS = Path(__file__).with_name("results") / "faults.json"
LEAST = 256  # entries of a parameter that is tampered with: of fewer, one draw may well be three times as large
Injection = Callable[["Patient", random.Random], Sequence[str]]  # tampers; returns the names that may be blamed, none: not here


@dataclass(frozen=True, slots=True)
class Patient:
    """A model that was drawn as planned."""

    model: nn.Module
    plan: gs.Plan
    tensors: Mapping[str, nn.Parameter]

    def drawn(self) -> list[str]:
        """Matrices whose entries are drawn, large enough."""
        return [
            name
            for name, planned in self.plan.parameters.items()
            if planned.distribution.std > 0.0
            and not planned.blocks
            and planned.distribution.family is not Family.KEEP
            and self.tensors[name].dim() > 1
            and self.tensors[name].numel() >= LEAST
        ]

    def of_role(self, role: str) -> list[str]:
        """Those with this role."""
        return [name for name in self.drawn() if self.plan.parameters[name].role == role]


def scaled(factor: float) -> Injection:
    """One matrix times a number."""

    def inject(patient: Patient, rng: random.Random) -> Sequence[str]:
        name = rng.choice(patient.drawn())
        patient.tensors[name].mul_(factor)
        return [name]

    return inject


def wrong_fan(patient: Patient, rng: random.Random) -> Sequence[str]:
    """A deviation from the other fan, where the two differ by a factor of 2 at least."""
    ratios = {name: patient.tensors[name][0].numel() / _fan_out(patient.tensors[name]) for name in patient.drawn()}
    wrong = [name for name, ratio in ratios.items() if abs(math.log2(ratio)) >= 1.0]
    if not wrong:
        return []
    name = rng.choice(wrong)
    patient.tensors[name].mul_(ratios[name] ** 0.5)
    return [name]


def _fan_out(tensor: torch.Tensor) -> float:
    return tensor.numel() / tensor.shape[1]


def torch_default(patient: Patient, rng: random.Random) -> Sequence[str]:
    """A layer left as torch draws it, where that is another level."""
    names = [
        name
        for name in patient.drawn()
        if abs(math.log(patient.plan.parameters[name].distribution.std * (3.0 * patient.tensors[name][0].numel()) ** 0.5)) > 0.1
    ]
    if not names:
        return []
    name = rng.choice(names)
    nn.init.kaiming_uniform_(patient.tensors[name], a=5**0.5)
    return [name]


def clones(patient: Patient, rng: random.Random) -> Sequence[str]:
    """Two layers that start identical."""
    by_plan: dict[object, list[str]] = {}
    for name in patient.drawn():
        by_plan.setdefault((patient.plan.parameters[name].distribution, tuple(patient.tensors[name].shape)), []).append(name)
    groups = [names for names in by_plan.values() if len(names) > 1]
    if not groups:
        return []
    first, second = rng.sample(rng.choice(groups), 2)
    patient.tensors[second].copy_(patient.tensors[first])
    return [first, second]


def shards(patient: Patient, rng: random.Random) -> Sequence[str]:
    """Two ranks drew the same half."""
    names = [name for name in patient.drawn() if patient.tensors[name].shape[0] % 2 == 0]
    if not names:
        return []
    name = rng.choice(names)
    half = patient.tensors[name].shape[0] // 2
    patient.tensors[name][half:] = patient.tensors[name][:half]
    return [name]


def depth_scaling(power: float) -> Injection:
    """Ends of residual branches without their ``1 / sqrt(N)``, or with it twice."""

    def inject(patient: Patient, _rng: random.Random) -> Sequence[str]:
        names = patient.of_role("residual_end")
        if len(names) < 4:
            return []
        for name in names:
            patient.tensors[name].mul_(len(names) ** power)
        return names

    return inject


def shifted(patient: Patient, rng: random.Random) -> Sequence[str]:
    """A mean of half a deviation."""
    name = rng.choice(patient.drawn())
    patient.tensors[name].add_(0.5 * patient.plan.parameters[name].distribution.std)
    return [name]


def not_a_number(patient: Patient, rng: random.Random) -> Sequence[str]:
    """One NaN."""
    name = rng.choice(patient.drawn())
    patient.tensors[name].view(-1)[rng.randrange(patient.tensors[name].numel())] = math.nan
    return [name]


def outlier(patient: Patient, rng: random.Random) -> Sequence[str]:
    """One entry 100 deviations away: timm's ``trunc_normal_(w, std=0.02)`` makes its bound, -2, of a uniform 0."""
    name = rng.choice(patient.drawn())
    deviation = patient.plan.parameters[name].distribution.std
    patient.tensors[name].view(-1)[rng.randrange(patient.tensors[name].numel())] = 100.0 * deviation
    return [name]


FAULTS: dict[str, Injection] = {
    "three times too large": scaled(3.0),
    "three times too small": scaled(1.0 / 3.0),
    "30 % too large": scaled(1.3),
    "zeroed": scaled(0.0),
    "deviation from the other fan": wrong_fan,
    "torch's default, not applied": torch_default,
    "mean of half a deviation": shifted,
    "identical clones": clones,
    "identical shards": shards,
    "no depth scaling": depth_scaling(0.5),
    "depth scaling twice": depth_scaling(-0.5),
    "one NaN": not_a_number,
    "one entry of 100 deviations": outlier,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One fault in one model."""

    model: str
    fault: str
    parameters: tuple[str, ...]
    found: bool
    blamed: bool
    findings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One healthy model."""

    model: str
    draw: str
    ok: bool
    findings: tuple[str, ...]


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put the parameters back afterwards."""
    saved = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, values in saved:
            parameter.data.copy_(values)


def cases_of(name: str, example: Example, plan: gs.Plan, tries: int) -> list[Case]:
    """Every fault, at some places."""
    patient = Patient(example.model, plan, dict(example.model.named_parameters()))
    found = []
    for fault, inject in FAULTS.items():
        for number in range(tries):
            with restored(example.model):
                with torch.no_grad():
                    names = inject(patient, random.Random(f"{name} {fault} {number}"))  # noqa: S311 - picks a place
                if names:
                    found.append(_case(name, fault, names, example, plan))
    return found


def _case(name: str, fault: str, names: Sequence[str], example: Example, plan: gs.Plan) -> Case:
    try:
        check = gs.verify(example.model, example.args, example.kwargs, plan=plan)
    except NonFiniteError as error:
        places = [str(error).splitlines()[0]]
        return Case(
            model=name, fault=fault, parameters=tuple(names), found=True, blamed=names[0] in places[0], findings=tuple(places)
        )
    faults = [finding for finding in check.findings if finding.kind.is_fault]
    return Case(
        model=name,
        fault=fault,
        parameters=tuple(names[:3]),
        found=not check.ok,
        blamed=bool(faults) and faults[0].where in names,
        findings=tuple(f"{finding.kind}: {finding.where}" for finding in faults[:3]),
    )


def alarms_of(name: str, build: Callable[[int], Example], plan: gs.Plan, tries: int) -> list[Alarm]:
    """Healthy draws: of the plan, and of the model itself."""
    found = []
    for seed in range(1, 1 + tries):
        example = build(seed)
        check = gs.verify(example.model, example.args, example.kwargs)
        off = [f"{finding.kind}: {finding.where}" for finding in check.findings if finding.kind is FindingKind.LEVEL_OFF]
        found.append(Alarm(model=name, draw="default", ok=not off, findings=tuple(off)))
        gs.apply(example.model, plan, seed=seed)
        check = gs.verify(example.model, example.args, example.kwargs, plan=plan)
        faults = [f"{finding.kind}: {finding.where}" for finding in check.findings if finding.kind.is_fault]
        found.append(Alarm(model=name, draw="planned", ok=check.ok, findings=tuple(faults)))
    return found


def faults_table(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows: each fault, all of them, and the false alarms."""
    rows = []
    groups = {fault: [case for case in found["cases"] if case["fault"] == fault] for fault in FAULTS}
    for fault, cases in [*groups.items(), ("**all faults**", found["cases"])]:
        if cases:
            shares = [f"{sum(case[key] for case in cases) / len(cases):.1%}" for key in ("found", "blamed")]
            rows.append((fault, str(len(cases)), *shares))
    for draw, label in (("planned", "**healthy, as planned**"), ("default", "**healthy, as the modules initialise themselves**")):
        alarms = [alarm for alarm in found["alarms"] if alarm["draw"] == draw]
        if alarms:
            rows.append((label, str(len(alarms)), f"{sum(not alarm['ok'] for alarm in alarms) / len(alarms):.1%}", ""))
    return ("", "cases", "not ok", "first fault at the parameter"), rows


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose names contain one of these, separated by commas")
    parser.add_argument("--tries", type=int, default=2, help="places for each fault, and healthy draws (default: %(default)s)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the model libraries, about themselves
    one_thread()
    models = {n: build for n, build in reference_models().items() if any(part in n for part in options.only.split(","))}
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"cases": [], "alarms": []}
    found: dict[str, list[Any]] = {
        key: [one for one in kept[key] if one["model"] not in models and one["model"] in reference_models()] for key in kept
    }
    with Progress(console=Console(stderr=True)) as progress:
        for name, build in progress.track(list(models.items())):
            example = build(0)
            plan = gs.plan(example.model, example.args, example.kwargs)
            gs.apply(example.model, plan, seed=0)
            found["cases"] += [asdict(case) for case in cases_of(name, example, plan, options.tries)]
            found["alarms"] += [asdict(alarm) for alarm in alarms_of(name, build, plan, options.tries)]
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    headings, rows = faults_table(found)
    shown = Table(*headings)
    for row in rows:
        shown.add_row(*row)
    console = Console(width=None if Console().is_terminal else 150)
    console.print(shown)
    for wrong in (
        *(case for case in found["cases"] if not case["blamed"]),
        *(alarm for alarm in found["alarms"] if not alarm["ok"]),
    ):
        console.print(str(wrong))


if __name__ == "__main__":
    main()
