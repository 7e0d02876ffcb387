"""The plan: what every parameter is to be drawn from, and why. Immutable; JSON both ways."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Protocol

import torch

from gainstage.errors import InputError, PlanMismatchError, UnknownNameError, nearest
from gainstage.plan.activation import ActivationPlan
from gainstage.plan.distribution import ParameterPlan
from gainstage.plan.schema import SCHEMA_VERSION, checked, read_fields, write_fields
from gainstage.plan.script import script_of


class ParameterFacts(Protocol):
    """What a plan is compared with: the table entry of a captured graph, or a parameter as it is found in a model."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the whole parameter."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names of the same tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that apply needs and verify checks, for one model.

    Equal plans compare equal, and ``Plan.from_json(plan.to_json()) == plan`` holds to the last bit.

    Args:
        policy: name of the targets that the plan was solved for.
        parameters: canonical name -> what is written, in the model's own order.
        fingerprint: of the graph that the plan was solved on.
        training: the mode of the model that the plan was solved for.
        balance: which direction hidden weights keep second moments in: forward, backward, or geometric for the mean of both.
        predictions: "path@call" -> second moments of the outputs of that module call, averaged over draws and inputs.
        spreads: "path@call" -> predicted deviations of the logs of these second moments from one draw to another.
        notes: what a reader has to know, one sentence each.
        activations: changes to activation modules that the policy proposes; only :func:`gainstage.tailor` makes them.

    Raises:
        InputError: parameters under other names than their own, predictions that are negative or not finite.
    """

    policy: str
    parameters: Mapping[str, ParameterPlan]
    fingerprint: str
    training: bool
    balance: str = "forward"
    predictions: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    spreads: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    activations: tuple[ActivationPlan, ...] = ()
    version: int = field(default=SCHEMA_VERSION, init=False)

    def __post_init__(self) -> None:
        """Freeze the mappings and check that they agree with each other."""
        taken: set[str] = set()
        for key, parameter in self.parameters.items():
            if key != parameter.name:
                raise InputError(f"the plan of {parameter.name!r} stands under the name {key!r}")
            for name in (key, *parameter.aliases):
                if name in taken:
                    raise InputError(f"{name!r} names two parameters of the plan")
                taken.add(name)
        for call, values in (*self.predictions.items(), *self.spreads.items()):
            if any(not math.isfinite(value) or value < 0 for value in values):
                raise InputError(f"the predictions of {call} are {list(values)}; they must be finite and not negative")
        for call, values in self.spreads.items():
            if len(self.predictions.get(call, ())) != len(values):
                raise InputError(f"{call} has {len(values)} spreads for {len(self.predictions.get(call, ()))} predictions")
        for name in ("parameters", "predictions", "spreads"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __repr__(self) -> str:
        """One line."""
        return f"Plan(policy={self.policy!r}, {len(self.parameters)} parameters, training={self.training})"

    def __reduce__(self) -> tuple[Callable[[str], Plan], tuple[str]]:
        """Pickle as JSON, so that a plan can be sent to other processes."""
        return Plan.from_json, (self.to_json(),)

    def explain(self, name: str) -> str:
        """The distribution of one parameter and how it was derived, as text; or the change that is proposed for an activation.

        Args:
            name: any name of the parameter (a tied parameter has several), or the path of an activation module.

        Raises:
            UnknownNameError: for a name that the plan does not have.
        """
        for parameter in self.parameters.values():
            if name == parameter.name or name in parameter.aliases:
                return str(parameter)
        for activation in self.activations:
            if name == activation.module:
                return str(activation)
        known = [known for parameter in self.parameters.values() for known in (parameter.name, *parameter.aliases)]
        raise UnknownNameError(f"The plan has no parameter {name!r}{nearest(name, known)}.")

    def check_fits(self, parameters: Mapping[str, ParameterFacts]) -> None:
        """Compare names, ties, shapes and element types with those of a model.

        Args:
            parameters: canonical name -> shape, dtype and aliases, as in ``Graph.parameters``.

        Raises:
            PlanMismatchError: at the first difference, in the plan's order.
        """
        for name, planned in self.parameters.items():
            found = parameters.get(name)
            if found is None:
                raise PlanMismatchError(f"The plan has {name!r}, the model has not{nearest(name, parameters)}. {_REPLAN}")
            if tuple(found.shape) != planned.shape:
                raise PlanMismatchError(f"{name} is planned as {list(planned.shape)}, but is {list(found.shape)}. {_REPLAN}")
            if (dtype := str(found.dtype).removeprefix("torch.")) != planned.dtype:
                raise PlanMismatchError(f"{name} is planned as {planned.dtype}, but is {dtype}. {_REPLAN}")
            if set(found.aliases) != set(planned.aliases):
                raise PlanMismatchError(
                    f"{name} is planned {_tied(planned.aliases)}, but is {_tied(found.aliases)}. "
                    "Tie the weights again (to_empty unties them), or make a plan of this model."
                )
        for name in parameters:
            if name not in self.parameters:
                raise PlanMismatchError(f"The model has {name!r}, the plan has not{nearest(name, self.parameters)}. {_REPLAN}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the JSON form."""
        return write_fields({each.name: getattr(self, each.name) for each in fields(self) if each.init})

    def to_json(self) -> str:
        """The whole plan as JSON text, which :meth:`from_json` reads back exactly."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)

    def to_python(self) -> str:
        """A script that needs torch alone, and NumPy for the exact values; see its first lines for what it offers.

        It draws the planned distributions into a model, or the very values of ``apply``; it gives Transformers its
        ``_init_weights`` and torchtitan its ``param_init``.
        """
        return script_of(self.policy, self.parameters, self.notes)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that :meth:`to_json` wrote. Every field is checked; nothing is guessed and nothing is run.

        Raises:
            PlanFormatError: for anything else; the message says where in the text.
        """
        read = read_fields(text)
        return checked(lambda: cls(**read), "")


_REPLAN = "Make a plan of this model."


def _tied(aliases: Sequence[str]) -> str:
    return f"tied to {', '.join(aliases)}" if aliases else "not tied"
