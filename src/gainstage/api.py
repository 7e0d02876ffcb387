"""The public functions: each is one walk through the stages, and adds to errors what the user asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gainstage.apply import apply, tailor
from gainstage.apply.buffers import known_buffers
from gainstage.apply.drawn import DrawnParameters
from gainstage.apply.pieces import assembled
from gainstage.calibrate import Calibration
from gainstage.calibrate import calibrate as calibrate_to
from gainstage.capture import capture, copied
from gainstage.errors import InputError, UnknownNameError, nearest
from gainstage.graph import Graph, Node, NodeKind, ParameterInfo, TensorMeta, enters_regions_only, real_parameters
from gainstage.inputs import InputStatistics, Measured, TokenStatistics, by_name, with_tokens
from gainstage.inputs import measure_inputs as gather_inputs
from gainstage.plan import Plan
from gainstage.policies import Policy, find_policy
from gainstage.propagate import (
    Trace,
    build_trace,
    constant_value,
    input_value,
    kurtosis,
    level_profile,
    parameter_moments,
    parameter_value,
    propagate,
    propagate_backward,
    table_value,
)
from gainstage.report.progress import progress_bar
from gainstage.roles import Roles, infer_roles, is_data
from gainstage.signal import Value
from gainstage.signal.gain import gain
from gainstage.solve import Present, attention_signals, find_balance, find_determinant, find_family, planned_values, solve
from gainstage.verify import (
    Batch,
    Check,
    TaskGradients,
    check_inputs,
    check_mode,
    check_operations,
    check_ranks,
    check_values,
    check_weights,
    gathered,
    judge_tasks,
    measure_tasks,
    verify_drawn,
)
from gainstage.verify import verify as compare_with

__all__ = ["apply", "calibrate", "gain", "initialize", "inspect", "measure_inputs", "plan", "tailor", "task_gradients", "verify"]


def inspect(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> Trace:
    """Predict every tensor and every gradient of the model at its present parameters; change nothing.

    Args:
        model: any module with values in its parameters, in the mode (train or eval) that is to be looked at.
        args: positional example inputs; their statistics are measured.
        kwargs: keyword inputs.
        loss: the model's output -> a scalar, such as ``lambda y: F.cross_entropy(y, labels)``. Gradients are those of the loss;
            without it those of the sum of all outputs, each entry with an independent weight of mean 0 and second moment 1.

    Returns:
        Signals by module call and by node, statistics of the parameters.

    Raises:
        GainstageError: the model cannot be captured or predicted; a parameter or an input is not finite.

    Example::

        trace = gs.inspect(model, (x,))
        trace.modules["layer1.0.conv1"][0].second_moment
        trace.parameters["layer1.0.conv1.weight"].gradient_second_moment
    """
    _check_call(model, args)
    graph = capture(model, args, kwargs, loss=loss, buffers=known_buffers(model))
    with _host():
        roles = infer_roles(graph)
        values = present_values(graph, real_parameters(model), roles)
        trace = build_trace(graph, values, propagate_backward(graph, values))
        return replace(trace, attention=attention_signals(graph, roles, values))


def present_values(graph: Graph, tensors: Mapping[str, torch.Tensor], roles: Roles) -> dict[str, Any]:
    """Every node at the present parameters: independent entries with their moments, slice by slice where slices differ."""
    moments = {name: parameter_moments({name: tensors[name]})[name] for name in tensors if name in graph.parameters}
    index = {name: position for position, name in enumerate(graph.parameters)}

    def present(info: ParameterInfo) -> Value:
        if enters_regions_only(graph, info.name):
            return replace(constant_value(tensors[info.name]), lineage=1 << index[info.name])
        tensor = tensors[info.name]
        is_table = is_data(graph, info.name, roles.of(info.name))
        table = table_value(tensor, index[info.name]) if is_table else None
        if table is not None:
            return table
        return parameter_value(info, index[info.name], *moments[info.name], level_profile(tensor), kurtosis=kurtosis(tensor))

    return propagate(graph, present, measured_input)


def plan(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, policy: str | Policy = "unit",
    balance: str = "forward", roles: Mapping[str, str] | None = None, distribution: str | None = None, keep: Sequence[str] = (),
    include_frozen: bool = False, inputs: Measured | Mapping[str, Measured] | None = None,
    priors: Mapping[str, Any] | None = None, logdet_std: float | None = None, logdet: int | None = None,
) -> Plan:  # fmt: skip
    """Choose a distribution for every parameter; change nothing.

    Args:
        model: any module, also on the meta device, in the mode that it will be trained in.
        args: positional example inputs; their statistics are measured, those on the meta device are taken as standard normal.
        kwargs: keyword inputs.
        policy: a named set of targets (unit, isometric, torch, he, glorot, lecun, gpt2), or one of your own.
        balance: which direction hidden weights keep second moments in: forward, backward (of gradients), or geometric, the
            geometric mean of both variances. Logits, shares of branches and heads keep their meaning forward.
        roles: glob pattern of parameter names -> role, where the graph is not to decide.
        distribution: what weights are drawn from: normal, truncated_normal, uniform, orthogonal or delta_orthogonal; by default
            what the policy says.
        keep: glob patterns of parameters to leave as they are.
        include_frozen: plan parameters that take no gradient, too.
        inputs: what :func:`measure_inputs` found, of the first input, or by the name of an input. It takes the place of what the
            examples show, and a layer that multiplies the input directly is whitened: its weights are drawn with
            ``Cov(w) = Sigma^-1 / r``, and its bias takes off the mean.
        priors: glob pattern of names of heads' biases -> how likely each output's class is: a probability for each output (of one
            softmax where they sum to 1), integer labels, or targets [samples, outputs], which are counted. The bias is
            ``log p`` under a softmax, ``-log((1 - p) / p)`` for outputs that are decided one by one.
        logdet_std: for a normalizing flow that returns ``(z, log_determinant)``: the deviation of the log-determinant over draws
            and inputs, 0.1 for one. The last weights of the networks of scales and shifts are drawn so that it holds; 0 sets
            them to zero.
        logdet: which output is the log-determinant; without it the one of shape [batch].

    Returns:
        The plan: what :func:`apply` draws, what :func:`verify` checks, and ``plan.explain(name)``.

    Raises:
        UnknownNameError: a policy, balance, role, distribution or parameter that does not exist.
        NonFiniteError: NaN or infinity in an input or in a parameter that is kept.
        GainstageError: the model cannot be captured or predicted.

    Example::

        plan = gs.plan(model, (x,))
        print(plan.explain("layer3.0.conv2.weight"))
    """
    _check_call(model, args)
    chosen, direction = find_policy(policy), find_balance(balance)
    family = find_family(distribution or chosen.distribution)
    args, kwargs = with_tokens(model, args, kwargs or {}, inputs)
    tables = real_parameters(model)

    def solved(graph: Graph) -> Plan:
        known = {
            node.name: node.meta.shape
            for node in graph.nodes
            if isinstance(node.meta, TensorMeta) and node.kind is NodeKind.INPUT
        }
        moments = by_name(inputs, known)
        determinant = find_determinant(graph, logdet_std, logdet)
        kept = kept_parameters(graph, [keep] if isinstance(keep, str) else keep, include_frozen=include_frozen)
        present = Present(moments=moments_of(model), tables=tables, kept=kept)

        def source(node: Node) -> Value:
            return moments[node.name].value(known[node.name]) if node.name in moments else measured_input(node)

        with _host():
            found = infer_roles(graph, roles, log_determinant=determinant)
            return solve(
                graph, found, chosen, present=present, source=source, family=family, balance=direction,
                inputs=moments, priors=priors, logdet_std=logdet_std,
            )  # fmt: skip

    graph = capture(model, args, kwargs, buffers=known_buffers(model))
    made = solved(graph)
    if graph.rung == "tape" and not any(tensor.is_meta or is_lazy(tensor) for tensor in tables.values()):
        # What a run saw in values holds for the values that it ran on: look again at those that were planned.
        drawn, drawn_args, drawn_kwargs = copied(model, args, kwargs)
        apply(drawn, made, seed=0)
        made = solved(capture(drawn, drawn_args, drawn_kwargs))
    return made


def measure_inputs(
    loader: Iterable[Any], *, first: nn.Module | None = None, key: str | int = 0, progress: bool = True
) -> InputStatistics | TokenStatistics:
    """Mean, second moments and covariance of a data set in one pass, for ``plan(..., inputs=...)``.

    Sums are kept in float64 and merged as by Chan, Golub & LeVeque (1979). Where processes share a model (``torch.distributed``),
    each passes over its own part of the data, and all return the same: the moments of all parts.

    Args:
        loader: yields batches: a tensor [samples, ...], or a tuple or mapping that has it.
        first: the layer that reads the data, for what it multiplies: the features of a linear layer, the patches of a
            convolution, the tokens of an embedding. Without it all entries of a sample are one row of features, and integers are
            tokens.
        key: which entry of a tuple or mapping is the input.
        progress: show a bar where it takes longer than a second.

    Returns:
        Statistics of a floating-point input, or the frequencies of tokens.

    Raises:
        InputError: a loader that yields nothing, batches of different shapes, too few samples, columns beyond memory.
        NonFiniteError: NaN or infinity in a batch.
        RankError: another process failed.

    Example::

        stats = gs.measure_inputs(loader, first=model.conv1)
        plan = gs.plan(model, (x,), inputs=stats)
    """
    if not progress:
        return gather_inputs(loader, first=first, key=key)
    with progress_bar("measuring inputs") as advance:
        return gather_inputs(loader, first=first, key=key, progress=advance)


def initialize(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, seed: int = 0, **options: Any
) -> Plan:
    """Plan and apply.

    Args:
        model: any module with memory behind its parameters.
        args: positional example inputs.
        kwargs: keyword inputs.
        seed: any integer; equal seeds give equal values.
        options: as for :func:`plan`.

    Returns:
        The plan that was applied.

    Raises:
        GainstageError: as :func:`plan` and :func:`apply`; the model is then unchanged.

    Example::

        gs.initialize(model, (x,), seed=1)
    """
    made = plan(model, args, kwargs, **options)
    apply(model, made, seed=seed)
    return made


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
        InputError: a model on the meta device without a plan, FSDP1, or a forward pass that fails.
        RankError: another process failed, has another plan, model or values, inputs of other shapes, or does not answer.

    Example::

        check = gs.verify(model, (x,), plan=plan)
        assert check.ok, check
    """
    _check_call(model, args)
    given = dict(kwargs or {})
    is_drawn = plan is not None and all(parameter.is_meta for parameter in model.parameters())
    check_ranks(plan, model, lambda: check_inputs(args, given) if is_drawn else check_values(model, args, given))
    found = assembled(model, () if plan is None else plan.parameters)
    batch = gathered(args, given)
    if plan is not None and is_drawn:
        return _verify_drawn(found.code, args, given, plan, batch, seed=seed, progress=progress)
    graph = capture(found.code, batch.args, batch.kwargs, buffers=found.buffers)

    def present() -> Trace:
        with _host():
            return build_trace(graph, present_values(graph, found.parameters, infer_roles(graph)))

    return compare_with(graph, found, args, given, batch=batch, plan=plan, present=present)


