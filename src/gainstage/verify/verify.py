"""The whole verification: check the input, run the model, compare, and find what is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gainstage.apply.holding import holdings_of
from gainstage.apply.pieces import Assembled
from gainstage.apply.ranks import together
from gainstage.apply.write import PATIENCE
from gainstage.errors import InputError, NonFiniteError, PlanMismatchError
from gainstage.findings import Finding
from gainstage.graph import Graph, dense, digest, fingerprint, held, tensor_leaves
from gainstage.plan import Plan
from gainstage.propagate import Trace, check_initialised
from gainstage.verify import signals
from gainstage.verify.batch import Batch, put_together, ranks_at_work
from gainstage.verify.compare import MODEL_ERROR, compare, predictions, z_bound
from gainstage.verify.measure import Pass, run_forward, samples_in
from gainstage.verify.parameters import clones, lost_ties, not_as_planned
from gainstage.verify.result import Check
from gainstage.verify.streamed import run_streamed


def check_values(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse what has no values to measure, or values that are no numbers.

    Raises:
        InputError: parameters or inputs on the meta device.
        UnsupportedParameterError: lazy parameters without values.
        NonFiniteError: NaN or infinity in a parameter or an input, NaN in a buffer (masks may hold infinity).
    """
    check_initialised(dict(model.named_parameters()))
    on_meta = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if on_meta:
        raise InputError(
            f"{on_meta[0]} and {len(on_meta) - 1} more lie on the meta device: there are no values to measure. "
            "gs.materialize(model, plan) gives it values; with plan=plan, gs.verify can do without."
        )
    bad = [f"parameter {name}" for name, tensor in model.named_parameters() if not bool(held(tensor).isfinite().all())]
    bad += [f"buffer {name}" for name, tensor in model.named_buffers() if bool(dense(held(tensor)).isnan().any())]
    _refuse(bad, "initialise them first")
    check_inputs(args, kwargs)


