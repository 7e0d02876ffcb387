"""Hold a rule against the operation itself: the one validator of all rules, ours and yours.

A case is an op with operands that are described by their tables. The operands are drawn many times, the op is run for real on
each draw, and mean, second moment, every entry of the table and the distribution of entries are compared with the
rule's. Expectations are over the draws of all operands, weights included. Validating a rule takes five lines::

    >>> import torch
    >>> from gainstage import testing
    >>> x = testing.correlated((4, 6, 5), mean=0.3, shares={(0, 1): 0.2, (2,): 0.1})
    >>> case = testing.RuleCase(op=torch.ops.aten.gelu.default, args=(x,))
    >>> testing.assert_rule(case).ok
    True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from gainstage.errors import InputError, RuleError
from gainstage.propagate.sample import constant_value
from gainstage.rules import Call, Rule, rule_of
from gainstage.signal import Value, apply, gaussian, independent
from gainstage.signal.axes import Axis, new_dims
from gainstage.signal.gather import arrangement
from gainstage.signal.movement import merge_dim
from gainstage.signal.patterns import spread_pairs
from gainstage.signal.quadrature import Array, quantiles, sample_quantiles, weights
from gainstage.signal.sampling import draw

BATCH, MOST = 512, 4096  # draws at once; draws after which the sampling error is what it is
PRECISION = 0.002  # standard error of every entry, relative to the second moment, at which drawing stops if a rule is exact
STANDARD_ERRORS = 5.0  # a thousand entries are compared: one in 2 million would be outside by chance
SHAPE = 0.02  # of distributions that are summed and multiplied on 65 points each, or are nearly Gaussian
KEPT = 2**16  # entries that quantiles are taken of
NUMERICAL = 2e-4  # of the fixed quadrature at a kink (4e-5 a kink) and of draws interpolated on its grid


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RuleCase:
    """An operation, its operands, and how near its rule has to come.

    ``args`` and ``kwargs`` are those of the op, with a :class:`~gainstage.signal.Value` (see :func:`entries`, :func:`correlated`,
    :func:`positive`, :func:`weight`, :func:`constant`) in the place of every tensor; one Value given twice is one tensor.
    ``model_error``: error of an approximate rule, in parts of the second moment, on top of five standard errors. ``shape_error``:
    mean distance of the quantiles, in parts of the root mean square; None where the rule does not follow the distribution of
    entries. ``reason`` says where either comes from. ``stand_in``: what to run where the op itself does
    not run in float64 on the CPU.
    """

    op: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    model_error: float = 0.0
    shape_error: float | None = SHAPE
    reason: str = ""
    stand_in: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        """An approximation is only accepted with its reason."""
        if (self.model_error or self.shape_error != SHAPE) and not self.reason:
            raise InputError(f"{self.op}: a case that allows for an error has to say where it comes from (reason=...)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One number of a rule's result, beside what the op gave.

    ``allowed`` is the distance that passes; ``scale`` the second moment, or the root mean square for a mean.
    """

    name: str
    predicted: float
    measured: float
    standard_error: float
    allowed: float
    scale: float

    @property
    def excess(self) -> float:
        """Distance in parts of what is allowed: above 1 is wrong."""
        distance = abs(self.predicted - self.measured)
        return distance / self.allowed if np.isfinite(distance) else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleReport:
    """What the validator found: every entry, and over how many draws."""

    op: str
    draws: int
    entries: tuple[Entry, ...]

    @property
    def worst(self) -> Entry:
        """Entry furthest from what was measured, in parts of what is allowed."""
        return max(self.entries, key=lambda entry: entry.excess)

    @property
    def ok(self) -> bool:
        """Tell whether every entry is within what is allowed."""
        return self.worst.excess <= 1.0

    def __str__(self) -> str:
        entry = self.worst
        return (
            f"{self.op}: {entry.name} is predicted {entry.predicted:.6g} and measured {entry.measured:.6g} "
            f"(standard error {entry.standard_error:.2g}, allowed distance {entry.allowed:.2g}; {self.draws} draws, "
            f"{sum(entry.excess > 1.0 for entry in self.entries)} of {len(self.entries)} entries out)"
        )


def entries(*shape: int, mean: float = 0.0, std: float = 1.0) -> Value:
    """Independent Gaussian entries."""
    return independent(shape, mean, std)


def weight(*shape: int, std: float = 1.0) -> Value:
    """A parameter: independent entries of mean 0, drawn anew each time."""
    return independent(shape, 0.0, std, is_weight=True)


