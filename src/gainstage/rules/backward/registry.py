"""The registry of backward rules: for each op, the statistics of the gradients of its operands.

A gradient is a tensor like any other, with a table of its own, independent of the forward tensors that it meets to leading
order in the width (S. Schoenholz et al. 2017, arXiv:1611.01232, section 4). A backward rule returns one gradient for each
positional argument of the op: None where nothing flows, a tuple for a list of tensors. An op without one goes through its
vector-Jacobian product on samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gainstage.errors import RuleError
from gainstage.rules.registry import Op
from gainstage.signal import Value

Gradient = Value | None
BackwardRule = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class BackwardCall:
    """What a backward rule may know: the op, what its forward rule returned, and which arguments' gradients are asked for."""

    op: Op
    output: Any  # Value, or tuple of Values
    wanted: frozenset[int] | None = None  # places of arguments; None: all

    def wants(self, *arguments: int) -> bool:
        """Tell whether the gradient of any of these arguments is asked for: others may be left out."""
        return self.wanted is None or not self.wanted.isdisjoint(arguments)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first result."""
        first: Value = self.output[0] if isinstance(self.output, tuple) else self.output
        return first.shape


_BACKWARD: dict[Op, BackwardRule] = {}


def backward_rules() -> Mapping[Op, BackwardRule]:
    """All registered backward rules, by op."""
    return MappingProxyType(_BACKWARD)


def backward(*ops: Op) -> Callable[[BackwardRule], BackwardRule]:
    """Register a function as the backward rule of one or several ops.

    It is called with a :class:`BackwardCall`, the gradient of the op's result (a tuple for an op with several), and the op's own
    arguments with Values in the place of tensors.

    Raises:
        RuleError: an op has a backward rule already.
    """

    def register(function: BackwardRule) -> BackwardRule:
        for op in ops:
            if op in _BACKWARD:
                taken = _BACKWARD[op]
                raise RuleError(f"{op} has a backward rule already: {taken.__module__}.{taken.__qualname__}")
            _BACKWARD[op] = function
        return function

    return register
