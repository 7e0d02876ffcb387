"""Operations as tables: those of a model with how each is predicted, and those that have a rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.text import Text

from gainstage.graph import Graph, Node, NodeKind
from gainstage.propagate import has_rule
from gainstage.report.tables import Column, Report, plural
from gainstage.rules import Rule, is_free, rules


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRow:
    """One operation of a model: how often it occurs, and whether it is ruled, sampled or free of statistics."""

    op: str
    count: int
    treatment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleRow:
    """One operation with a rule: the family that the rule belongs to, and its formula."""

    op: str
    family: str
    formula: str


def count_ops(graph: Graph, sampled: Collection[str] = ()) -> list[OpRow]:
    """The operations of a captured model, most frequent first; ``sampled``: nodes that no rule covers, where known."""
    counts = Counter((node.op_name, _treatment(node, sampled)) for node in graph.nodes if node.kind is NodeKind.OP)
    return [
        OpRow(op=op, count=count, treatment=treatment)
        for (op, treatment), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _treatment(node: Node, sampled: Collection[str]) -> str:
    assert node.op is not None
    if is_free(node.op):
        return "free"
    return "ruled" if has_rule(node) and node.name not in sampled else "sampled"


def ops_report(graph: Graph, sampled: Collection[str], remarks: Sequence[str]) -> Report[OpRow]:
    """The operations of a captured model, how it was captured, what had to be assumed, and which rules gave up."""
    rows = count_ops(graph, sampled)
    by_treatment: Counter[str] = Counter()
    for row in rows:
        by_treatment[row.treatment] += row.count
    counts = ", ".join(f"{count} {treatment}" for treatment, count in by_treatment.most_common())
    return Report(
        title=f"{plural(len(rows), 'operation')}, {plural(by_treatment.total(), 'node')}: {counts} (rung {graph.rung})",
        columns=(
            Column(heading="operation", cell=lambda row: row.op),
            Column(heading="nodes", cell=lambda row: str(row.count), is_number=True),
            Column(heading="statistics", cell=lambda row: row.treatment),
        ),
        rows=rows,
        remarks=[Text(remark) for remark in remarks],
    )


def list_rules() -> list[RuleRow]:
    """Every operation that has a rule, by family and name."""
    rows = [
        RuleRow(op=str(op), family=rule.__module__.rpartition(".")[2], formula=_formula(rule)) for op, rule in rules().items()
    ]
    return sorted(rows, key=lambda row: (row.family, row.op))


def _formula(rule: Rule) -> str:
    """The first line of the rule's docstring, or else the mathematical class that it was declared by."""
    if rule.__doc__:
        return rule.__doc__.strip().splitlines()[0].replace("``", "")
    return rule.__qualname__.partition("(")[0].partition(".")[0]


def rules_report(rows: list[RuleRow]) -> Report[RuleRow]:
    """The registry of rules."""
    return Report(
        title=f"{plural(len(rows), 'operation')} with a rule",
        columns=(
            Column(heading="operation", cell=lambda row: row.op),
            Column(heading="family", cell=lambda row: row.family),
            Column(heading="rule", cell=lambda row: row.formula, is_prose=True),
        ),
        rows=rows,
    )
