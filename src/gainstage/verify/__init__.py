"""Measure a real pass, compare it with the prediction, and name what is wrong."""

from gainstage.findings import Finding, FindingKind
from gainstage.verify.batch import Batch, gathered
from gainstage.verify.result import Check, CheckRow
from gainstage.verify.tasks import TaskGradients, TaskRow, check_weights, judge_tasks, measure_tasks
from gainstage.verify.verify import (
    check_inputs,
    check_mode,
    check_operations,
    check_ranks,
    check_values,
    verify,
    verify_drawn,
)

__all__ = [
    "Batch",
    "Check",
    "CheckRow",
    "Finding",
    "FindingKind",
    "TaskGradients",
    "TaskRow",
    "check_inputs",
    "check_mode",
    "check_operations",
    "check_ranks",
    "check_values",
    "check_weights",
    "gathered",
    "judge_tasks",
    "measure_tasks",
    "verify",
    "verify_drawn",
]
