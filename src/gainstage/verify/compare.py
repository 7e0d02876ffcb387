"""Rows of a check: each measured second moment against its prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from gainstage.graph import Graph, ModuleCall, TensorMeta
from gainstage.plan import Plan
from gainstage.propagate import Trace
from gainstage.verify.dropped import chance_of_nothing
from gainstage.verify.measure import Measurement, Pass
from gainstage.verify.result import CheckRow

# Deviation of the log that is granted to the prediction itself. See benchmarks/accuracy.py for what it is measured to be.
MODEL_ERROR = 0.05
FALSE_ALARMS = 0.01  # probability that any row of a healthy model is out of bounds, were rows independent and normal
_NOTHING = 1e-30  # second moments below this are zero


@dataclass(frozen=True, slots=True)
class Prediction:
    """Second moment and spread of one output of a module call, its node, and the chance that all of it is dropped."""

    path: str
    call: int
    output: int
    node: str
    second_moment: float
    spread: float
    nothing: float


def predictions(graph: Graph, expected: Plan | Trace) -> list[Prediction]:
    """One for each floating-point output of a module call, in the order in which the calls return."""
    found = []
    for call in graph.calls:
        places = _floating(graph, call)
        if isinstance(expected, Plan):
            key = f"{call.path}@{call.call}"
            moments = expected.predictions.get(key, ())
            spreads = expected.spreads.get(key, (0.0,) * len(moments))
            if len(moments) != len(places):
                continue
        else:
            places = [(place, name) for place, name in places if name in expected.nodes]
            moments = tuple(expected.nodes[name].second_moment for _, name in places)
            spreads = tuple(expected.nodes[name].spread for _, name in places)
        for (place, name), moment, spread in zip(places, moments, spreads, strict=True):
            found.append(Prediction(call.path, call.call, place, name, moment, spread, chance_of_nothing(graph, name)))
    return found


def _floating(graph: Graph, call: ModuleCall) -> list[tuple[int, str]]:
    def is_floating(name: str) -> bool:
        meta = graph.by_name[name].meta
        return isinstance(meta, TensorMeta) and meta.dtype.is_floating_point

    return [(place, name) for place, name in zip(call.positions, call.outputs, strict=True) if is_floating(name)]


def z_bound(rows: int) -> float:
    """Standard normal quantile that one of this many independent rows exceeds with probability FALSE_ALARMS."""
    return NormalDist().inv_cdf(1.0 - FALSE_ALARMS / (2.0 * max(rows, 1)))


def compare(predicted: Sequence[Prediction], found: Pass) -> list[tuple[CheckRow, Prediction]]:
    """Rows of all outputs that were predicted and measured.

    ``z = (log(measured / predicted) + spread^2 / 2) / sqrt(spread^2 + sampling_error^2 + model_error^2)``: levels stray as
    products do, and a log-normal variable has its median at ``exp(-spread^2 / 2)`` of its mean.
    """
    pairs = [
        (one, found.calls[one.path, one.call][one.output])
        for one in predicted
        if one.output in found.calls.get((one.path, one.call), {})
    ]
    bound = z_bound(len(pairs))
    return [(_row(one, measured, found.types[one.path, one.call], bound), one) for one, measured in pairs]


def _row(one: Prediction, measured: Measurement, module_type: str, bound: float) -> CheckRow:
    expected, second = one.second_moment, measured.second_moment
    if not measured.is_finite:
        z = math.inf
    elif second <= _NOTHING and one.nothing > NormalDist().cdf(-bound):
        z = 0.0
    elif expected <= _NOTHING or second <= _NOTHING:
        z = 0.0 if expected <= _NOTHING and second <= _NOTHING else math.copysign(math.inf, second - expected)
    else:
        off = math.log(second / expected) + one.spread**2 / 2.0
        z = off / math.hypot(one.spread, measured.sampling_error, MODEL_ERROR)
    return CheckRow(
        path=one.path,
        call=one.call,
        output=one.output,
        module_type=module_type,
        shape=measured.shape,
        predicted=expected,
        measured=second,
        sampling_error=measured.sampling_error,
        spread=one.spread,
        z=z,
        ok=abs(z) <= bound,
    )
