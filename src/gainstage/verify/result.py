"""What a verification found: plain, frozen data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gainstage.findings import Finding


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
