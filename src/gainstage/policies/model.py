"""What a policy is: data. A target for each role that a parameter can have, and where these targets come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from gainstage.errors import InputError
from gainstage.roles import Role


@dataclass(frozen=True, slots=True)
class Level:
    """``E[y^2] = second_moment`` for what the parameter puts out, given the predicted input."""

    second_moment: float = 1.0


@dataclass(frozen=True, slots=True)
class KeyVariance:
    """Attention logits have this variance over the keys, shared evenly by queries and keys."""

    variance: float = 1.0


@dataclass(frozen=True, slots=True)
class StreamShare:
    """Each of the N branches of a residual stream adds ``total / N`` of the stream's first second moment."""

    total: float = 1.0


@dataclass(frozen=True, slots=True)
class EqualContribution:
    """Siblings that merge contribute equally, to a second moment of ``second_moment`` after the merge."""

    second_moment: float = 1.0


@dataclass(frozen=True, slots=True)
class NearChance:
    """Logits so quiet that the expected cross-entropy exceeds that of guessing by this fraction."""

    excess: float = 0.01


@dataclass(frozen=True, slots=True)
class UnitGates:
    """Pre-activations of recurrent gates have second moment 1, one half from the input and one half from the hidden state."""


class Fan(Enum):
    """How many products a variance is divided by, counted where the parameter is contracted."""

    IN = "fan-in"  # summed for one output
    MEAN = "mean of fan-in and fan-out"  # fan-out: outputs that one input adds to


@dataclass(frozen=True, slots=True)
class FanScaled:
    """``Var(w) = gain / fan``, whatever the input."""

    gain: float
    fan: Fan = Fan.IN


@dataclass(frozen=True, slots=True)
class FixedStd:
    """``Var(w) = std^2``, divided by the number of branches of its residual stream where ``divided``."""

    std: float
    divided: bool = False


@dataclass(frozen=True, slots=True)
class Identity:
    """Multiplies by one."""


@dataclass(frozen=True, slots=True)
class Zero:
    """Adds nothing."""


@dataclass(frozen=True, slots=True)
class ModuleDefault:
    """What the module's own ``reset_parameters`` draws."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Present values stay."""


Target = (
    Level
    | KeyVariance
    | StreamShare
    | EqualContribution
    | NearChance
    | UnitGates
    | FanScaled
    | FixedStd
    | Identity
    | Zero
    | ModuleDefault
    | Keep
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tailoring:
    """What the network's map of cosines is to be, where activations may be changed for it.

    ``cosine``: where a network of ReLUs takes two inputs that have nothing in common (cosine 0); ``curvature``: ``C''(1)`` of a
    network of smooth activations, whose ``C'(1)`` is 1 then (both as Zhang et al. 2022, arXiv:2203.08120, recommend them).
    ``slope``: the largest ``C'(1)`` of the network as it is that is left alone (Martens et al. 2021, arXiv:2110.01765).
    """

    cosine: float = 0.9
    curvature: float = 0.3
    slope: float = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Targets by role. :func:`gainstage.plan` takes one, or the name of one that ships with the package.

    Args:
        name: as it stands in plans.
        targets: a target for every role.
        source: the paper and equation that the targets come from.
        distribution: family that weights are drawn from, unless the user asks for another.
        tailoring: targets for activations that may be changed; None: no change is proposed.
        shares: pattern of parameter names or module paths -> contribution of the branches that they end, relative to siblings.

    Raises:
        InputError: a role has no target.

    Example::

        quiet_heads = gs.Policy(name="quiet", targets={**UNIT.targets, Role.OUTPUT_HEAD: NearChance(0.001)}, source="ours")
    """

    name: str
    targets: Mapping[Role, Target]
    source: str
    distribution: str = "normal"
    tailoring: Tailoring | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Freeze the targets and check that every role has one."""
        missing = [role.value for role in Role if role not in self.targets]
        if missing:
            raise InputError(f"policy {self.name!r} has no target for the role(s) {', '.join(missing)}")
        object.__setattr__(self, "targets", MappingProxyType(dict(self.targets)))
        object.__setattr__(self, "shares", MappingProxyType(dict(self.shares)))