def check_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs without values, or with values that are no numbers.

    Raises:
        InputError: an input on the meta device.
        NonFiniteError: NaN or infinity in an input.
    """
    leaves = [dense(held(leaf)) for leaf in tensor_leaves((args, dict(kwargs)))]
    if any(leaf.is_meta for leaf in leaves):
        raise InputError("An input lies on the meta device; a real pass needs real inputs.")
    bad = [f"input {position}" for position, leaf in enumerate(leaves) if not _is_input(leaf)]
    _refuse(bad, "give inputs that are finite")


def _refuse(bad: list[str], remedy: str) -> None:
    if bad:
        raise NonFiniteError(f"NaN or infinity in {', '.join(bad[:8])}{' and more' if len(bad) > 8 else ''}: {remedy}.")


def _is_input(tensor: torch.Tensor) -> bool:
    """Numbers, or minus infinity, which additive masks are made of."""
    return not bool(tensor.isnan().any()) and not bool(tensor.isposinf().any() if tensor.is_floating_point() else False)


def check_ranks(plan: Plan | None, model: nn.Module, check: Callable[[], None]) -> None:
    """Check the input on all processes that verify together, and that they have the same plan and model.

    Args:
        plan: where the predictions come from, if there is one.
        model: of this process.
        check: raises where something is wrong with the input of this process.

    Raises:
        RankError: another process raises, has another plan, or a model of other shapes, or other values in what all hold.
    """

    def said() -> str:
        check()
        facts = [
            (name, here.shape, str(here.dtype), b"" if here.ranks or here.memory.is_meta else digest(here.memory))
            for name, here in holdings_of(model).items()
        ]
        text = repr((model.training, facts, None if plan is None else plan.to_json()))
        return hashlib.sha256(text.encode()).hexdigest()

    if ranks_at_work():
        together(ranks_at_work(), said, PATIENCE, subject="the plan, the model or its values")
    else:
        check()


def on_all_ranks(run: Callable[[], Pass]) -> Pass:
    """A pass on each process; all raise where one fails."""
    found: list[Pass] = []

    def work() -> str:
        found.append(run())
        return ""

    together(ranks_at_work(), work, PATIENCE)
    return found[0]


def verify(
    graph: Graph,
    model: Assembled,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    batch: Batch,
    plan: Plan | None,
    present: Callable[[], Trace],
) -> Check:
    """Measure a real forward pass and compare it with a plan, or with a trace at the present weights.

    Args:
        graph: of this model at the whole batch.
        model: with values; left exactly as it was.
        args: positional arguments of forward: of this process, if there are several.
        kwargs: keyword arguments of forward.
        batch: that of all processes.
        plan: where the predictions come from, if there is one.
        present: predicts at the present parameters and inputs; asked for without a plan, or where the plan is not met.

    Raises:
        PlanMismatchError: the plan was made for another model, or another mode of it.
        InputError: forward failed.
    """
    findings: list[Finding] = []
    if plan is not None:
        findings += _check_plan(plan, graph, model.parameters)
    findings += [
        finding
        for finding in clones(model.parameters, graph.parameters)
        if finding.where not in {known.where for known in findings}
    ]
    heads = signals.output_heads(graph)

    def look(outputs: Mapping[int, torch.Tensor]) -> Mapping[int, tuple[float, float]]:
        return signals.first_losses(heads, outputs)

    found = on_all_ranks(lambda: run_forward(model.running, args, kwargs, modules=model.modules, look_at_output=look))
    return _judge(graph, found, findings, heads=heads, batch=batch, plan=plan, present=present)


def verify_drawn(
    graph: Graph,
    parameters: Mapping[str, torch.Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    whole: Graph,
    batch: Batch,
    plan: Plan,
    present: Callable[[], Trace],
    progress: Callable[[int, int], object] | None,
) -> Check:
    """As :func:`verify`, for a model on the meta device, with parameters that exist only while an operation reads them.

    Args:
        graph: of this model at these arguments, those of this process.
        parameters: what the plan would draw.
        args: positional arguments of forward.
        kwargs: keyword arguments of forward.
        whole: of this model at the whole batch.
        batch: that of all processes.
        plan: where the predictions come from.
        present: predicts the plan's parameters at these inputs.
        progress: called with the number of operations done, and in all.

    Raises:
        PlanMismatchError: the plan was made for another model, or another mode of it.
        InputError: an operation fails.
    """
    plan.check_fits(graph.parameters)
    check_mode(plan, graph)
    check_operations(plan, graph)
    heads = signals.output_heads(graph)

    def run() -> Pass:
        return run_streamed(
            graph,
            parameters,
            samples=samples_in(args, kwargs),
            look_at_output=lambda outputs: signals.first_losses(heads, outputs),
            progress=progress,
        )

    return _judge(whole, on_all_ranks(run), [], heads=heads, batch=batch, plan=plan, present=present)


def _judge(
    graph: Graph,
    found: Pass,
    findings: list[Finding],
    *,
    heads: Mapping[int, tuple[str, int]],
    batch: Batch,
    plan: Plan | None,
    present: Callable[[], Trace],
) -> Check:
    """Compare the passes of all processes with their predictions, and add to what was found on the parameters."""
    found = put_together(found, batch, graph)
    rows = compare(predictions(graph, present() if plan is None else plan), found)
    findings += signals.not_finite(graph, rows)
    blamed = [finding.where for finding in findings]
    if plan is not None and signals.unexplained(graph, rows, blamed):
        findings += signals.other_inputs(graph, rows, compare(predictions(graph, present()), found), blamed)
    findings += signals.level_off(graph, rows, [finding.where for finding in findings])
    symptoms = [
        *signals.saturated(graph, found),
        *signals.extreme_levels(graph, rows, _input_level(batch.args, batch.kwargs)),
        *signals.loud_heads(heads, found, plan),
    ]
    findings += [finding for finding in symptoms if not findings or finding.where not in {known.where for known in findings}]
    findings += signals.unused(graph, found)
    findings += signals.large_spread(graph, rows) if plan is not None else []
    return Check(rows=tuple(row for row, _ in rows), findings=tuple(findings), bound=z_bound(len(rows)), model_error=MODEL_ERROR)


def _check_plan(plan: Plan, graph: Graph, tensors: Mapping[str, torch.Tensor]) -> list[Finding]:
    findings, facts = lost_ties(plan, graph.parameters)
    plan.check_fits(facts)
    check_mode(plan, graph)
    if not findings:
        check_operations(plan, graph)
    return findings + not_as_planned(plan, tensors)


def check_mode(plan: Plan, graph: Graph) -> None:
    """Refuse a plan that was made for the other mode of the model.

    Raises:
        PlanMismatchError: it was.
    """
    if plan.training != graph.training:
        made, now = ("train", "eval") if plan.training else ("eval", "train")
        raise PlanMismatchError(
            f"The plan was made for {made} mode, the model is in {now} mode, where other levels are to be expected. "
            f"Call model.{'train' if plan.training else 'eval'}() first, or make a plan for this mode."
        )


def check_operations(plan: Plan, graph: Graph) -> None:
    """Refuse a plan that was made for other operations on the same parameters.

    Raises:
        PlanMismatchError: it was.
    """
    if plan.fingerprint and plan.fingerprint != fingerprint(graph):
        raise PlanMismatchError("The model has the plan's parameters, but other operations read them. Make a plan of this model.")


def _input_level(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Largest second moment among the floating-point inputs."""
    leaves = [dense(leaf.detach()) for leaf in tensor_leaves((args, dict(kwargs))) if leaf.is_floating_point()]
    levels = [float(leaf.float().square().mean()) for leaf in leaves]
    return max((level for level in levels if level < float("inf")), default=1.0)
