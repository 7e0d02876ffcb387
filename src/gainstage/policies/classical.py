"""The recipes that papers and libraries are known by, on the same engine: fans are counted where a weight is contracted."""

from __future__ import annotations

from gainstage.policies.model import Fan, FanScaled, FixedStd, Identity, Keep, ModuleDefault, Policy, Target, Zero
from gainstage.roles import Role

_OTHERS: dict[Role, Target] = {
    Role.EMBEDDING: FixedStd(1.0),  # a look-up has fan-in 1, and nothing rectifies it
    Role.NORM_SCALE: Identity(),
    Role.NORM_SHIFT: Zero(),
    Role.LAYER_SCALE: Keep(),
    Role.BIAS: Zero(),
    Role.TEMPERATURE: Keep(),
    Role.LOG_SCALE: Keep(),
    Role.SLOPE: Keep(),
    Role.KEPT: Keep(),
    Role.UNUSED: Keep(),
}


def _same_for_all(target: Target) -> dict[Role, Target]:
    """One target for everything that is contracted."""
    return {role: target for role in Role if role not in _OTHERS} | _OTHERS


HE = Policy(
    name="he",
    targets=_same_for_all(FanScaled(2.0)),
    source="He et al. 2015, arXiv:1502.01852, eq. 10: Var(w) = 2 / fan-in",
)

GLOROT = Policy(
    name="glorot",
    targets=_same_for_all(FanScaled(1.0, Fan.MEAN)),
    source="Glorot & Bengio 2010 (AISTATS), eq. 12: Var(w) = 2 / (fan-in + fan-out)",
)

LECUN = Policy(
    name="lecun",
    targets=_same_for_all(FanScaled(1.0)),
    source="LeCun et al. 1998 (Efficient BackProp), eq. 16: Var(w) = 1 / fan-in",
)

GPT2 = Policy(
    name="gpt2",
    targets=_same_for_all(FixedStd(0.02)) | {Role.EMBEDDING: FixedStd(0.02), Role.RESIDUAL_END: FixedStd(0.02, divided=True)},
    source=(
        "Radford et al. 2018 (Improving language understanding by generative pre-training, section 4.1): N(0, 0.02); "
        "Radford et al. 2019 (Language models are unsupervised multitask learners, section 2.3): the last weight of each of "
        "the N residual branches times 1 / sqrt(N)"
    ),
)

TORCH = Policy(
    name="torch",
    targets={role: ModuleDefault() for role in Role} | {Role.UNUSED: Keep()},
    source="reset_parameters of the modules of torch.nn; other modules keep what they hold",
)
