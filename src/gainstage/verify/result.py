"""What a verification found: plain, frozen data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """One output of one module call: predicted and measured second moment.

    ``sampling_error``: of the log of the measured one, from the differences between the samples of this batch (0 for a single
    sample, which says nothing of it). ``spread``: predicted deviation of the log from one draw of weights
    and inputs to another. ``z``: log ratio in units of both and of the model error together.
    """

    path: str
    call: int
    output: int  # which of the tensors that the call returns
    module_type: str
    shape: tuple[int, ...]
    predicted: float
    measured: float
    sampling_error: float
    spread: float
    z: float
    ok: bool

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        if self.predicted == 0.0:
            return 1.0 if self.measured == 0.0 else float("inf")
        return self.measured / self.predicted

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "shape": list(self.shape), "ratio": self.ratio}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A model measured and compared with its prediction.

    Args:
        rows: one for each floating-point output of a module call, in the order in which the calls returned.
        findings: what is wrong, most certain first.
        bound: a row is ok where ``abs(z) <= bound``.
        model_error: deviation of the log that is granted to the prediction itself, beside spread and sampling error.
    """

    rows: tuple[CheckRow, ...]
    findings: tuple[Finding, ...]
    bound: float
    model_error: float

    @property
    def ok(self) -> bool:
        """Every row is within its bound, and no finding is a fault."""
        return all(row.ok for row in self.rows) and not any(finding.kind.is_fault for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "ok": self.ok,
            "bound": self.bound,
            "model_error": self.model_error,
            "rows": [row.to_dict() for row in self.rows],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def __repr__(self) -> str:
        """Verdict, and the findings one a line."""
        within = sum(row.ok for row in self.rows)
        head = f"Check({'ok' if self.ok else 'NOT ok'}: {within} of {len(self.rows)} module outputs as predicted)"
        return "\n".join([head, *(f"  {finding}" for finding in self.findings)])
