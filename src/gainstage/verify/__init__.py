"""Measure a real pass, compare it with the prediction, and name what is wrong."""

from gainstage.verify.result import Check, CheckRow, Finding, FindingKind
from gainstage.verify.verify import check_inputs, check_mode, check_operations, check_values, verify, verify_drawn

__all__ = [
    "Check",
    "CheckRow",
    "Finding",
    "FindingKind",
    "check_inputs",
    "check_mode",
    "check_operations",
    "check_values",
    "verify",
    "verify_drawn",
]
