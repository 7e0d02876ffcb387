"""The stage itself: a graph, the roles of its parameters and a policy in, a plan out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gainstage.errors import InputError, NoSignalError
from gainstage.graph import Graph, Node, fingerprint
from gainstage.inputs import InputStatistics
from gainstage.plan import ActivationPlan, Block, Distribution, Family, ParameterPlan, Plan
from gainstage.policies import Level, Policy, UnitGates
from gainstage.propagate import Signal, given_up, no_level
from gainstage.roles import Role, Roles, Use, branches_beside
from gainstage.signal import Value
from gainstage.solve.constraint import Kind, is_contraction
from gainstage.solve.demands import collect_demands
from gainstage.solve.derivation import Explainer
from gainstage.solve.determinant import determinant_off, identity_start
from gainstage.solve.distributions import blocks_around, blocks_of, distribution_of, fitting_family, padding_row
from gainstage.solve.initial import Present, initial_settings
from gainstage.solve.passage import Balance, Passages
from gainstage.solve.priors import prior_blocks, with_priors
from gainstage.solve.recurrent import is_recurrent, unit_gates, weights_of
from gainstage.solve.rest import resting_biases
from gainstage.solve.setting import Setting
from gainstage.solve.tailoring import propose_activations
from gainstage.solve.walk import Prepare, Walk
from gainstage.solve.whitened import find_first_layers

_NAMED = 8  # parameters that a note names


def solve(
    graph: Graph, roles: Roles, policy: Policy, *, present: Present, source: Callable[[Node], Value], family: Family,
    balance: Balance = Balance.FORWARD, inputs: Mapping[str, InputStatistics] | None = None,
    priors: Mapping[str, Any] | None = None, logdet_std: float | None = None,
) -> Plan:  # fmt: skip
    """Find a distribution for every parameter, so that the policy's targets hold in the predicted signals.

    Args:
        graph: the captured model.
        roles: what its parameters are for.
        policy: targets by role.
        present: statistics of the parameters as they are, and which are kept.
        source: statistics of the inputs.
        family: what weights are drawn from.
        balance: which direction hidden weights keep second moments in.
        inputs: input node -> statistics of its data set; layers that read it directly are whitened.
        priors: pattern of names of heads' biases -> probabilities of their classes, or labels to count.
        logdet_std: deviation of a flow's log-determinant over draws and inputs, which the roles have found; 0 for the identity.

    Raises:
        InputError: a balance for a policy without levels to balance.
        NoSignalError: the model has parameters, and uses none.
        UnsupportedOpError: operations that cannot be predicted.
    """
    if graph.parameters and not any(roles.uses.values()):
        raise NoSignalError(
            f"No output of the model depends on any of its {len(graph.parameters)} parameters "
            f"({_listed(list(graph.parameters))}): their modules are never called, and there is nothing to plan."
        )
    settings = with_priors(initial_settings(graph, roles, policy, present), roles, priors or {})
    first = find_first_layers(graph, roles, policy, inputs or {}, settings)
    for layer in first.layers.values():
        setting = settings[layer.parameter]
        settings[layer.parameter] = replace(setting, mixing=layer.mixing, lines=(*setting.lines, *layer.lines()))
    if logdet_std is not None:
        settings |= resting_biases(graph, roles, settings, present.tables, source)
    if logdet_std == 0.0:
        settings |= identity_start(roles, settings)
    demands = collect_demands(graph, roles, policy, settings, logdet_std)
    if balance is not Balance.FORWARD and not isinstance(policy.targets[Role.HIDDEN], Level):
        raise InputError(f"policy {policy.name!r} sets no levels that could be balanced: leave balance={balance.value!r} out")
    passages = Passages(graph, balance)
    prepare = _preparations(graph, policy)
    solution = Walk(graph, settings, demands, source, prepare=prepare, passages=passages, first=first.layers).run()
    explainer = Explainer(graph, roles, demands, solution, passages)
    beside = branches_beside(graph, roles)
    parameters = {
        name: _parameter_plan(setting, explainer, family, beside.get(name, 1)) for name, setting in solution.settings.items()
    }
    for layer in first.layers.values():
        if layer.bias is not None:
            parameters[layer.bias] = layer.bias_of(parameters[layer.parameter], parameters[layer.bias])
    predictions, spreads = _predictions(graph, solution.values)
    activations, remarks = _activations(policy, explainer)
    return Plan(
        policy=policy.name,
        parameters=parameters,
        fingerprint=fingerprint(graph),
        training=graph.training,
        balance=balance.value,
        predictions=predictions,
        spreads=spreads,
        notes=(
            *_notes(policy, explainer),
            *given_up(graph, solution.values),
            *first.notes,
            *remarks,
            *_lost(explainer),
        ),
        activations=activations,
    )


def _activations(policy: Policy, explainer: Explainer) -> tuple[tuple[ActivationPlan, ...], tuple[str, ...]]:
    """Changes to activations, where the policy has targets for them."""
    if policy.tailoring is None:
        return (), ()
    values = explainer.solution.values
    between = [name for own in explainer.demands.own for name in explainer.passages.between(own, values)]
    return propose_activations(explainer.graph, values, between, policy.tailoring)


def _preparations(graph: Graph, policy: Policy) -> dict[str, Prepare]:
    """What is decided before a node is evaluated: the weights of recurrent modules."""
    if not isinstance(policy.targets[Role.RECURRENT], UnitGates):
        return {}
    parameter_of = {node.name: node.parameter for node in graph.nodes if node.parameter is not None}
    calls: dict[object, list[Node]] = {}
    for node in graph.nodes:
        if is_recurrent(node):
            calls.setdefault(weights_of(node), []).append(node)
    return {nodes[0].name: partial(unit_gates, nodes[0], len(nodes), parameter_of) for nodes in calls.values()}


def _parameter_plan(setting: Setting, explainer: Explainer, family: Family, branches: int) -> ParameterPlan:
    graph, roles, info = explainer.graph, explainer.roles, setting.info
    use = next(iter(roles.uses.get(info.name, ())), None)
    contraction = next((u for u in roles.uses.get(info.name, ()) if is_contraction(graph.by_name[u.node])), use)
    lines = explainer.lines(info.name)
    if setting.given is not None:
        distribution: Distribution = setting.given
        blocks: tuple[Block, ...] = ()
    elif setting.prior:
        distribution, blocks = prior_blocks(setting.prior)
    else:
        drawn, why = fitting_family(family, setting, contraction, graph)
        if drawn is Family.DELTA_ORTHOGONAL:
            setting = explainer.centred(setting)
        parts = [distribution_of(setting, part, drawn) for part in range(len(setting.variances))]
        distribution, blocks = blocks_of(setting, parts, roles.uses.get(info.name, ()))
        if why and setting.variance > 0.0:
            lines = (*lines, why)
        row = padding_row(contraction, graph)
        if row is not None and not blocks and setting.variance > 0.0:
            blocks = blocks_around(row, info.shape[0], distribution)
            lines = (*lines, f"row {row} stands for padding: zero")
    return ParameterPlan(
        name=info.name,
        aliases=info.aliases,
        shape=info.shape,
        dtype=str(info.dtype).removeprefix("torch."),
        role=roles.of(info.name).value if info.name in roles.uses else Role.UNUSED.value,
        distribution=distribution,
        blocks=blocks,
        output_dims=_output_dims(contraction, setting),
        derivation=lines,
        passage=explainer.passage(info.name),
        branches=branches,
    )


def _output_dims(use: Use | None, setting: Setting) -> tuple[int, ...]:
    rank = len(setting.info.shape)
    dims = (0,) if use is None else use.output_dims
    return tuple(dim for dim in dims if dim < rank)


def _predictions(graph: Graph, values: Mapping[str, Any]) -> tuple[dict[str, tuple[float, ...]], dict[str, tuple[float, ...]]]:
    predictions: dict[str, tuple[float, ...]] = {}
    spreads: dict[str, tuple[float, ...]] = {}
    for call in graph.calls:
        signals = [Signal(value) for name in call.outputs if isinstance(value := values.get(name), Value)]
        if len(signals) == len(call.outputs) and signals:
            key = f"{call.path}@{call.call}"
            predictions[key] = tuple(max(signal.second_moment, 0.0) for signal in signals)
            spreads[key] = tuple(signal.spread for signal in signals)
    return predictions, spreads


def _lost(explainer: Explainer) -> tuple[str, ...]:
    """A note where levels are those of no draw."""
    modules: dict[str, list[Signal]] = {}
    for call in explainer.graph.calls:
        found = [Signal(value) for name in call.outputs if isinstance(value := explainer.solution.values.get(name), Value)]
        modules.setdefault(call.path, []).extend(found)
    finding = no_level(modules)
    return () if finding is None else (str(finding),)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _notes(policy: Policy, explainer: Explainer) -> tuple[str, ...]:
    solution = explainer.solution
    kept = [
        name for name, setting in solution.settings.items() if setting.given is not None and setting.given.family is Family.KEEP
    ]
    notes = [f"targets of policy {policy.name!r}: {policy.source}", *explainer.graph.assumptions, *explainer.roles.notes]
    unused = [name for name in kept if explainer.roles.of(name) is Role.UNUSED]
    used = [name for name in kept if name not in unused]
    if used:
        notes.append(f"kept as they are: {_listed(used)}")
    if unused:
        notes.append(
            f"kept as they are, since no output depends on them: {_listed(unused)}. With these inputs they are never trained; "
            "where their module is called otherwise, plan with such inputs"
        )
    for demand in explainer.demands.levels:
        progress = solution.demands[demand]
        if not progress.is_met:
            names = dict.fromkeys(lever.part[0] for group in demand.groups for lever in group)
            notes.append(
                f"{demand.quantity.value} at {demand.node} does not follow {', '.join(names)}: see the explanation of these"
            )
        if demand.kind is Kind.DETERMINANT and (mean := determinant_off(demand, solution.values)):
            notes.append(
                f"log det starts at {mean:.3g} on average, further from 0 than the deviation asked for: the library's functions "
                "of a scale have no bias, or are bounded and come no nearer to 1 while they can still move"
            )
    return tuple(notes)
