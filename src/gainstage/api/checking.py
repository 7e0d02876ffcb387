"""Holding a model that was drawn against its plan, and bringing it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from gainstage.api.present import check_call, measured_input, moments_of, on_host, present_values
from gainstage.apply.buffers import known_buffers
from gainstage.apply.drawn import DrawnParameters
from gainstage.apply.pieces import assembled
from gainstage.calibrate import Calibration
from gainstage.calibrate import calibrate as calibrate_to
from gainstage.capture import capture
from gainstage.errors import InputError
from gainstage.graph import with_copies
from gainstage.plan import Plan
from gainstage.propagate import (
    Trace,
    build_trace,
)
from gainstage.roles import infer_roles
from gainstage.solve import planned_values
from gainstage.verify import (
    Batch,
    Check,
    check_inputs,
    check_mode,
    check_operations,
    check_ranks,
    check_values,
    gathered,
    verify_drawn,
)
from gainstage.verify import verify as compare_with


def verify(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, plan: Plan | None = None,
    seed: int = 0, progress: Callable[[int, int], object] | None = None,
) -> Check:  # fmt: skip
    """Run the model once, compare every module call with its prediction, and name what is wrong; change nothing.

    A model on the meta device is run on what :func:`apply` would write: each parameter is drawn when an operation reads it and
    dropped after, so that the model may be larger than memory.

    Where ``torch.distributed`` runs, all processes make this call, with a model that is sharded or the same on all, each with
    its part of the batch (or all with the same); each returns what one process would find on the whole batch.

    Args:
        model: in the mode that is to be verified.
        args: positional arguments of forward; real inputs, best of several samples.
        kwargs: keyword arguments of forward.
        plan: what the model was initialised with. Without it the prediction is that of the present parameters.
        seed: of the draw, for a model on the meta device.
        progress: for a model on the meta device: called with the number of operations done, and in all.

    Returns:
        Rows of predicted and measured second moments, and findings with the parameter to blame.

    Raises:
        NonFiniteError: NaN or infinity in a parameter or an input.
        PlanMismatchError: the plan was made for another model.
        InputError: a model on the meta device without a plan, or a forward pass that fails.
        RankError: another process failed, has another plan, model or values, inputs of other shapes, or does not answer.

    Example::

        check = gs.verify(model, (x,), plan=plan)
        assert check.ok, check
    """
    check_call(model, args, kwargs)
    given = dict(kwargs or {})
    is_drawn = plan is not None and all(parameter.is_meta for parameter in model.parameters())
    check_ranks(plan, model, lambda: check_inputs(args, given) if is_drawn else check_values(model, args, given))
    found = assembled(model, () if plan is None else plan.parameters)
    batch = gathered(args, given)
    if plan is not None and is_drawn:
        return _verify_drawn(found.code, args, given, plan, batch, seed=seed, progress=progress)
    graph = capture(found.code, batch.args, batch.kwargs, buffers=found.buffers)

    def present() -> Trace:
        with on_host():
            copied = with_copies(graph, found.parameters)
            return build_trace(copied, present_values(copied, found.parameters, infer_roles(copied)))

    return compare_with(graph, found, args, given, batch=batch, plan=plan, present=present)


def _verify_drawn(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], plan: Plan, batch: Batch, *, seed: int,
    progress: Callable[[int, int], object] | None,
) -> Check:  # fmt: skip
    parameters = DrawnParameters(plan, seed)
    buffers = known_buffers(model)
    graph = capture(model, batch.args, batch.kwargs, buffers=buffers)
    if graph.guesses:
        raise InputError(
            f"A real pass needs every buffer. {' '.join(graph.guesses[:4])} "
            "Those that the modules cannot be asked for are given to gs.materialize(model, plan, buffers=...)."
        )

    def present() -> Trace:
        tables = dict(model.named_parameters())
        with on_host():
            values = planned_values(graph, plan, moments=moments_of(model), tables=tables, source=measured_input, at_plan=False)
            return build_trace(graph, values)

    own = graph if len(batch.parts) == 1 else capture(model, args, kwargs, buffers=buffers)
    return verify_drawn(
        own, parameters, args, kwargs, whole=graph, batch=batch, plan=plan, present=present, progress=progress
    )  # fmt: skip


def calibrate(model: nn.Module, plan: Plan, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Calibration:
    """Scale the parameters of a drawn model so that its levels on these data are those planned, in one forward pass.

    In execution order, each contraction (and each norm or layer scale that ends a branch) is measured and its parameter
    multiplied by ``sqrt(planned / measured)``, rows of a fused projection one by one; what follows sees the scaled output. A
    parameter that is used again keeps the scale of its first use; what the plan keeps is kept. The result depends on the data.

    Args:
        model: drawn from the plan, in its mode; only scaled parameters change, all of them or none.
        plan: what the model was drawn from.
        args: positional arguments of forward: real data, a batch as it will be trained on.
        kwargs: keyword arguments of forward.

    Returns:
        A row for each level: what was scaled by how much, the level before and after, the planned one, and what is out of reach.

    Raises:
        NonFiniteError: NaN or infinity in a parameter, an input, or on the way.
        PlanMismatchError: the plan was made for another model, or another mode of it.
        InputError: a model on the meta device, or a pass that fails.

    Example::

        plan = gs.initialize(model, (x,), seed=0)
        print(gs.calibrate(model, plan, (x,)))
    """
    check_call(model, args, kwargs)
    given = dict(kwargs or {})
    check_values(model, args, given)
    graph = capture(model, args, given)
    plan.check_fits(graph.parameters)
    check_mode(plan, graph)
    check_operations(plan, graph)
    tables = dict(model.named_parameters())
    with on_host():
        planned = planned_values(graph, plan, moments=moments_of(model), tables=tables, source=measured_input)
        found = infer_roles(graph)
    return calibrate_to(graph, found, plan, planned, model)
