"""The policies that ship with the package, by name."""

from __future__ import annotations

from gainstage.errors import InputError, UnknownNameError, nearest
from gainstage.policies.classical import GLOROT, GPT2, HE, LECUN, TORCH
from gainstage.policies.default import UNIT
from gainstage.policies.isometric import ISOMETRIC
from gainstage.policies.model import Policy

POLICIES = {policy.name: policy for policy in (UNIT, ISOMETRIC, TORCH, HE, GLOROT, LECUN, GPT2)}


def find_policy(policy: str | Policy) -> Policy:
    """The policy itself, or the one of that name.

    Raises:
        UnknownNameError: no policy has this name.
        InputError: neither a name nor a policy.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise InputError(f"a policy is a name or a gainstage.Policy, not {type(policy).__name__}")
    if policy not in POLICIES:
        raise UnknownNameError(f"there is no policy {policy!r}{nearest(policy, POLICIES)}; known are {', '.join(POLICIES)}")
    return POLICIES[policy]
