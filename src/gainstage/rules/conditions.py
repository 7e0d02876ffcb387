"""Masks and conditions: what is compared, chosen and excluded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gainstage.rules.registry import Call, elementwise, pointwise, rule
from gainstage.signal import Added, Value, affine, combine, expand, known, mixture
from gainstage.signal.copies import replace
from gainstage.signal.sampling import draw

aten = torch.ops.aten

VANISHES, EXCLUDES = -50.0, -1e3  # logits whose exponential is nothing; logits that can only be meant as a mask

# Comparisons of random numbers are coins, 0 or 1, on the latent of what was compared.
pointwise(
    aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.eq.Scalar, aten.ne.Scalar,
    aten.isnan.default, aten.isinf.default, aten.isfinite.default,
)  # fmt: skip
for op in (aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.eq.Tensor, aten.ne.Tensor):
    elementwise(op, op)
elementwise(torch.mul, aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor)


@rule(aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor)
def logical_or(call: Call, x: Value, y: Value) -> Value:
    """``1 - (1 - a) (1 - b)``."""
    return affine(combine(torch.mul, logical_not(call, x), logical_not(call, y)), -1.0, 1.0)


def add_known(x: Value, y: Value) -> Value:
    """``x + y`` for a known y. With entries at which a softmax vanishes, it is known beforehand what the softmax prefers."""
    assert y.constant is not None
    data = y.constant
    if not data.is_floating_point() or data.numel() < 2 or float(data.min()) > VANISHES:
        return add_apart(x, y)
    valid = data > VANISHES
    if not bool(valid.any()) or (float(data.min()) > EXCLUDES and bool((data[valid] != 0).any())):
        return add_apart(x, y)
    return prefer(x, data.masked_fill(~valid, float("-inf")))


def add_apart(x: Value, y: Value) -> Value:
    """``x + y`` for a known y that a softmax may take apart again: positions' biases, which are no noise to it."""
    assert y.constant is not None
    total = combine(torch.add, x, y)
    if not y.constant.is_floating_point() or y.constant.dim() < 2:
        return total
    return replace(total, added=Added(total.table, expand(x, total.shape), y.constant.to("cpu", torch.float64)))


def add_drawn(x: Value, y: Value) -> Value:
    """``x + y`` for a y of which draws are at hand, by query and key, that a softmax may take apart again."""
    total = combine(torch.add, x, y)
    draws = y.valid_draws()
    if draws is None or len(y.dims) < 2 or total.shape[-2:] != y.shape[-2:]:
        return total
    fields = draws.reshape(-1, *y.shape[-2:])
    return replace(total, added=Added(total.table, expand(x, total.shape), fields, drawn=True))


def prefer(x: Value, prior: torch.Tensor) -> Value:
    """Add to the known part of logits."""
    shape = np.broadcast_shapes(x.shape, tuple(prior.shape))
    prior = prior.to("cpu", torch.float64)
    return replace(expand(x, shape), prior=prior if x.prior is None else x.prior + prior)


def exclude(x: Value, valid: torch.Tensor) -> Value:
    """Entries that a softmax over x does not see; nor are known numbers seen that were added to these alone."""
    added = x.added
    if added is not None and added.table is x.table and not added.drawn and added.of.axes == x.axes:
        x = x if bool(added.known.masked_fill(~valid.cpu(), 0.0).any()) else replace(added.of, dims=x.dims)
    return prefer(x, torch.zeros(valid.shape, dtype=torch.float64).masked_fill(~valid.cpu(), float("-inf")))


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(call: Call, x: Value, mask: Value, value: Any) -> Value:
    """Entries under the mask are set; a very negative value means "not in the softmax"."""
    return choose(logical_not(call, mask), x, value)


def kept(x: Value, valid: torch.Tensor) -> Value:
    """The tensor where a known mask is on, else 0."""
    return combine(torch.mul, x, known(valid.to(torch.float64)))


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(call: Call, condition: Value, x: Any, y: Any) -> Value:
    """One of two tensors by a condition. Of labels, some of which are dropped, one realisation: their mixture would name none."""
    first, second = (part.constant if isinstance(part, Value) else torch.as_tensor(part) for part in (x, y))
    if first is not None and second is not None and condition.constant is None and are_numbers(first, second):
        found = realised(condition).where(first, second)
        return replace(known(found.to(torch.float64)), constant=found)
    return choose(condition, *(known(part.constant.double()) if is_integer(part) else part for part in (x, y)))


def choose(condition: Value, x: Any, y: Any) -> Value:
    """``c x + (1 - c) y``: exact for conditions on the latent of x and y, and for those that are independent of both."""
    valid = None if condition.constant is None else condition.constant.bool()
    for part, chance in ((x, condition.mean), (y, 1.0 - condition.mean)):
        if valid is None and chance > 1.0 - 1e-9 and isinstance(part, Value) and part.shape == condition.shape:
            return part  # for sure: where(isfinite(x), x, NaN), where(x == a number of padding, NaN, x)
    if valid is None and any(only_number(part) < EXCLUDES for part in (x, y)):
        valid = realised(condition)
    for chosen, other, seen in ((x, y, valid), (y, x, None if valid is None else ~valid)):
        if isinstance(chosen, Value) and seen is not None and chosen.constant is None and only_number(other) < EXCLUDES:
            return exclude(chosen, seen)
    share = condition if valid is None else known(valid.to(torch.float64))
    values = [part if isinstance(part, Value) else known(torch.tensor(float(part), dtype=torch.float64)) for part in (x, y)]
    first, second = (part.constant for part in values)
    if valid is not None and first is not None and second is not None:
        return known(torch.where(valid, first.to(torch.float64), second.to(torch.float64)))
    if any(share.marginal.latent == part.marginal.latent for part in values):
        rest = affine(share, -1.0, 1.0)
        return combine(torch.add, combine(torch.mul, share, values[0]), combine(torch.mul, rest, values[1]))
    return mixture(share, values[0], values[1], is_choice=True)


def are_numbers(*tensors: torch.Tensor) -> bool:
    """Tell integers that may be looked up, such as labels; those of a coin are 0 and 1."""
    integers = all(not tensor.is_floating_point() for tensor in tensors)
    return integers and any(bool(((tensor < 0) | (tensor > 1)).any()) for tensor in tensors)


def is_integer(x: Any) -> bool:
    """Tell known integers, which arithmetic takes for numbers."""
    return isinstance(x, Value) and x.constant is not None and not x.constant.is_floating_point()


def realised(condition: Value) -> torch.Tensor:
    """A mask that depends on data is one realisation of itself."""
    (sample,) = draw([condition], np.random.default_rng(condition.shape))
    assert isinstance(sample, torch.Tensor)
    return sample > 0.5


def only_number(x: Any) -> float:
    """The value of all entries, NaN if they differ or are not known."""
    if not isinstance(x, Value):
        return float(x)
    if x.constant is None or x.constant.numel() == 0:
        return float("nan")
    first = x.constant.reshape(-1)[0]
    return float(first) if bool((x.constant == first).all()) else float("nan")


@rule(aten.bitwise_not.default, aten.logical_not.default)
def logical_not(call: Call, x: Value) -> Value:
    """``1 - c``."""
    if x.constant is not None:
        return known(~x.constant.bool())
    return affine(x, -1.0, 1.0)
