"""Choosing distributions, and drawing from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from gainstage.api.present import check_call, measured_input, moments_of, on_host
from gainstage.apply import apply
from gainstage.apply.buffers import known_buffers
from gainstage.capture import capture, copied
from gainstage.errors import InputError, UnknownNameError, nearest
from gainstage.graph import Graph, Node, NodeKind, TensorMeta, is_same, real_parameters
from gainstage.inputs import InputStatistics, Measured, TokenStatistics, by_name, with_tokens
from gainstage.inputs import measure_inputs as gather_inputs
from gainstage.plan import Plan
from gainstage.policies import Policy, find_policy
from gainstage.report.progress import progress_bar
from gainstage.roles import infer_roles
from gainstage.signal import Value
from gainstage.solve import Present, find_balance, find_determinant, find_family, solve


def plan(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, policy: str | Policy = "unit",
    balance: str = "forward", roles: Mapping[str, str] | None = None, distribution: str | None = None, keep: Sequence[str] = (),
    include_frozen: bool = False, inputs: Measured | Mapping[str, Measured] | None = None,
    priors: Mapping[str, Any] | None = None, logdet_std: float | None = None, logdet: int | None = None,
) -> Plan:  # fmt: skip
    """Choose a distribution for every parameter; change nothing.

    Args:
        model: any module, also on the meta device, in the mode that it will be trained in.
        args: positional example inputs; their statistics are measured. Those that look standard normal, and those on the meta
            device, are taken as that.
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
    check_call(model, args, kwargs)
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
        kept = kept_parameters(graph, _patterns(keep), include_frozen=include_frozen)
        present = Present(moments=moments_of(model), tables=tables, kept=kept)

        def source(node: Node) -> Value:
            return moments[node.name].value(known[node.name]) if node.name in moments else measured_input(node)

        with on_host():
            found = infer_roles(graph, roles, log_determinant=determinant)
            return solve(
                graph, found, chosen, present=present, source=source, family=family, balance=direction,
                inputs=moments, priors=priors, logdet_std=logdet_std,
            )  # fmt: skip

    graph = capture(model, args, kwargs, buffers=known_buffers(model))
    made = solved(graph)
    if graph.has_choices and not any(tensor.is_meta or is_lazy(tensor) for tensor in tables.values()):
        # What a run saw in values holds for the values that it ran on: look again at those that were planned.
        drawn, drawn_args, drawn_kwargs = copied(model, args, kwargs)
        apply(drawn, made, seed=0)
        again = capture(drawn, drawn_args, drawn_kwargs, like=graph)
        if not is_same(graph, again):
            made = solved(again)
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


def _patterns(keep: object) -> Sequence[str]:
    given = [keep] if isinstance(keep, str) else keep
    if not (isinstance(given, Sequence) and all(isinstance(pattern, str) for pattern in given)):
        raise InputError(f"keep is {keep!r}; give glob patterns of parameter names, such as keep=['head.*']")
    return given


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
