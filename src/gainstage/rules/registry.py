"""The registry of rules: one for each op overload, keyed by the op object, so that a typo fails at import.

Ask first for the mathematical class of an op: :func:`pointwise`, :func:`elementwise`, :func:`identity`. Most ops are
then one line. A rule is a function of a :class:`Call` and of the op's own arguments, with :class:`~gainstage.signal.Value` in the
place of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from gainstage.errors import RuleError
from gainstage.signal import Value, affine, apply, combine

Rule = Callable[..., Any]
Op = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Call:
    """What a rule may know of the place where its op is called: the shapes of its results."""

    op: Op
    shapes: tuple[tuple[int, ...] | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first result."""
        assert self.shapes
        assert self.shapes[0] is not None
        return self.shapes[0]


_RULES: dict[Op, Rule] = {}
_FOREIGN: dict[str, Rule] = {}
_FREE: set[Op] = set()
_POINTWISE: set[Op] = set()


def rules() -> Mapping[Op, Rule]:
    """All registered rules, by op."""
    return MappingProxyType(_RULES)


def rule(*ops: Op) -> Callable[[Rule], Rule]:
    """Register a function as the rule of one or several ops.

    Raises:
        RuleError: an op has a rule already; the message names both functions.

    Example::

        @rule(torch.ops.aten.neg.default)
        def negate(call, x):
            "-x: same second moment, mean negated."
            return affine(x, -1.0)
    """

    def register(function: Rule) -> Rule:
        for op in ops:
            if op in _RULES:
                taken = _RULES[op]
                raise RuleError(
                    f"{op} has a rule already: {taken.__module__}.{taken.__qualname__}; "
                    f"{function.__module__}.{function.__qualname__} cannot be registered as well"
                )
            _RULES[op] = function
        return function

    return register


def foreign_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of ops that exist only once the library that defines them is imported, by name."""

    def register(function: Rule) -> Rule:
        _FOREIGN.update(dict.fromkeys(names, function))
        return function

    return register


def rule_of(op: Op | None) -> Rule | None:
    """Rule of an op, or None."""
    return None if op is None else _RULES.get(op) or _FOREIGN.get(str(op))


@dataclass(frozen=True, slots=True)
class _Applied:
    """An op with its other arguments, as a function of a tensor; equal where these are."""

    op: Op
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The op on a tensor."""
        result: torch.Tensor = self.op(tensor, *self.args, **self.kwargs)
        return result


def pointwise(*ops: Op) -> None:
    """Register ops that are a function of one tensor, entry by entry: evaluated as they are, on the latent's grid."""

    def evaluation(op: Op) -> Rule:
        def evaluate(call: Call, x: Value, *args: Any, **kwargs: Any) -> Value:
            return apply(_Applied(op, args, kwargs), x)

        evaluate.__qualname__ = f"pointwise({op})"
        return evaluate

    for op in ops:
        rule(op)(evaluation(op))
        _POINTWISE.add(op)


def elementwise(function: Callable[..., torch.Tensor], *ops: Op) -> None:
    """Register ops of two tensors, entry by entry; either of them may be a Python number."""

    def evaluate(call: Call, x: Any, y: Any, *args: Any, **kwargs: Any) -> Value:
        return binary(function, x, y, *args, **kwargs)

    evaluate.__qualname__ = f"elementwise({getattr(function, '__name__', function)})"
    rule(*ops)(evaluate)


def binary(function: Callable[..., torch.Tensor], x: Any, y: Any, alpha: float = 1.0) -> Value:
    """``function(x, alpha y)`` where at least one operand is a Value."""
    x, y = _number(x), _number(y)
    if isinstance(y, Value) and alpha != 1:
        y = affine(y, float(alpha))
    if isinstance(x, Value) and isinstance(y, Value):
        return combine(function, x, y)
    if isinstance(x, Value):
        number = float(y) * float(alpha)
        if function is torch.add:
            return affine(x, 1.0, number)
        if function is torch.sub:
            return affine(x, 1.0, -number)
        if function is torch.mul:
            return affine(x, number)
        if function is torch.div:
            return affine(x, 1.0 / number)
        return apply(lambda t: function(t, torch.tensor(number, dtype=t.dtype)), x)
    number = float(x)
    if function is torch.add:
        return affine(y, 1.0, number)
    if function is torch.mul:
        return affine(y, number)
    if function is torch.sub:
        return affine(y, -1.0, number)
    return apply(lambda t: function(torch.tensor(number, dtype=t.dtype), t), y)


def _number(x: Any) -> Any:
    """Return the number in a constant of one entry; anything else as it is."""
    if isinstance(x, Value) and x.constant is not None and x.constant.numel() == 1 and len(x.dims) == 0:
        return float(x.constant)
    return x


def identity(*ops: Op) -> None:
    """Register ops that return their first operand unchanged, as far as any statistic is concerned."""

    def unchanged(call: Call, x: Value, *args: Any, **kwargs: Any) -> Value:
        return x

    rule(*ops)(unchanged)


def statistics_free(*ops: Op) -> None:
    """Declare ops whose results carry no signal: shapes, checks, integers."""
    _FREE.update(ops)


def is_free(op: Op) -> bool:
    """Tell whether an op was declared free of statistics."""
    return op in _FREE


def is_pointwise(op: Op) -> bool:
    """Tell whether an op was declared a function of one tensor, entry by entry."""
    return op in _POINTWISE
