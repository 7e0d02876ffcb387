"""Linear maps, matrix products, convolutions, einsum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gainstage.rules.conditions import add_known
from gainstage.rules.registry import Call, rule
from gainstage.signal import Added, Value, affine, combine, contract, convolve, mean_over, permute, reshape
from gainstage.signal.contraction import Places
from gainstage.signal.copies import replace
from gainstage.signal.known import known
from gainstage.signal.quadrature import covariance_series

aten = torch.ops.aten
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def with_bias(y: Value, bias: Value | None, dim: int) -> Value:
    """Add a bias along one dimension."""
    if bias is None:
        return y
    shape = [1] * len(y.dims)
    shape[dim] = -1
    total = combine(torch.add, y, reshape(bias, shape))
    known = bias.constant
    if known is None and bias.mean != 0.0 and bias.variance <= 0.0:
        known = torch.full(bias.shape, bias.mean, dtype=torch.float64)
    if known is None or not known.is_floating_point():
        return total
    return replace(total, added=Added(total.table, y, known.to("cpu", torch.float64).reshape(shape)))


@rule(aten.linear.default)
def linear(call: Call, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """``K_y[S] = n v K_x[S + in]``, plus the bias. A vector as weight is one row, which is dropped."""
    x = replace(x, is_weight=False)  # by its place: a table of queries is data to the layers that read it
    batch = LETTERS[: len(x.dims) - 1]
    if len(weight.dims) == 1:
        return with_bias(contract(x, weight, batch + "y", "y", batch), bias, -1)
    return with_bias(contract(x, weight, batch + "y", "zy", batch + "z"), bias, -1)


@rule(aten.addmm.default)
def addmm(call: Call, bias: Value, x: Value, weight: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    """``beta bias + alpha x w``."""
    product = affine(contract(x, weight, "ay", "yz", "az"), float(alpha))
    return combine(torch.add, product, affine(bias, float(beta)))


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten._sparse_mm.default)
def matmul(call: Call, a: Value, b: Value) -> Value:
    """Sum over the last dimension of a and the last but one of b."""
    return product(a, b, *matmul_labels(len(a.dims), len(b.dims)))


def product(a: Value, b: Value, labels_a: str, labels_b: str, labels_out: str) -> Value:
    """Sum of products; of a tensor with itself, in rows and columns, with what is known of its diagonal beforehand.

    ``E[sum over c of f(x_ic) g(x_jc)]`` is n times the covariance of f and g at one place for i = j, and at two places elsewhere,
    beyond the product of their means. Around that products at two places are taken for those of tensors that are independent.
    """
    found = contract(a, b, labels_a, labels_b, labels_out)
    places = _own_places(a, b, (labels_a, labels_b, labels_out))
    if places is None or found.prior is not None:
        return found
    row, column = places
    terms = math.prod(size for label, size in zip(labels_a, a.shape, strict=True) if label not in labels_out)
    covariance = covariance_series(a.marginal.values, b.marginal.values, a.correlation())
    position = sum(len(dim) for dim in a.dims[: labels_a.index(row)])
    full = (1,) * covariance.ndim
    same, other = (terms * float(covariance[(*full[:position], at, *full[position + 1 :])]) for at in (1, 0))
    size = a.shape[labels_a.index(row)]
    shape = [size if label in (row, column) else 1 for label in labels_out]
    diagonal = (same - other) * torch.eye(size, dtype=torch.float64).reshape(shape)
    return add_known(affine(found, 1.0, other), known(diagonal))


def _own_places(a: Value, b: Value, labels: tuple[str, str, str]) -> tuple[str, str] | None:
    """Labels of rows and columns, where functions of one tensor meet at other places of it and at equal ones otherwise."""
    labels_a, labels_b, out = labels
    if a.is_weight or b.is_weight or a.constant is not None or b.constant is not None:
        return None
    if a.marginal.latent != b.marginal.latent or a.statistic is not None or b.statistic is not None:
        return None
    rows, columns = ([c for c in own if c not in other] for own, other in ((labels_a, labels_b), (labels_b, labels_a)))
    if len(rows) != 1 or len(columns) != 1 or not {rows[0], columns[0]} <= set(out):
        return None
    dims_a, dims_b = dict(zip(labels_a, a.dims, strict=True)), dict(zip(labels_b, b.dims, strict=True))
    matched = all(dims_a[c] == dims_b[c] for c in labels_a if c in labels_b)
    is_crossed = dims_a[rows[0]] == dims_b[columns[0]] and len(dims_a[rows[0]]) == 1
    return (rows[0], columns[0]) if matched and is_crossed else None


def matmul_labels(rank_a: int, rank_b: int) -> tuple[str, str, str]:
    """Labels of a, b and a @ b: y is summed over, leading dimensions are broadcast."""
    if rank_a == 1 and rank_b == 1:
        return "y", "y", ""
    if rank_b == 1:
        batch = LETTERS[: rank_a - 1]
        return batch + "y", "y", batch
    if rank_a == 1:
        batch = LETTERS[: rank_b - 2]
        return "y", batch + "yz", batch + "z"
    rank = max(rank_a, rank_b) - 2
    batch = LETTERS[:rank]
    return batch[rank - (rank_a - 2) :] + "xy", batch[rank - (rank_b - 2) :] + "yz", batch + "xz"


@rule(aten.baddbmm.default)
def baddbmm(call: Call, x: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    """``beta x + alpha a b``."""
    product = affine(matmul(call, a, b), float(alpha))
    if beta == 0:
        return product
    shift = affine(x, float(beta))
    return combine(torch.add, product, shift) if x.constant is None else add_known(product, shift)


@rule(aten.einsum.default)
def einsum(call: Call, equation: str, operands: Sequence[Value], *, path: Any = None) -> Value:
    """Sum of products, pair after pair from the left."""
    inputs, output = einsum_labels(equation, [len(x.dims) for x in operands])
    value, labels = operands[0], inputs[0]
    if len(operands) == 1:
        for label in [c for c in labels if c not in output]:
            d = labels.index(label)
            size = value.shape[d]
            value = affine(mean_over(value, value.dims[d]), float(size))
            value = reshape(value, [n for i, n in enumerate(value.shape) if i != d])
            labels = labels[:d] + labels[d + 1 :]
        return permute(value, [labels.index(c) for c in output])
    for position, (other, its) in enumerate(zip(operands[1:], inputs[1:], strict=True)):
        later = set(output).union(*inputs[position + 2 :])
        kept = "".join(dict.fromkeys(c for c in labels + its if c in later))
        if position == len(operands) - 2:
            kept = output
        value = product(value, other, labels, its, kept)
        labels = kept
    return value


def einsum_labels(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Labels of each operand and of the result, one letter for each dimension: dots written out, the result implied or not."""
    equation = equation.replace(" ", "")
    left, arrow, output = equation.partition("->")
    inputs = left.split(",")
    free = [c for c in LETTERS.upper() if c not in equation]
    width = max((rank - len(labels.replace("...", "")) for rank, labels in zip(ranks, inputs, strict=True)), default=0)
    dots = "".join(free[:width])
    filled = [
        labels.replace("...", dots[width - (rank - len(labels) + 3) :] if "..." in labels else "")
        for rank, labels in zip(ranks, inputs, strict=True)
    ]
    if arrow:
        return filled, output.replace("...", dots)
    letters = "".join(filled)
    return filled, dots + "".join(sorted(c for c in set(letters) if letters.count(c) == 1 and c not in dots))