def correlated(shape: tuple[int, ...], *, shares: Mapping[tuple[int, ...], float], mean: float = 0.0, std: float = 1.0) -> Value:
    """Gaussian entries, of whose variance a share is common to all entries with the same coordinates on some dimensions.

    ``shares={(0, 1): 0.2}`` of a tensor [batch, position, channel]: a fifth of the variance is one number for each position,
    shared by its channels. The rest is each entry's own.
    """
    if any(share < 0.0 for share in shares.values()) or sum(shares.values()) > 1.0:
        raise InputError(f"shares of the variance are positive and sum to 1 at most, not {dict(shares)}")
    dims = new_dims(shape)
    of = [d for d, dim in enumerate(dims) for _ in dim]
    table = np.zeros((2,) * len(of))
    for subset in np.ndindex(*table.shape):
        apart = {d for d, same in zip(of, subset, strict=True) if not same}
        common = sum(share for kept, share in shares.items() if apart.isdisjoint(kept))
        table[subset] = mean**2 + std**2 * (common if apart else 1.0)
    return gaussian(dims, mean, table, None)


def positive(x: Value) -> Value:
    """What a ReLU leaves of a tensor."""
    return apply(torch.relu, x)


def constant(tensor: torch.Tensor) -> Value:
    """A tensor that is known: a mask, an index, a buffer."""
    return constant_value(tensor)


def assert_rule(case: RuleCase, rule: Rule | None = None) -> RuleReport:
    """Raise AssertionError unless the rule of the case's op agrees with the op; see :func:`validate_rule`."""
    report = validate_rule(case, rule)
    if not report.ok:
        raise AssertionError(str(report))
    return report


def validate_rule(case: RuleCase, rule: Rule | None = None) -> RuleReport:
    """Compare a rule with its operation, run on draws of the operands.

    Args:
        case: the op and its operands.
        rule: the rule to validate; None for the one that is registered.

    Returns:
        Report with every entry compared; deterministic.

    Raises:
        RuleError: there is no rule for the op, or its result has not the form of the op's result.

    Example::

        report = gainstage.testing.validate_rule(case)
        print(report.worst)
    """
    found = rule or rule_of(case.op)
    if found is None:
        raise RuleError(f"{case.op} has no rule: register one with @gainstage.rules.rule, or pass it to validate_rule")
    draws = [_run(case, BATCH, 0)]
    shapes = tuple(None if sample is None else tuple(sample.shape[1:]) for sample in draws[0])
    result = found(Call(case.op, shapes), *case.args, **case.kwargs)
    values = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    _check_form(case, values, shapes)
    measured: list[list[Array]] = [[] for _ in values]  # tables of the draws so far
    while True:
        compared = tuple(
            entry
            for position, (value, *samples) in enumerate(zip(values, *draws, strict=False))
            if isinstance(value, Value) and samples[0] is not None and not _is_realised(value)
            for entry in _compare(case, value, samples, measured[position], f"output {position}: " if len(values) > 1 else "")
        )
        count = BATCH * len(draws)
        enough = PRECISION + 0.1 * case.model_error
        if count >= MOST or all(entry.standard_error <= enough * entry.scale for entry in compared):
            return RuleReport(op=str(case.op), draws=count, entries=compared)
        draws += [_run(case, BATCH, seed) for seed in range(len(draws), 2 * len(draws))]


def _is_realised(value: Value) -> bool:
    """Whether a result is one realisation of integers, as the place of a maximum is: no statistic."""
    return value.constant is not None and not value.constant.is_floating_point()


def _check_form(case: RuleCase, values: tuple[Any, ...], shapes: tuple[tuple[int, ...] | None, ...]) -> None:
    """Refuse a result that the op could not return."""
    if len(values) != len(shapes):
        raise RuleError(f"the rule of {case.op} returned {len(values)} results where the operation returns {len(shapes)}")
    for value, shape in zip(values, shapes, strict=True):
        if isinstance(value, Value) and value.shape != shape:
            raise RuleError(f"the rule of {case.op} returned shape {value.shape} where the operation returns {shape}")
    if not any(isinstance(value, Value) for value in values):
        raise RuleError(f"the rule of {case.op} returned no statistics; declare such an operation with statistics_free")


def _run(case: RuleCase, count: int, seed: int) -> list[torch.Tensor | None]:
    """Results of the op on many draws of its operands, [draws, *shape]; None for what is no tensor of numbers."""
    operands = [leaf for leaf in tree_leaves((case.args, dict(case.kwargs))) if isinstance(leaf, Value)]
    trials = Axis(count)
    repeated = [value if value.constant is not None else _repeated(value, trials) for value in operands]
    tensors = iter(draw(repeated, np.random.default_rng(seed)))
    operation = case.stand_in or case.op
    args = [_in_each_draw(argument, tensors) for argument in case.args]
    kwargs = [_in_each_draw(argument, tensors) for argument in case.kwargs.values()]
    results = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for _ in range(count):
            result = operation(*map(next, args), **dict(zip(case.kwargs, map(next, kwargs), strict=True)))
            results.append(list(result) if isinstance(result, (tuple, list)) else [result])
    return [_stacked(part) for part in zip(*results, strict=True)]


