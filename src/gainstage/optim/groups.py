"""Parameter groups in which the first step moves every parameter by the same fraction of its size."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from gainstage.apply.holding import holdings_of
from gainstage.apply.parts import Holding
from gainstage.errors import InputError, NonFiniteError, UnknownNameError, nearest
from gainstage.optim.first import ROUNDING, FirstUpdate, Start
from gainstage.optim.laws import find_law
from gainstage.optim.scales import compared_with, is_hidden_matrix, is_matrix, output_share, starting_rms
from gainstage.plan import ParameterPlan, Plan
from gainstage.propagate.trace import Trace

# Rates that differ by less than this ratio share a group, at the middle: no parameter is further off than half a percent.
_SAME_RATE = 1.01
NORMS = ("entries", "spectral")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """One parameter with what its group has to say; ``rate`` is None where a zero gradient leaves it open."""

    name: str
    parameter: torch.Tensor
    law: FirstUpdate
    rate: float | None
    weight_decay: float
    settings: Mapping[str, Any]


def param_groups(
    model: nn.Module,
    plan: Plan,
    *,
    relative_update: float = 1e-3,
    norm: str = "entries",
    optimizer: str | FirstUpdate = "adamw",
    weight_decay: float = 0.0,
    also_decay: Sequence[str] = (),
    trace: Trace | None = None,
    gradients: Mapping[str, torch.Tensor] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """``lr = relative_update * size / rms(first update at lr 1)`` for every parameter, equal rates in one group.

    The size is the planned root mean square; for a parameter that starts from zeros it is the one that it is meant to reach.
    docs/learning-rates.md has the laws and their derivations.

    Args:
        model: what the plan was made for, also on the meta device. Frozen parameters are left out.
        plan: the sizes.
        relative_update: rms of a parameter's first update over its size, between 0 and 1.
        norm: what is compared: "entries", root mean squares; or "spectral", of matrices the spectral norms of update and weights,
            which is how far outputs move, and all branches of a residual stream together. One relative update then serves
            networks of different widths and depths.
        optimizer: sgd, adam, adamw, adamax, nadam, radam, rmsprop, adagrad, lion, adafactor, muon, or a law of your own. Muon
            takes hidden matrices; the other groups are for AdamW. Each group says so under "optimizer".
        weight_decay: of matrices. Biases, norms, embeddings (tied heads, too), slopes and tokens have none.
        also_decay: glob patterns of further parameters that decay.
        trace: ``gs.inspect(model, args, loss=loss)`` of the initialised model: predicts the size of the gradients.
        gradients: name -> first gradient, measured; goes before the trace. SGD and RAdam need one of the two, for Muon only this
            one gives the update's exact size; the others need neither unless gradients are as small as their eps.
        settings: options of the optimizer on which its first update depends, such as ``nesterov=True``; they are in the groups.

    Returns:
        Groups for the optimizer, by falling rate: "params" as (name, parameter), "lr", "weight_decay", "optimizer", settings.

    Raises:
        UnknownNameError: an optimizer without a law, an option that no law reads, a pattern or a gradient of no parameter.
        InputError: numbers out of range, gradients that are missing, a relative update that the optimizer cannot make.
        NonFiniteError: NaN or infinity in a gradient.
        PlanMismatchError: the plan was made for another model.

    Example::

        optimizer = torch.optim.AdamW(gs.param_groups(model, plan, weight_decay=0.1))
    """
    if not 0.0 < relative_update < 1.0:
        raise InputError(f"relative_update is {relative_update}; give a fraction between 0 and 1, such as 1e-3")
    if not 0.0 <= weight_decay < math.inf:
        raise InputError(f"weight_decay is {weight_decay}; it must be finite and not negative")
    if norm not in NORMS:
        raise UnknownNameError(f"there is no norm {norm!r}{nearest(norm, NORMS)}; known are {', '.join(NORMS)}")
    law = find_law(optimizer)
    _check_settings(law, settings)
    found = holdings_of(model, plan.parameters)
    plan.check_fits(found)
    _check_separate(found)
    decayed = _decayed(plan, [also_decay] if isinstance(also_decay, str) else also_decay)
    sizes = _gradient_sizes(plan, trace, gradients or {})
    members = []
    for name, planned in plan.parameters.items():
        if found[name].parameter.requires_grad:
            chosen = law if law.rest is None or is_hidden_matrix(planned) else find_law(law.rest)
            decay = weight_decay if name in decayed else 0.0
            own = settings if chosen is law else {}
            start = _start(planned, found[name], sizes.get(name), (gradients or {}).get(name), {**chosen.settings, **own})
            share = output_share(planned, is_orthogonal=chosen.rest is not None) if norm == "spectral" else 1.0
            step = relative_update * share * compared_with(planned, plan, start.rms)
            members.append(_member(chosen, start, name=name, parameter=found[name].parameter, decay=decay, step=step))
    return _grouped(members)


def _check_settings(law: FirstUpdate, settings: Mapping[str, Any]) -> None:
    for key in settings:
        if key not in law.settings:
            known = f"; it depends on {', '.join(law.settings)}" if law.settings else ""
            raise UnknownNameError(
                f"the first update of {law.name} does not depend on {key!r}{nearest(key, law.settings)}{known}. "
                "Rates follow from relative_update; give other options to the optimizer itself."
            )


def _check_separate(found: Mapping[str, Holding]) -> None:
    """A parameter flattened together with others has one rate only."""
    first: dict[int, str] = {}
    for name, holding in found.items():
        other = first.setdefault(id(holding.parameter), name)
        if other != name:
            raise InputError(
                f"{other} and {name} are parts of one flattened parameter; wrap with use_orig_params=True or fully_shard"
            )


def _decayed(plan: Plan, patterns: Sequence[str]) -> set[str]:
    decayed = {name for name, planned in plan.parameters.items() if is_matrix(planned)}
    for pattern in patterns:
        matching = {
            name
            for name, planned in plan.parameters.items()
            if any(fnmatchcase(known, pattern) for known in (name, *planned.aliases))
        }
        if not matching:
            raise UnknownNameError(f"also_decay={pattern!r} matches no parameter{nearest(pattern, plan.parameters)}")
        decayed |= matching
    return decayed


def _gradient_sizes(plan: Plan, trace: Trace | None, gradients: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Root mean square of each parameter's first gradient over all of its entries, where it is known; zeros are left in."""
    for name, gradient in gradients.items():
        if name not in plan.parameters:
            raise UnknownNameError(f"gradients[{name!r}] is of no parameter of the plan{nearest(name, plan.parameters)}")
        if tuple(gradient.shape) != plan.parameters[name].shape:
            raise InputError(f"gradients[{name!r}] has shape {list(gradient.shape)}, not {list(plan.parameters[name].shape)}")
    sizes: dict[str, float] = {}
    for name in plan.parameters:
        if name in gradients:
            sizes[name] = _rms(gradients[name].detach().double())
        elif trace is not None and name in trace.parameters:
            moment = trace.parameters[name].gradient_second_moment
            sizes |= {} if moment is None else {name: math.sqrt(max(moment, 0.0))}
        if not math.isfinite(sizes.get(name, 0.0)):
            raise NonFiniteError(f"NaN or infinity in the first gradient of {name}")
    floor = ROUNDING * max(sizes.values(), default=0.0)
    return {name: size if size > floor else 0.0 for name, size in sizes.items()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All entries, gathered from the processes that share them."""
    sharded: Any = sys.modules.get("torch.distributed.tensor")  # a tensor can only be of a type that was imported
    if sharded is not None and isinstance(tensor, sharded.DTensor):
        return cast("torch.Tensor", tensor.full_tensor())
    return tensor


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _start(
    planned: ParameterPlan, holding: Holding, size: float | None, gradient: torch.Tensor | None, settings: Mapping[str, Any]
) -> Start:
    return Start(
        shape=planned.shape,
        dtype=holding.dtype,
        rms=starting_rms(planned, holding),
        gradient_rms=size,
        gradient=_whole(gradient.detach()).double() if gradient is not None and size else None,
        settings=settings,
    )


def _member(law: FirstUpdate, start: Start, *, name: str, parameter: torch.Tensor, decay: float, step: float) -> _Member:
    """The rate at which the first update has the rms ``step``; a predicted gradient has no correlation with it."""
    size = start.gradient_rms
    if law.needs_gradient and size is None:
        raise InputError(
            f"the first update of {law.name} is as large as the first gradient, and that of {name} is not known: "
            "give trace=gainstage.inspect(model, args, loss=loss), or gradients={name: gradient} after one backward pass"
        )
    gradient = start.gradient
    if decay and size is not None and not law.is_decay_decoupled:
        size = math.hypot(size, decay * start.rms)
        if gradient is not None:
            gradient = gradient + decay * _whole(parameter.detach())
            size = _rms(gradient)
    start = replace(start, gradient_rms=size or None, gradient=gradient)
    start = replace(start, settings=law.settings_for(start))
    rate = None
    if size or not law.needs_gradient:
        magnitude = law.magnitude(start)
        if not 0.0 < magnitude < math.inf:
            raise InputError(f"the law of {law.name} gives {name} a first update of {magnitude} at learning rate 1")
        rate = step / math.hypot(magnitude, decay * start.rms if law.is_decay_decoupled else 0.0)
        if rate > law.largest_rate:
            raise InputError(
                f"{law.name} cannot move {name} by {step:.3g} in its first step: that takes a learning rate of {rate:.3g}, and "
                f"its steps grow no more beyond {law.largest_rate:g}; ask for a smaller relative_update"
            )
    return _Member(name=name, parameter=parameter, law=law, rate=rate, weight_decay=decay, settings=start.settings)


def _grouped(members: Sequence[_Member]) -> list[dict[str, Any]]:
    """One group for each law, decay, settings and rate; where the first gradient is zero, the smallest rate of that law."""
    alike: dict[tuple[str, float, str], list[_Member]] = {}
    lowest: dict[str, float] = {}
    for member in members:
        if member.rate is not None:
            lowest[member.law.name] = min(member.rate, lowest.get(member.law.name, math.inf))
    for member in members:
        if member.law.name not in lowest:
            raise InputError(
                "every first gradient is zero, so that no rate moves any parameter; is the loss connected to the model?"
            )
        alike.setdefault((member.law.name, member.weight_decay, repr(sorted(member.settings.items()))), []).append(member)
    groups = []
    for similar in alike.values():
        rates = {member.name: member.rate or lowest[member.law.name] for member in similar}
        while rates:
            top = max(rates.values())
            near = {name: rate for name, rate in rates.items() if top / rate <= _SAME_RATE}
            middle = math.sqrt(top * min(near.values()))
            groups.append(_group([member for member in similar if member.name in near], middle))
            rates = {name: rate for name, rate in rates.items() if name not in near}
    return sorted(groups, key=lambda group: -group["lr"])


def _group(members: Sequence[_Member], rate: float) -> dict[str, Any]:
    return {
        "params": [(member.name, member.parameter) for member in members],
        "lr": rate,
        "weight_decay": members[0].weight_decay,
        "optimizer": members[0].law.name,
        **members[0].settings,
    }
