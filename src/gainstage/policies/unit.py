"""The default policy: every signal starts at a level that the next layer was made for."""

from __future__ import annotations

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

UNIT = Policy(
    name="unit",
    source=(
        "second moments as He et al. 2015 (arXiv:1502.01852, eq. 9) ask for them, with the predicted input in the place of the "
        "assumed one; residual branches share one stream's worth of variance, as in Zhang et al. 2019 (arXiv:1901.09321) and "
        "Brock et al. 2021 (arXiv:2102.06171)"
    ),
    targets={
        Role.TIED_HEAD: NearChance(),
        Role.OUTPUT_HEAD: NearChance(),
        Role.QUERY: KeyVariance(),
        Role.KEY: KeyVariance(),
        Role.VALUE: Level(),
        Role.ROUTER: Level(),
        Role.RESIDUAL_END: StreamShare(),
        Role.MERGE_END: EqualContribution(),
        Role.GATE: Level(),
        Role.RECURRENT: UnitGates(),
        Role.DEPTHWISE: Level(),
        Role.HIDDEN: Level(),
        Role.EMBEDDING: Level(),
        Role.NORM_SCALE: Identity(),
        Role.NORM_SHIFT: Zero(),
        Role.LAYER_SCALE: StreamShare(),
        Role.BIAS: Zero(),
        Role.SLOPE: Keep(),
        Role.KEPT: Keep(),
        Role.UNUSED: Keep(),
    },
)
