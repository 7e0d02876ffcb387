"""A trace as a table: what every module puts out at step zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.text import Text

from gainstage.propagate.trace import Signal, Trace
from gainstage.report.findings import finding_text
from gainstage.report.numbers import cosine_span, number, shape, span
from gainstage.report.tables import Block, Column, Report, blocks, plural, short_type


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """One module with the signals of its calls."""

    path: str
    module_type: str
    signals: tuple[Signal, ...]


def trace_report(trace: Trace, *, grouped: bool = True) -> Report[Block[ModuleRow]]:
    """The modules of a trace in execution order.

    Args:
        trace: the prediction.
        grouped: show repeated blocks as one row, with the range of their values.
    """
    types = {call.path: call.module_type for call in trace.calls}
    rows = [ModuleRow(path=path, module_type=types[path], signals=signals) for path, signals in trace.modules.items() if signals]
    lines = blocks(
        rows,
        name=lambda row: row.path,
        key=lambda row: (row.module_type, tuple(tuple(signal.shape) for signal in row.signals)),
        grouped=grouped,
    )
    mode = "training" if trace.training else "evaluation"
    return Report(
        title=f"Signal at step zero: {plural(len(rows), 'module')}, {mode} mode",
        columns=_COLUMNS,
        rows=lines,
        remarks=_remarks(trace),
    )


def _remarks(trace: Trace) -> list[Text]:
    remarks = [Text("cosine: between entries of two samples, or of two positions, E[xᵢxⱼ] / E[x²]", style="dim")]
    if trace.attention:
        variances = span(signal.logit_variance for signal in trace.attention)
        entropies = span(signal.entropy for signal in trace.attention)
        many = plural(len(trace.attention), "attention")
        remarks.append(Text(f"{many}: logits with variance {variances} over the keys, entropy {entropies} of the most"))
    if trace.sampled:
        shown = ", ".join(trace.sampled[:8]) + (", ..." if len(trace.sampled) > 8 else "")
        remarks.append(Text(f"sampled for want of a rule, so noisier: {plural(len(trace.sampled), 'node')} ({shown})"))
    if trace.depth is not None:
        scale, count = trace.depth.scale, len(trace.depth.stations) - 1
        kept = f"of {number(scale)} layers" if scale < math.inf else "without end"
        remarks.append(Text(f"two inputs stay distinguishable over a depth scale {kept}; the main path has {count}", style="dim"))
    remarks.extend(map(finding_text, trace.findings))
    remarks.extend(Text(f"assumed: {assumption}") for assumption in trace.assumptions)
    return remarks


def _name(block: Block[ModuleRow]) -> str:
    return block.name or "(model)"


def _type(block: Block[ModuleRow]) -> str:
    calls = len(block.first.signals)
    return short_type(block.first.module_type) + (f" ×{calls}" if calls > 1 else "")


def _shape(block: Block[ModuleRow]) -> str:
    return ", ".join(dict.fromkeys(shape(signal.shape) for signal in block.first.signals))


def _over(value: Callable[[Signal], float], write: Callable[[Iterable[float]], str] = span) -> Callable[[Block[ModuleRow]], str]:
    """A cell with the range of ``value`` over all calls of all modules of a row."""
    return lambda block: write(value(signal) for row in block.rows for signal in row.signals)


def _gradient(signal: Signal) -> float:
    return math.nan if signal.gradient is None else signal.gradient.second_moment


def _sample_cosine(signal: Signal) -> float:
    return _cosine(signal, 0)


def _position_cosine(signal: Signal) -> float:
    """Between positions: axis 1 of [batch, token, channel], axis 2 of images (both layouts) and of [batch, head, token, dim]."""
    return _cosine(signal, len(signal.shape) // 2) if len(signal.shape) in (3, 4) else math.nan


def _cosine(signal: Signal, axis: int) -> float:
    """NaN where there are no two entries that differ in this axis only."""
    if axis >= len(signal.shape) or signal.shape[axis] < 2:
        return math.nan
    return signal.cosine(axis)


_COLUMNS: tuple[Column[Block[ModuleRow]], ...] = (
    Column(heading="module", cell=_name),
    Column(heading="type", cell=_type, max_width=18, importance=2),
    Column(heading="shape", cell=_shape, max_width=16),
    Column(heading="mean", cell=_over(lambda signal: signal.mean), is_number=True, importance=4),
    Column(heading="E[x²]", cell=_over(lambda signal: signal.second_moment), is_number=True),
    Column(heading="std", cell=_over(lambda signal: signal.std), is_number=True, importance=1),
    Column(heading="E[g²]", cell=_over(_gradient), is_number=True, importance=2),
    Column(heading="cos sample", cell=_over(_sample_cosine, cosine_span), is_number=True),
    Column(heading="cos pos.", cell=_over(_position_cosine, cosine_span), is_number=True, importance=3),
)