def windows(size: int, kernel: int, stride: int, padding: int, dilation: int, outputs: int) -> Places:
    """Position [outputs, taps] inside the map that tap k of output p reads, -1 in the padding."""
    place = stride * np.arange(outputs)[:, None] - padding + dilation * np.arange(kernel)[None, :]
    return np.where((place >= 0) & (place < size), place, -1)


def transposed_windows(size: int, kernel: int, stride: int, padding: int, dilation: int, outputs: int) -> Places:
    """Position [outputs, taps] that a tap of a transposed convolution reads: only every stride-th tap meets an input."""
    place = np.arange(outputs)[:, None] + padding - dilation * np.arange(kernel)[None, :]
    return np.where((place % stride == 0) & (place >= 0) & (place < size * stride), place // stride, -1)


def per_dim(value: int | Sequence[int], rank: int) -> list[int]:
    """One number for each spatial dimension."""
    if isinstance(value, int):
        return [value] * rank
    return list(value) if len(value) == rank else list(value) * rank


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(
    call: Call, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Value:  # fmt: skip
    """Contraction over input channels and the taps inside the map."""
    rank = len(weight.dims) - 2
    space = x.shape[-rank:]
    outs = call.shape[-rank:]
    each = zip(space, weight.shape[2:], per_dim(stride, rank), per_dim(padding, rank), per_dim(dilation, rank), outs, strict=True)
    return with_bias(convolve(x, weight, [windows(*args) for args in each], groups), bias, 1)


@rule(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def convolution_padded(
    call: Call, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: str = "valid", dilation: Any = 1,
    groups: int = 1,
) -> Value:  # fmt: skip
    """Convolution whose padding is named: "same" or "valid"."""
    rank = len(weight.dims) - 2
    dilations = per_dim(dilation, rank)
    pad = [d * (k - 1) // 2 if padding == "same" else 0 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    result: Value = convolution(call, x, weight, bias, stride, pad, dilation, groups)
    return result


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(
    call: Call, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    """Contraction over input channels and the taps that meet an input: about taps / stride of them."""
    rank = len(weight.dims) - 2
    each = zip(
        x.shape[-rank:], weight.shape[2:], per_dim(stride, rank), per_dim(padding, rank), per_dim(dilation, rank),
        call.shape[-rank:], strict=True,
    )  # fmt: skip
    found = convolve(x, weight, [transposed_windows(*args) for args in each], groups, transposed=True)
    return with_bias(found, bias, 1)