def _in_each_draw(argument: Any, tensors: Iterator[torch.Tensor]) -> Iterator[Any]:
    """An argument of the op in one draw after another; ``tensors`` are those of all operands, in their order."""
    if isinstance(argument, Value):
        return repeat(next(tensors)) if argument.constant is not None else iter(next(tensors).unbind())
    if isinstance(argument, (list, tuple)) and argument:
        return map(type(argument), zip(*[_in_each_draw(part, tensors) for part in argument], strict=False))
    return repeat(argument)


def _repeated(value: Value, trials: Axis) -> Value:
    """The tensor with a leading axis of independent draws."""
    apart = np.zeros_like(value.table)
    return Value(
        dims=((trials,), *value.dims),
        mean=value.mean,
        table=np.stack([apart + value.mean**2, value.table]),
        marginal=value.marginal,
        rho=np.stack([apart, value.correlation()]),
    )


def _stacked(results: tuple[Any, ...]) -> torch.Tensor | None:
    if not isinstance(results[0], torch.Tensor) or results[0].is_complex():
        return None
    return torch.stack(results).detach().to(torch.float64)


def _compare(case: RuleCase, value: Value, samples: Sequence[torch.Tensor], measured: list[Array], prefix: str) -> list[Entry]:
    """Every number of a predicted value beside the measured one; tables of samples that are new join those ``measured``."""
    for d in range(len(value.dims)):
        if arrangement(value.dims[d]) is not None:
            value = merge_dim(value, d)
    sizes = [axis.size for axis in value.axes]
    measured += [_tables(sample.reshape(len(sample), *sizes)) for sample in samples[len(measured) :]]
    sample, tables = torch.cat(list(samples)), np.concatenate(measured)
    means = sample.reshape(len(sample), -1).mean(1).numpy()
    second = float(tables.reshape(len(sample), -1)[:, -1].mean())
    found = [_entry(case, prefix + "mean", value.mean, means, second**0.5)]
    labels = [f"{d}" if len(dim) == 1 else f"{d}.{part}" for d, dim in enumerate(value.dims) for part in range(len(dim))]
    for subset in np.ndindex(*value.table.shape):
        shared = [label for label, same in zip(labels, subset, strict=True) if same]
        name = "second moment" if all(subset) else f"E[x_i x_j] for i, j equal on dimensions ({', '.join(shared)}) only"
        if all(same or axis.size > 1 for same, axis in zip(subset, value.axes, strict=True)):
            found.append(_entry(case, prefix + name, float(value.table[subset]), tables[(slice(None), *subset)], second))
    if case.shape_error is not None:
        found.append(_quantile_entry(case, prefix, value, sample, second**0.5))
    return found


def _entry(case: RuleCase, name: str, predicted: float, draws: Array, scale: float) -> Entry:
    error = float(draws.std(ddof=1)) / len(draws) ** 0.5
    allowed = STANDARD_ERRORS * error + (case.model_error + NUMERICAL) * scale + 1e-12
    return Entry(name=name, predicted=predicted, measured=float(draws.mean()), standard_error=error, allowed=allowed, scale=scale)


def _quantile_entry(case: RuleCase, prefix: str, value: Value, sample: torch.Tensor, scale: float) -> Entry:
    """Mean distance between the quantiles of an entry, predicted and measured (Wasserstein-1)."""
    assert case.shape_error is not None
    predicted = quantiles(value.marginal.values, weights())
    generator = np.random.default_rng(0)
    halves = [sample_quantiles(generator.choice(half.reshape(-1).numpy(), KEPT)) for half in sample.chunk(2)]
    distance = weights() @ np.abs(predicted - 0.5 * (halves[0] + halves[1]))
    apart = float(weights() @ np.abs(halves[0] - halves[1]))  # twice as far as both together are from the truth
    return Entry(
        name=prefix + "mean distance of the quantiles",
        predicted=float(distance),
        measured=0.0,
        standard_error=0.0,
        allowed=apart + case.shape_error * scale + 1e-12,
        scale=scale,
    )


def _tables(samples: torch.Tensor) -> Array:
    """Table of raw second moments of each of many samples [draws, *axes], over pairs of entries that differ."""
    sizes = tuple(samples.shape[1:])
    averaged = np.empty((*(2,) * len(sizes), len(samples)))
    cells: dict[tuple[int, ...], torch.Tensor] = {(): samples}  # averages over the axes so far on which a pair differs
    for axis in range(1, samples.dim()):
        cells = {
            (*subset, same): cell if same else cell.mean(axis, keepdim=True) for subset, cell in cells.items() for same in (0, 1)
        }
    for subset, cell in cells.items():
        averaged[subset] = cell.square().reshape(len(samples), -1).mean(1).numpy()
    pairs = spread_pairs(averaged, tuple(max(size, 2) for size in sizes))
    return np.moveaxis(pairs, -1, 0)
