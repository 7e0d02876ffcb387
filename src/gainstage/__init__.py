"""Gainstage sets the signal levels of any PyTorch model at initialization, and proves them on the real model.

The public names are loaded at first use, so that ``import gainstage`` and ``gainstage --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gainstage import policies
    from gainstage.api import apply, calibrate, gain, initialize, inspect, measure_inputs, plan, tailor, task_gradients, verify
    from gainstage.apply import materialize, param_init_fn
    from gainstage.calibrate import Calibration, CalibrationRow
    from gainstage.errors import (
        CaptureError,
        GainstageError,
        InputError,
        NonFiniteError,
        NoSignalError,
        PlanFormatError,
        PlanMismatchError,
        RankError,
        RoleConflictError,
        RuleError,
        UnknownNameError,
        UnsupportedOpError,
        UnsupportedParameterError,
    )
    from gainstage.inputs import InputStatistics, TokenStatistics
    from gainstage.integrations import Flow
    from gainstage.optim import FirstUpdate, param_groups
    from gainstage.plan import Distribution, Family, Mixing, Plan
    from gainstage.policies import Policy
    from gainstage.propagate.trace import ParameterStatistics, Signal, Trace
    from gainstage.verify import TaskGradients

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CalibrationRow",
    "CaptureError",
    "Distribution",
    "Family",
    "FirstUpdate",
    "Flow",
    "GainstageError",
    "InputError",
    "InputStatistics",
    "Mixing",
    "NoSignalError",
    "NonFiniteError",
    "ParameterStatistics",
    "Plan",
    "PlanFormatError",
    "PlanMismatchError",
    "Policy",
    "RankError",
    "RoleConflictError",
    "RuleError",
    "Signal",
    "TaskGradients",
    "TokenStatistics",
    "Trace",
    "UnknownNameError",
    "UnsupportedOpError",
    "UnsupportedParameterError",
    "apply",
    "calibrate",
    "gain",
    "initialize",
    "inspect",
    "materialize",
    "measure_inputs",
    "param_groups",
    "param_init_fn",
    "plan",
    "tailor",
    "task_gradients",
    "verify",
]

# Where each public name lives; what stands in neither tuple is an exception of gainstage.errors.
_HOMES = {
    "gainstage.api": (
        "apply",
        "calibrate",
        "gain",
        "initialize",
        "inspect",
        "measure_inputs",
        "plan",
        "tailor",
        "task_gradients",
        "verify",
    ),
    "gainstage.apply": ("materialize", "param_init_fn"),
    "gainstage.calibrate": ("Calibration", "CalibrationRow"),
    "gainstage.integrations": ("Flow",),
    "gainstage.inputs": ("InputStatistics", "TokenStatistics"),
    "gainstage.optim": ("FirstUpdate", "param_groups"),
    "gainstage.plan": ("Distribution", "Family", "Mixing", "Plan"),
    "gainstage.policies": ("Policy",),
    "gainstage.verify": ("TaskGradients",),
    "gainstage.propagate.trace": ("ParameterStatistics", "Signal", "Trace"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use (PEP 562)."""
    if name == "policies":
        return importlib.import_module("gainstage.policies")
    if name not in __all__:
        raise AttributeError(f"module 'gainstage' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF.get(name, "gainstage.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``gainstage.plan`` the function, although importing the module ``gainstage.plan`` would rebind the name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
