"""A plan as a table: what every parameter is drawn from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rich.text import Text

from gainstage.plan import Distribution, Family, ParameterPlan, Plan
from gainstage.report.numbers import number, shape, span
from gainstage.report.tables import Block, Column, Report, blocks, plural


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One parameter, or one slice of a parameter that has a distribution of its own."""

    parameter: ParameterPlan
    distribution: Distribution
    role: str
    part: str = ""  # "[0:768]" along dimension 0, "[:, 0:768]" along dimension 1


def plan_report(plan: Plan, *, grouped: bool = True) -> Report[Block[PlanRow]]:
    """The parameters of a plan in the model's order.

    Args:
        plan: the plan.
        grouped: show repeated blocks as one row, with the range of their standard deviations.
    """
    rows = [row for parameter in plan.parameters.values() for row in _rows(parameter)]
    lines = blocks(
        rows,
        name=lambda row: row.parameter.name,
        key=lambda row: (row.part, row.role, row.parameter.shape, _distribution(row.distribution)),
        grouped=grouped,
    )
    families = Counter(row.distribution.family.value for row in rows)
    mode = "training" if plan.training else "evaluation"
    counts = ", ".join(f"{count} {family}" for family, count in families.most_common())
    return Report(
        title=f"Plan {plan.policy!r}: {plural(len(plan.parameters), 'parameter')} ({counts}), {mode} mode",
        columns=_COLUMNS,
        rows=lines,
        remarks=[*(Text(note) for note in plan.notes), *_proposals(plan)],
    )


def _proposals(plan: Plan) -> list[Text]:
    """Changes to activations, equal ones together."""
    modules: dict[str, list[str]] = {}
    for change in plan.activations:
        modules.setdefault(change.formula, []).append(change.module)
    return [
        Text(f"gainstage.tailor would make {formula} of {plural(len(names), 'activation')}, {names[0]} first")
        for formula, names in modules.items()
    ]


def _rows(parameter: ParameterPlan) -> list[PlanRow]:
    if not parameter.blocks:
        return [PlanRow(parameter=parameter, distribution=parameter.distribution, role=parameter.role)]
    return [
        PlanRow(parameter=parameter, distribution=block.distribution, role=block.role or parameter.role, part=str(block))
        for block in parameter.blocks
    ]


def _distribution(distribution: Distribution) -> str:
    """The family, with the mean where there is one to tell."""
    name = distribution.family.value.replace("_", " ")
    if distribution.family is Family.CONSTANT:
        return f"{name} {number(distribution.mean)}"
    return name if distribution.mean == 0 else f"{name}, mean {number(distribution.mean)}"


def _std(block: Block[PlanRow]) -> str:
    if block.first.distribution.family in (Family.KEEP, Family.CONSTANT):
        return "-"
    return span(row.distribution.std for row in block.rows)


_COLUMNS: tuple[Column[Block[PlanRow]], ...] = (
    Column(heading="parameter", cell=lambda block: block.name + block.first.part),
    Column(heading="role", cell=lambda block: block.first.role),
    Column(heading="shape", cell=lambda block: shape(block.first.parameter.shape), importance=1),
    Column(heading="distribution", cell=lambda block: _distribution(block.first.distribution)),
    Column(heading="std", cell=_std, is_number=True),
)