def task_gradients(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    losses: Mapping[str, Callable[[Any], torch.Tensor]],
    weights: Mapping[str, float] | None = None,
) -> TaskGradients:
    """How strongly each of several losses pulls at the parameters they share: predicted, and measured; change nothing.

    A head's initialization follows from its fan-in and from what the trunk gives it, whatever its loss will be multiplied with.
    What the weights of the losses decide is whose gradient the trunk follows.

    Args:
        model: with values, in its mode.
        args: positional arguments of forward.
        kwargs: keyword arguments of forward.
        losses: task -> a function of the model's output that returns the task's loss, without its weight.
        weights: task -> what its loss is multiplied with; 1 for those that are not there.

    Returns:
        A row for each task: the norm of its gradient over all shared parameters, predicted and measured, its share, and the
        weight that would make the shares equal; a finding where one task has more than nine tenths.

    Raises:
        InputError: fewer than two tasks, nothing that they share, a loss that is no number, weights of other tasks.
        NonFiniteError: NaN or infinity in a parameter, an input, a loss or a gradient.

    Example::

        losses = {"depth": lambda y: F.l1_loss(y[0], depth), "label": lambda y: F.cross_entropy(y[1], label)}
        print(gs.task_gradients(model, (x,), losses=losses, weights={"depth": 0.1}))
    """
    given = dict(kwargs or {})
    chosen = check_weights(losses, weights)
    check_values(model, args, given)
    values, measured = measure_tasks(model, args, given, losses)
    predicted: dict[str, dict[str, float]] = {}
    for task, loss in losses.items():
        trace = inspect(model, args, given, loss=loss)
        found = {name: statistics.gradient_second_moment for name, statistics in trace.parameters.items()}
        predicted[task] = {name: moment for name, moment in found.items() if moment is not None}
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return judge_tasks(chosen, trained, values, measured, predicted)


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
        with _host():
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
    _check_call(model, args)
    given = dict(kwargs or {})
    check_values(model, args, given)
    graph = capture(model, args, given)
    plan.check_fits(graph.parameters)
    check_mode(plan, graph)
    check_operations(plan, graph)
    tables = dict(model.named_parameters())
    with _host():
        planned = planned_values(graph, plan, moments=moments_of(model), tables=tables, source=measured_input)
        found = infer_roles(graph)
    return calibrate_to(graph, found, plan, planned, model)


