"""Policies: named sets of targets, one for each role."""

from gainstage.policies.default import unit
from gainstage.policies.model import (
    EqualContribution,
    Fan,
    FanScaled,
    FixedStd,
    Identity,
    Keep,
    KeyVariance,
    Level,
    ModuleDefault,
    NearChance,
    Policy,
    StreamShare,
    Tailoring,
    Target,
    UnitGates,
    Zero,
)
from gainstage.policies.modules import module_default
from gainstage.policies.registry import POLICIES, find_policy

__all__ = [
    "POLICIES",
    "EqualContribution",
    "Fan",
    "FanScaled",
    "FixedStd",
    "Identity",
    "Keep",
    "KeyVariance",
    "Level",
    "ModuleDefault",
    "NearChance",
    "Policy",
    "StreamShare",
    "Tailoring",
    "Target",
    "UnitGates",
    "Zero",
    "find_policy",
    "module_default",
    "unit",
]
