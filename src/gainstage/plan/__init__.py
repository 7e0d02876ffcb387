"""The plan: what every parameter is to be drawn from, and why. Immutable; explains itself; JSON both ways."""

from gainstage.plan.activation import ActivationPlan, TailoredActivation
from gainstage.plan.distribution import Block, Distribution, Family, ParameterPlan, Passage, joined
from gainstage.plan.mixing import Mixing
from gainstage.plan.plan import ParameterFacts, Plan
from gainstage.plan.schema import SCHEMA_VERSION

__all__ = [
    "SCHEMA_VERSION",
    "ActivationPlan",
    "Block",
    "Distribution",
    "Family",
    "Mixing",
    "ParameterFacts",
    "ParameterPlan",
    "Passage",
    "Plan",
    "TailoredActivation",
    "joined",
]
