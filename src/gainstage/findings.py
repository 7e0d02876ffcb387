"""What is the matter with a model: plain, frozen data, for predictions and measurements alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

# Of the log of a level, over draws: beyond it fewer than one draw in 700 make the average, and no draw is near it.
WIDEST_SPREAD = 3.0


class FindingKind(StrEnum):
    """What is the matter. Notes are worth knowing, but no fault: they do not turn a check to "not ok"."""

    NOT_FINITE = "not finite"  # NaN or infinity arises in the pass
    NOT_AS_PLANNED = "not drawn as planned"  # a parameter's mean or deviation is not the plan's
    TIE_LOST = "tie lost"  # two tensors where there was to be one
    IDENTICAL = "identical clones"  # different parameters with equal random values
    OTHER_INPUTS = "other inputs"  # they are not like those that the plan was made for
    LEVEL_OFF = "level off"  # a measured second moment is out of the predicted band
    EXPLODING = "exploding signal"
    DEAD = "dead signal"
    SATURATED = "saturated attention"
    LOUD_HEAD = "loud head"  # first loss far above chance
    UNUSED = "unused parameters"  # they reach no output
    TASK_DROWNS = "task drowns the others"  # at the parameters that several losses share
    INDISTINGUISHABLE = "inputs indistinguishable"  # depth erases what tells two inputs apart
    CHAOTIC = "chaotic"  # depth tears nearby inputs apart
    LARGE_SPREAD = "large spread"  # levels are within a band that is wide, and this draw is not near its middle

    @property
    def is_fault(self) -> bool:
        """Tell faults from notes."""
        return self not in (FindingKind.UNUSED, FindingKind.LARGE_SPREAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, at its root: what follows from it further down is not listed again.

    ``where``: the parameter to blame, or the module where no parameter is; "" for the model.
    """

    kind: FindingKind
    where: str
    evidence: str
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "kind": str(self.kind), "is_fault": self.kind.is_fault}

    def __str__(self) -> str:
        """Kind and place, evidence, remedy."""
        return f"{self.kind}: {self.where or 'the model'}: {self.evidence} {self.remedy}"
