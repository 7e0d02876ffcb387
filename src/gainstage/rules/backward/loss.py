"""Gradients of losses."""

from __future__ import annotations

import numpy as np
import torch

from gainstage.rules.backward.registry import BackwardCall, Gradient, backward
from gainstage.rules.backward.sums import to_shape
from gainstage.signal import Value, affine, apply, combine, gaussian, known, softmax
from gainstage.signal.copies import replace
from gainstage.signal.movement import together
from gainstage.signal.quadrature import Array, expectation
from gainstage.signal.traits import Given

aten = torch.ops.aten
MEAN, SUM = 1, 2  # torch's numbers of the ways to reduce a loss


def _scaled(x: Value, g: Value, reduction: int, count: int) -> Value:
    factor = g.second_moment**0.5
    return affine(x, factor / count if reduction == MEAN else factor)


def _knowing(gradient: Value, mean: Array) -> Value:
    """A loss's gradient that is a function of the output, given on the output's grid, and of an independent target."""
    noise = max(gradient.second_moment - expectation(mean**2), 0.0)
    same_for_all = gaussian(gradient.dims, 1.0, np.ones_like(gradient.table))
    return replace(gradient, given=Given(mean, mean**2 + noise, same_for_all).scaled())


@backward(aten.cross_entropy_loss.default)
def cross_entropy(
    call: BackwardCall, g: Value, x: Value, target: Value, weight: Value | None = None, reduction: int = MEAN,
    ignore_index: int = -100, label_smoothing: float = 0.0,
) -> tuple[Gradient, ...]:  # fmt: skip
    """``(p - y) / n``, the labels independent of the logits; rows that are ignored get none."""
    if target.constant is None or target.constant.is_floating_point() or weight is not None or reduction == 0:
        raise NotImplementedError("cross-entropy with class weights, soft targets or without reduction")
    dim = 1 if len(x.dims) > 1 else 0
    labels = target.constant
    used = labels != ignore_index
    hot = torch.nn.functional.one_hot(labels.clamp_min(0).long(), x.shape[dim]).to(torch.float64)
    hot = ((1.0 - label_smoothing) * hot + label_smoothing / x.shape[dim]) * used[..., None]
    order = [*range(dim), hot.dim() - 1, *range(dim, hot.dim() - 1)]
    y = hot.permute(order).contiguous()
    rows = used.to(torch.float64)[..., None].permute(order).expand(y.shape)
    p, either = together(softmax(x, dim), known(rows + y))
    in_rows, labelled = (together(known(tensor), either)[0] for tensor in (rows, y))
    both = (either.table - in_rows.table - labelled.table) / 2.0  # E[row_i y_j], from the square of their sum
    table = p.table * in_rows.table - 2.0 * p.mean * both + labelled.table
    made = gaussian(p.dims, p.mean * in_rows.mean - labelled.mean, np.asarray(table), lineage=x.lineage)
    return _scaled(made, g, reduction, max(int(used.sum()), 1)), None


@backward(aten.nll_loss_nd.default)
def negative_log_likelihood(
    call: BackwardCall, g: Value, x: Value, target: Value, weight: Value | None = None, reduction: int = MEAN,
    ignore_index: int = -100,
) -> tuple[Gradient, ...]:  # fmt: skip
    """``-y / n``."""
    if target.constant is None or weight is not None or reduction == 0:
        raise NotImplementedError("negative log likelihood with class weights or without reduction")
    labels = target.constant
    hot = torch.nn.functional.one_hot(labels.clamp_min(0).long(), x.shape[1]).to(torch.float64)
    hot = torch.where((labels != ignore_index)[..., None], hot, torch.zeros_like(hot))
    order = [0, hot.dim() - 1, *range(1, hot.dim() - 1)]
    count = max(int((labels != ignore_index).sum()), 1)
    return _scaled(affine(known(hot.permute(order).contiguous()), -1.0), g, reduction, count), None


@backward(aten.mse_loss.default)
def mean_square(call: BackwardCall, g: Value, x: Value, y: Value, reduction: int = MEAN) -> tuple[Gradient, ...]:
    """``2 (x - y) / n``."""
    difference = _knowing(affine(combine(torch.sub, x, y), 2.0), 2.0 * (x.marginal.values - y.mean))
    if reduction == 0:
        to_x = combine(torch.mul, g, difference)
    else:
        to_x = _scaled(difference, g, reduction, int(np.prod(difference.shape)))
    return to_shape(to_x, x.shape), to_shape(affine(to_x, -1.0), y.shape)


@backward(aten.binary_cross_entropy_with_logits.default)
def binary_cross_entropy(
    call: BackwardCall, g: Value, x: Value, target: Value, weight: Value | None = None, pos_weight: Value | None = None,
    reduction: int = MEAN,
) -> tuple[Gradient, ...]:  # fmt: skip
    """``(sigmoid(x) - y) / n``."""
    if weight is not None or pos_weight is not None or reduction == 0:
        raise NotImplementedError("binary cross-entropy with weights or without reduction")
    chance = apply(torch.sigmoid, x)
    difference = _knowing(combine(torch.sub, chance, target), chance.marginal.values - target.mean)
    return _scaled(difference, g, reduction, int(np.prod(x.shape))), None
