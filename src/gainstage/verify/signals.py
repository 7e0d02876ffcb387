"""Findings on the measured pass: where the level goes wrong, and which parameter sets it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from gainstage.findings import WIDEST_SPREAD, Finding, FindingKind
from gainstage.graph import Graph, NodeKind, TensorMeta
from gainstage.graph.families import CONTRACTIONS
from gainstage.plan import Family, Plan
from gainstage.verify.blame import first_attention, nearest_parameters, unused_parameters
from gainstage.verify.compare import Prediction
from gainstage.verify.measure import Pass
from gainstage.verify.result import CheckRow

DEAD, EXPLODING = 1e-4, 1e4  # second moments: float16 loses the squares of the one, and a softmax saturates on the other
SPREAD, FAR = math.log(2.0), math.log(1.25)  # of log levels: a wide band, and a level that is away from its middle
SATURATED = 0.5  # of the attention goes to one key, on average over queries

Rows = Sequence[tuple[CheckRow, Prediction]]


def not_finite(graph: Graph, rows: Rows) -> list[Finding]:
    """The first module call that returns NaN or infinity."""
    settled = {one.node for row, one in rows if math.isfinite(row.measured)}
    for row, one in rows:
        if not math.isfinite(row.measured):
            return [
                Finding(
                    kind=FindingKind.NOT_FINITE,
                    where=_where(graph, one, settled),
                    evidence=f"{_call(row)} is the first to return NaN or infinity.",
                    remedy="Look for a division, logarithm or root that meets zero, or a level that overflows its element type.",
                )
            ]
    return []


def unexplained(graph: Graph, rows: Rows, blamed: Sequence[str]) -> Rows:
    """Rows out of bounds that do not follow from parameters, inputs or nodes (by name) that are blamed already."""
    explained = graph.following([node.name for node in graph.nodes if node.name in blamed or node.parameter in blamed])
    return [(row, one) for row, one in rows if not row.ok and math.isfinite(row.measured) and one.node not in explained]


def other_inputs(graph: Graph, rows: Rows, present: Rows, blamed: Sequence[str]) -> list[Finding]:
    """Inputs to blame where the first row that misses the plan is as predicted for the present parameters and inputs.

    A row on the way from the input that is as planned clears it: what follows is the doing of the model.
    """
    row, one = unexplained(graph, rows, blamed)[0]
    now = next((now for now, other in present if other.node == one.node), None)
    if now is None or not now.ok or abs(now.z) > 0.5 * abs(row.z):
        return []
    inputs = [node for node in graph.nodes if node.kind is NodeKind.INPUT and one.node in graph.following([node.name])]
    good = [other.node for row, other in rows if row.ok and other.node in graph.following([node.name for node in inputs])]
    if one.node in graph.following(good):
        return []
    return [
        Finding(
            kind=FindingKind.OTHER_INPUTS,
            where=node.name,
            evidence=f"{_call(row)}: second moment {row.measured:.4g}, planned {row.predicted:.4g}; {now.predicted:.4g} is "
            f"predicted for the parameters as they are and these inputs{_statistics(node.value)}.",
            remedy="Scale the inputs as when the plan was made, or make the plan with inputs like these.",
        )
        for node in inputs[:1]
    ]


def _statistics(values: torch.Tensor | None) -> str:
    if values is None:
        return ""
    variance, mean = torch.var_mean(values.float(), correction=0)
    return f", of mean {float(mean):.3g} and deviation {float(variance) ** 0.5:.3g}"


def level_off(graph: Graph, rows: Rows, blamed: Sequence[str]) -> list[Finding]:
    """The first rows out of bounds, leaving out all that follows from parameters already blamed or from each other."""
    settled = {one.node for row, one in rows if row.ok}
    findings: list[Finding] = []
    while left := unexplained(graph, rows, blamed):
        row, one = left[0]
        findings.append(
            Finding(
                kind=FindingKind.LEVEL_OFF,
                where=_where(graph, one, settled),
                evidence=f"{_call(row)}: second moment {row.measured:.4g}, predicted {row.predicted:.4g}, "
                f"which is {_factor(row)} ({row.z:+.1f} deviations). It is the first on its way that is off.",
                remedy="Look at how this parameter is drawn and at what the module does with it: entries that are not drawn "
                "independently, a scale applied twice or not at all.",
            )
        )
        blamed = [*blamed, one.node]
    return findings


def large_spread(graph: Graph, rows: Rows) -> list[Finding]:
    """The first contraction within a wide band but away from its middle: no fault of any parameter, but of this draw."""
    wide = (
        (row, one)
        for row, one in rows
        if graph.by_name[one.node].short_name in CONTRACTIONS
        and row.ok
        and row.spread > SPREAD
        and row.ratio > 0.0
        and abs(math.log(row.ratio)) > FAR
    )
    return [
        Finding(
            kind=FindingKind.LARGE_SPREAD,
            where=_where(graph, one, set()),
            evidence=f"{_call(row)}: second moment {row.measured:.4g}, predicted {row.predicted:.4g}, which is {_factor(row)}. "
            f"From draw to draw that level varies by a factor of {_varied(row.spread)} (one deviation).",
            remedy="Bring this draw to its planned levels with one pass over real data: gs.calibrate(model, plan, args).",
        )
        for row, one in list(wide)[:1]
    ]


def _varied(spread: float) -> str:
    if spread <= WIDEST_SPREAD:
        return f"{math.exp(spread):.2g}"
    return f"{math.exp(WIDEST_SPREAD):.0f} and more, so that any level is as good as predicted"


def _factor(row: CheckRow) -> str:
    return "nothing where there was to be something" if row.measured == 0.0 else f"{row.ratio:.3g} times as much"


def _call(row: CheckRow) -> str:
    name = f"module {row.path!r}" if row.path else "the model"
    return f"{name} ({row.module_type.rpartition('.')[2]}" + (f", call {row.call + 1})" if row.call else ")")


def _where(graph: Graph, one: Prediction, settled: set[str]) -> str:
    """The parameter between this output and what is known to be right, or the module."""
    return next(iter(nearest_parameters(graph, [one.node], settled - {one.node})), one.path)


def extreme_levels(graph: Graph, rows: Rows, input_level: float) -> list[Finding]:
    """The first call that is too loud, and the first from which on everything is too quiet.

    Too loud: above EXPLODING, of the input's level where that is above 1. Too quiet: below DEAD.
    """
    finite = [(row, one) for row, one in rows if math.isfinite(row.measured)]
    loud = next(((row, one) for row, one in finite if row.measured > EXPLODING * max(input_level, 1.0)), None)
    calm = {one.node for row, one in finite if DEAD <= row.measured <= EXPLODING}
    findings = [] if loud is None else [_extreme(graph, *loud, FindingKind.EXPLODING, calm)]
    quiet: tuple[CheckRow, Prediction] | None = None
    for row, one in reversed(finite):
        if row.measured >= DEAD:
            break
        if quiet is not None or not _is_last(graph, one.node):
            quiet = row, one
    return findings if quiet is None else [*findings, _extreme(graph, *quiet, FindingKind.DEAD, calm)]


def _is_last(graph: Graph, name: str) -> bool:
    """No parameter is read after this node: a head may well start near zero."""
    after = graph.following([name])
    read = [graph.by_name[operand] for later in after - {name} for operand in graph.by_name[later].operands()]
    return not any(node.kind is NodeKind.PARAMETER for node in read)


def _extreme(graph: Graph, row: CheckRow, one: Prediction, kind: FindingKind, calm: set[str]) -> Finding:
    is_dead = kind is FindingKind.DEAD
    return Finding(
        kind=kind,
        where=_where(graph, one, calm),
        evidence=f"{_call(row)} has second moment {row.measured:.3g}"
        + (f", and nothing after it comes above {DEAD:g}." if is_dead else ", the first above 1e4 times the input's."),
        remedy="Set the levels of all layers: gs.initialize(model, ...).",
    )


def saturated(graph: Graph, found: Pass) -> list[Finding]:
    """Attentions in which one key takes most of the weight before anything is learnt."""
    findings: list[Finding] = []
    for attention in found.attentions:
        if attention.largest_weight < SATURATED:
            continue
        names = nearest_parameters(graph, first_attention(graph, attention.path))
        where = max(names[:2], key=lambda name: found_std(found, graph, name), default=attention.path)
        if where not in {finding.where for finding in findings}:
            findings.append(
                Finding(
                    kind=FindingKind.SATURATED,
                    where=where,
                    evidence=f"In module {attention.path!r} the logits of {attention.keys:.0f} keys have deviation "
                    f"{attention.logit_std:.3g}, and one key takes {attention.largest_weight:.0%} of the weight.",
                    remedy="Logits are to have deviation 1: make queries and keys smaller, gs.initialize(model, ...).",
                )
            )
    return findings


def found_std(found: Pass, graph: Graph, name: str) -> float:
    """Level of what the module of a parameter returned: of query and key the louder one is to blame."""
    calls = found.calls.get((graph.parameters[name].module_path, 0), {})
    return next((measured.second_moment for measured in calls.values()), 0.0)


def output_heads(graph: Graph) -> dict[int, tuple[str, int]]:
    """Outputs of the model that a contraction makes: position -> its parameter, and the dimension of the classes."""
    heads = {}
    root = next((call for call in graph.calls if not call.path), None)
    for position, name in zip(root.positions, root.outputs, strict=True) if root else ():
        node = graph.by_name[name]
        while node.short_name in ("add", "view", "reshape", "to", "_to_copy"):
            node = graph.by_name[next(iter(node.operands()))]
        short = node.short_name
        parameters = [graph.by_name[operand].parameter for operand in node.operands()]
        weight = next((parameter for parameter in parameters if parameter), None)
        if short in CONTRACTIONS and weight and isinstance(node.meta, TensorMeta):
            heads[position] = (weight, 1 if short.startswith("conv") else -1)
    return heads


def first_losses(heads: Mapping[int, tuple[str, int]], outputs: Mapping[int, torch.Tensor]) -> dict[int, tuple[float, float]]:
    """For each head: cross-entropy at targets drawn by chance, ``E[logsumexp(y) - mean(y)]``, and ``log(classes)``."""
    losses = {}
    for position, (_, dim) in heads.items():
        logits = outputs[position].detach() if position in outputs else None
        if logits is not None and logits.dim() > 1 and logits.shape[dim] > 1 and logits.is_floating_point():
            wide = logits.to(torch.float32)
            loss = float((wide.logsumexp(dim) - wide.mean(dim)).mean())
            losses[position] = loss, math.log(logits.shape[dim])
    return losses


def loud_heads(heads: Mapping[int, tuple[str, int]], found: Pass, plan: Plan | None) -> list[Finding]:
    """Heads whose first loss would be more than twice what chance gives, were it a cross-entropy; not those with class priors."""
    return [
        Finding(
            kind=FindingKind.LOUD_HEAD,
            where=heads[position][0],
            evidence=f"A first cross-entropy of {loss:.3g} where guessing gives log({math.exp(chance):.0f}) = {chance:.3g}.",
            remedy="Make the head's weights smaller (gs.initialize(model, ...)); a tied embedding sets its level too.",
        )
        for position, (loss, chance) in found.first_losses.items()
        if loss > 2.0 * chance and not _has_priors(heads[position][0], plan)
    ]


def _has_priors(weight: str, plan: Plan | None) -> bool:
    """Whether the plan gives each class a bias of its own."""
    bias = None if plan is None else plan.parameters.get(weight.rpartition("weight")[0] + "bias")
    return bias is not None and any(block.distribution.family is Family.CONSTANT for block in bias.blocks)


def unused(graph: Graph, found: Pass) -> list[Finding]:
    """Parameters that reach no output, those of one module together."""
    lost = unused_parameters(graph)
    by_module: dict[str, list[str]] = {}
    for name in lost:
        by_module.setdefault(graph.parameters[name].module_path, []).append(name)
    called = {path for path, _ in found.calls}
    return [
        Finding(
            kind=FindingKind.UNUSED,
            where=names[0],
            evidence=f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} "
            + ("reach no output of the model." if path in called else f"reach no output: module {path!r} is never called."),
            remedy="Remove what is not used, or call it; with these inputs it is never trained.",
        )
        for path, names in by_module.items()
    ]
