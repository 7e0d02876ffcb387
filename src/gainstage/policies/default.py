"""The default policy: every signal starts at a level that the next layer was made for."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gainstage.errors import InputError
from gainstage.policies.model import (
    EqualContribution,
    Identity,
    Keep,
    KeyVariance,
    Level,
    NearChance,
    Policy,
    StreamShare,
    UnitGates,
    Zero,
)
from gainstage.roles import Role

_SOURCE = (
    "second moments as He et al. 2015 (arXiv:1502.01852, eq. 9) ask for them, with the predicted input in the place of the "
    "assumed one; residual branches share one stream's worth of variance, as in Zhang et al. 2019 (arXiv:1901.09321) and "
    "Brock et al. 2021 (arXiv:2102.06171)"
)


def unit(*, logit_variance: float = 1.0, branch_shares: Mapping[str, float] | None = None) -> Policy:
    """The default policy, with other numbers where they are wished.

    Args:
        logit_variance: of attention logits over the keys. Less spreads the attention more evenly at step zero.
        branch_shares: pattern of parameter names or module paths -> how much the branches that they end contribute to what they
            merge into, relative to their siblings, which have 1. A pattern that ends no branch is refused when it is planned.

    Raises:
        InputError: a number that is not positive and finite.

    Example::

        plan = gs.plan(model, (x,), policy=gs.policies.unit(logit_variance=0.25))
    """
    if not 0.0 < logit_variance < math.inf:
        raise InputError(f"logit_variance is a positive number, not {logit_variance!r}")
    shares = dict(branch_shares or {})
    if not all(0.0 < share < math.inf for share in shares.values()):
        raise InputError(f"branch_shares are positive numbers, not {shares!r}")
    changed = [f"logit_variance={logit_variance:g}"] if logit_variance != 1.0 else []
    changed += [f"branch_shares={shares}"] if shares else []
    logits = KeyVariance(logit_variance)
    return Policy(
        name=f"unit({', '.join(changed)})" if changed else "unit",
        source=_SOURCE,
        shares=shares,
        targets={
            Role.TIED_HEAD: NearChance(),
            Role.OUTPUT_HEAD: NearChance(),
            Role.QUERY: logits,
            Role.KEY: logits,
            Role.VALUE: Level(),
            Role.ROUTER: Level(),
            Role.RESIDUAL_END: StreamShare(),
            Role.MERGE_END: EqualContribution(),
            Role.COUPLING_SCALE: Level(),
            Role.COUPLING_SHIFT: Level(),
            Role.GATE: Level(),
            Role.RECURRENT: UnitGates(),
            Role.DEPTHWISE: Level(),
            Role.HIDDEN: Level(),
            Role.EMBEDDING: Level(),
            Role.NORM_SCALE: Identity(),
            Role.NORM_SHIFT: Zero(),
            Role.LAYER_SCALE: StreamShare(),
            Role.BIAS: Zero(),
            Role.TEMPERATURE: logits,
            Role.LOG_SCALE: Keep(),
            Role.SLOPE: Keep(),
            Role.KEPT: Keep(),
            Role.UNUSED: Keep(),
        },
    )


UNIT = unit()
