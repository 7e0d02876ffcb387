"""From a graph to the statistics of every tensor in it."""

from gainstage.propagate.backward import Backward, propagate_back_along, propagate_backward
from gainstage.propagate.build import build_trace, given_up, sampled_nodes
from gainstage.propagate.interpret import evaluate, has_rule, propagate
from gainstage.propagate.sample import constant_value
from gainstage.propagate.statistics import (
    check_initialised,
    input_value,
    kurtosis,
    level_profile,
    parameter_moments,
    parameter_value,
    table_value,
)
from gainstage.propagate.trace import AttentionSignal, CallSignals, ParameterStatistics, Signal, Trace, no_level

__all__ = [
    "AttentionSignal",
    "Backward",
    "CallSignals",
    "ParameterStatistics",
    "Signal",
    "Trace",
    "build_trace",
    "check_initialised",
    "constant_value",
    "evaluate",
    "given_up",
    "has_rule",
    "input_value",
    "kurtosis",
    "level_profile",
    "no_level",
    "parameter_moments",
    "parameter_value",
    "propagate",
    "propagate_back_along",
    "propagate_backward",
    "sampled_nodes",
    "table_value",
]