def _host() -> torch.device:
    """A context for numbers that are not the model's: they lie on the host, whatever device the caller made the default."""
    return torch.device("cpu")


def _check_call(model: object, args: object) -> None:
    """Tell a model and its positional arguments from what is neither.

    Raises:
        InputError: for anything else.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"The model is {type(model).__name__}; give a torch.nn.Module.")
    if not isinstance(args, (tuple, list)):
        raise InputError(f"The positional arguments of forward come as a tuple, not as {type(args).__name__}: args=(x,).")


def measured_input(node: Node) -> Value:
    """Statistics of an input as it was given."""
    assert node.meta is not None
    assert not isinstance(node.meta, tuple)
    return input_value(node.name, node.value, node.meta.shape)


def moments_of(model: nn.Module) -> Callable[[str], tuple[float, float] | None]:
    """Mean and variance of a parameter's present values, measured when asked for; None on the meta device."""
    tensors = real_parameters(model)

    def moments(name: str) -> tuple[float, float] | None:
        return None if tensors[name].is_meta else parameter_moments({name: tensors[name]})[name]

    return moments


def kept_parameters(graph: Graph, patterns: Sequence[str], *, include_frozen: bool) -> dict[str, str]:
    """Parameters that are not to be planned, with the reason.

    Raises:
        UnknownNameError: a pattern that no parameter matches.
    """
    kept: dict[str, str] = {}
    for pattern in patterns:
        matching = [
            name for name, info in graph.parameters.items() if any(fnmatchcase(known, pattern) for known in (name, *info.aliases))
        ]
        if not matching:
            raise UnknownNameError(f"keep={pattern!r} matches no parameter{nearest(pattern, graph.parameters)}")
        kept |= dict.fromkeys(matching, f"kept on request ({pattern})")
    if not include_frozen:
        frozen = [name for name, info in graph.parameters.items() if not info.requires_grad]
        kept = dict.fromkeys(frozen, "kept: frozen (it takes no gradient)") | kept
    return kept
