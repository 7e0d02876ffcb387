"""What a propagation found, in the user's terms: signals of modules and nodes, statistics of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gainstage.errors import InputError
from gainstage.findings import WIDEST_SPREAD, Finding, FindingKind
from gainstage.graph import Graph, copied_layers
from gainstage.propagate.depth import Depth
from gainstage.signal import Value


@dataclass(frozen=True, slots=True, eq=False)
class Signal:
    """Predicted statistics of one tensor, over draws of weights and inputs and over positions."""

    value: Value
    gradient: Signal | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.value.shape

    @property
    def mean(self) -> float:
        """``E[x]``."""
        return self.value.mean

    @property
    def second_moment(self) -> float:
        """``E[x^2]``: what a following layer sees."""
        return self.value.second_moment

    @property
    def variance(self) -> float:
        """``E[x^2] - E[x]^2``."""
        return self.value.variance

    @property
    def std(self) -> float:
        """Square root of the variance."""
        return float(self.value.variance**0.5)

    @property
    def spread(self) -> float:
        """Predicted deviation of the log second moment from one draw of the weights to another."""
        if self.second_moment <= 0.0:
            return 0.0
        return float(np.sqrt(max(self.value.log_variance + self.value.fluctuation(), 0.0)))

    @property
    def is_typical(self) -> bool:
        """Whether draws are anywhere near the second moment, which is an average over them."""
        return self.spread <= WIDEST_SPREAD

    def cosine(self, axis: int) -> float:
        """``E[x_i x_j] / E[x^2]`` for entries that differ in one dimension only.

        Raises:
            InputError: the tensor has no such dimension, or only one entry along it.
        """
        if not -len(self.shape) <= axis < len(self.shape) or self.shape[axis] == 1:
            raise InputError(f"no two entries differ along dimension {axis} of a tensor of shape {self.shape}")
        axis %= len(self.shape)
        first = sum(len(dim) for dim in self.value.dims[:axis])
        count = len(self.value.dims[axis])
        total, pairs = 0.0, 0.0
        sizes = [a.size for a in self.value.dims[axis]]
        for subset in np.ndindex(*(2,) * count):
            if not all(subset):
                index = tuple(subset[p - first] if first <= p < first + count else 1 for p in range(self.value.table.ndim))
                number = float(np.prod([1 if same else n - 1 for same, n in zip(subset, sizes, strict=True)]))
                total += number * float(self.value.table[index])
                pairs += number
        return total / pairs / self.second_moment if self.second_moment > 0.0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "shape": list(self.shape),
            "mean": self.mean,
            "second_moment": self.second_moment,
            "std": self.std,
            "spread": self.spread,
            "gradient_second_moment": None if self.gradient is None else self.gradient.second_moment,
        }

    def __repr__(self) -> str:
        """One line."""
        return (
            f"Signal(shape={self.shape}, mean={self.mean:.4g}, second_moment={self.second_moment:.4g}, spread={self.spread:.2g})"
        )


def no_level(modules: Mapping[str, Sequence[Signal]]) -> Finding | None:
    """Where draws stray so far that their average says nothing of any one of them."""
    lost = {path: max(s.spread for s in signals) for path, signals in modules.items() if not all(s.is_typical for s in signals)}
    if not lost:
        return None
    return Finding(
        kind=FindingKind.LARGE_SPREAD,
        where=next(iter(lost)),
        evidence=f"second moments of {len(lost)} modules are averages over draws that few loud draws make: one draw strays from "
        f"another by a factor of {math.exp(WIDEST_SPREAD):.0f} and more, so that the level of no draw is predicted.",
        remedy="Bring the draw that is used to its levels (gs.calibrate), or hold levels by norms.",
    )


@dataclass(frozen=True, slots=True)
class ParameterStatistics:
    """Second moment of a parameter's entries, and of its gradient where one was propagated."""

    second_moment: float
    gradient_second_moment: float | None = None


@dataclass(frozen=True, slots=True)
class CallSignals:
    """One call of one module, with a signal for each floating-point output that carries statistics."""

    path: str
    call: int
    module_type: str
    outputs: tuple[Signal, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSignal:
    """One attention at step zero.

    ``logit_variance``: over the keys, of what queries and keys make. ``entropy``: over that of equal probabilities, 1 at most.
    """

    node: str
    path: str
    keys: int
    logit_variance: float
    entropy: float


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Everything predicted for one model: by module call, by node, by parameter."""

    graph: Graph
    nodes: Mapping[str, Signal]
    calls: tuple[CallSignals, ...]
    parameters: Mapping[str, ParameterStatistics]
    sampled: tuple[str, ...] = ()
    sampled_backward: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    attention: tuple[AttentionSignal, ...] = ()
    depth: Depth | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Layers that start as copies of one another; what depth does to inputs, where it is more than networks train with.

        And where levels are those of no draw.
        """
        lost = no_level(self.modules)
        depth = () if self.depth is None else self.depth.findings()
        return (*_copies(self), *depth, *(() if lost is None else (lost,)))

    @property
    def modules(self) -> Mapping[str, tuple[Signal, ...]]:
        """Module path to the signal of its (first) output, one for each call in order."""
        found: dict[str, tuple[Signal, ...]] = {}
        for call in self.calls:
            if call.outputs:
                found[call.path] = (*found.get(call.path, ()), call.outputs[0])
        return found

    @property
    def training(self) -> bool:
        """Mode of the model when it was captured."""
        return self.graph.training

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "training": self.training,
            "rung": self.graph.rung,
            "modules": [
                {"path": c.path, "call": c.call, "type": c.module_type, "outputs": [s.to_dict() for s in c.outputs]}
                for c in self.calls
            ],
            "parameters": {
                name: {"second_moment": p.second_moment, "gradient_second_moment": p.gradient_second_moment}
                for name, p in self.parameters.items()
            },
            "attention": [asdict(signal) for signal in self.attention],
            "depth": None if self.depth is None else self.depth.to_dict(),
            "findings": [finding.to_dict() for finding in self.findings],
            "sampled": list(self.sampled),
            "sampled_backward": list(self.sampled_backward),
            "assumptions": list(self.assumptions),
        }

    def __repr__(self) -> str:
        """One line."""
        return f"Trace({len(self.calls)} module calls, {len(self.nodes)} signals, {len(self.sampled)} sampled)"


def _copies(trace: Trace) -> Iterator[Finding]:
    """Layers whose trained parameters have the same random values."""
    named = {node.parameter: trace.nodes.get(node.name) for node in trace.graph.nodes if node.parameter is not None}
    groups: dict[str, list[str]] = {}
    for name, first in trace.graph.copies.items():
        signal = named.get(first)
        if signal is not None and signal.variance > 0.0 and trace.graph.parameters[first].requires_grad:
            groups.setdefault(first, [first]).append(name)
    for layers, equal in copied_layers(groups.values()).items():
        listed = ", ".join(layers[:-1][:3]) + (", ..." if len(layers) > 4 else "")
        count = "1 parameter" if len(equal) == 1 else f"{len(equal)} parameters"
        yield Finding(
            kind=FindingKind.IDENTICAL,
            where=layers[1],
            evidence=f"{listed} and {layers[-1]} start as copies of one another, with the same random values in {count} of each.",
            remedy="Draw each on its own: gs.initialize(model, ...), or reset the parameters after copy.deepcopy.",
        )
