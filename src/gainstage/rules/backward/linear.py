"""Gradients of contractions: the transposed contraction for the input, the product summed over samples for the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gainstage.rules.backward.registry import BackwardCall, Gradient, backward
from gainstage.rules.backward.sums import summed_over, to_shape
from gainstage.rules.linear import LETTERS, einsum_labels, matmul_labels, per_dim, transposed_windows, windows
from gainstage.signal import (
    Value,
    across_rows,
    affine,
    along_rows,
    along_weight,
    combine,
    contract,
    convolution_weight_gradient,
    convolve,
    expand,
    has_one_length,
    of_product,
    permute,
    reshape,
    to_channels,
    to_reader,
)
from gainstage.signal.copies import replace
from gainstage.signal.overlap import NONE

aten = torch.ops.aten


def contract_backward(g: Value, a: Value, b: Value, labels_a: str, labels_b: str, labels_out: str) -> tuple[Value, Value]:
    """``dL/da = sum g b`` over the labels that a has not, and the same for b."""
    return _one_side(g, a, b, labels_a, labels_b, labels_out), _one_side(g, b, a, labels_b, labels_a, labels_out)


def _one_side(g: Value, a: Value, b: Value, labels_a: str, labels_b: str, labels_out: str) -> Value:
    known = "".join(c for c in labels_a if c in labels_b or c in labels_out)
    found = contract(_along(g, labels_out, labels_b), b, labels_out, labels_b, known)
    if not (a.is_weight or b.is_weight):
        found = of_product(found, g, a, b, (known, labels_out, labels_b))
    for position, label in enumerate(labels_a):
        if label not in known:  # a was summed over it by itself
            found = reshape(found, (*found.shape[:position], 1, *found.shape[position:]))
    size = [max(n, m) for n, m in zip(found.shape, a.shape, strict=True)]
    return to_shape(expand(found, size), a.shape)


def _along(g: Value, labels: str, summed: str) -> Value:
    """A gradient, with what its places have in common where these are summed over."""
    along = frozenset(axis for dim, label in zip(g.dims, labels, strict=True) if label in summed for axis in dim)
    return g if all(read <= along for _, read in g.read) else replace(g, overlap=NONE)


def bias_gradient(g: Value, bias: Value | None, dim: int) -> Gradient:
    """Sum over everything but one dimension."""
    if bias is None:
        return None
    dim %= len(g.dims)
    return reshape(summed_over(g, [d for d in range(len(g.dims)) if d != dim]), bias.shape)


@backward(aten.linear.default)
def linear(call: BackwardCall, g: Value, x: Value, weight: Value, bias: Value | None = None) -> tuple[Gradient, ...]:
    """``g W`` and ``g^T x``."""
    batch = LETTERS[: len(x.dims) - 1]
    back = contract(g, weight, batch + "z", "zy", batch + "y")
    to_x = to_reader(g, call.output, weight, back, terms=float(x.shape[-1]))
    if not call.wants(1, 2):
        return (to_x,)
    labels = (batch + "z", batch + "y", "zy")
    if has_one_length(weight):
        to_weight = along_rows(g, call.output, weight, contract(g, x, *labels), -1)
    else:
        to_weight = across_rows(g, call.output, weight, _dense_gradient(g, x, *labels))
    return to_x, to_weight, bias_gradient(g, bias, -1)


def _dense_gradient(g: Value, x: Value, labels_g: str, labels_x: str, labels: str) -> Value:
    found = contract(g, x, labels_g, labels_x, labels)
    pair = along_weight(g, x, [len(x.dims) - 1], float(x.shape[-1]))
    return found if pair is None else combine(torch.add, found, contract(*pair, labels_g, labels_x, labels))


@backward(aten.addmm.default)
def addmm(
    call: BackwardCall, g: Value, bias: Value, x: Value, weight: Value, *, beta: float = 1, alpha: float = 1
) -> tuple[Gradient, ...]:
    """As a linear layer whose weight is stored [in, out]."""
    scaled = affine(g, float(alpha))
    to_x = contract(scaled, weight, "az", "yz", "ay")
    return to_shape(affine(g, float(beta)), bias.shape), to_x, _dense_gradient(scaled, x, "az", "ay", "yz")


@backward(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten._sparse_mm.default)
def matmul(call: BackwardCall, g: Value, a: Value, b: Value) -> tuple[Gradient, ...]:
    """``g b^T`` and ``a^T g``."""
    return contract_backward(g, a, b, *matmul_labels(len(a.dims), len(b.dims)))


@backward(aten.baddbmm.default)
def baddbmm(
    call: BackwardCall, g: Value, x: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> tuple[Gradient, ...]:
    """As a matrix product."""
    return to_shape(affine(g, float(beta)), x.shape), *contract_backward(affine(g, float(alpha)), a, b, "bxy", "byz", "bxz")


@backward(aten.einsum.default)
def einsum(call: BackwardCall, g: Value, equation: str, operands: Sequence[Value], **kwargs: Any) -> tuple[Any, ...]:
    """Each operand: the gradient contracted with all others."""
    inputs, output = einsum_labels(equation, [len(x.dims) for x in operands])
    if len(operands) == 1:
        ones = "".join(c for c in inputs[0] if c in output)
        order = [output.index(c) for c in ones]
        moved = permute(g, order)
        shape = [n if c in output else 1 for c, n in zip(inputs[0], operands[0].shape, strict=True)]
        return None, (expand(reshape(moved, shape), operands[0].shape),)
    if len(operands) > 2:
        raise NotImplementedError("gradient of an einsum of more than two operands")
    return None, contract_backward(g, operands[0], operands[1], inputs[0], inputs[1], output)


def _spatial(x: Value, weight: Value, g: Value, stride: Any, padding: Any, dilation: Any) -> list[tuple[int, ...]]:
    rank = len(weight.dims) - 2
    columns = (per_dim(stride, rank), per_dim(padding, rank), per_dim(dilation, rank))
    return list(zip(x.shape[-rank:], weight.shape[2:], *columns, g.shape[-rank:], strict=True))


@backward(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(
    call: BackwardCall, g: Value, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> tuple[Gradient, ...]:  # fmt: skip
    """The transposed convolution; the correlation of input and gradient, summed over samples and positions."""
    each = _spatial(x, weight, g, stride, padding, dilation)
    back = [transposed_windows(out, kernel, s, p, d, size) for size, kernel, s, p, d, out in each]
    taps = [windows(*args) for args in each]
    terms = float(np.prod(weight.shape[1:]))
    through = convolve(g, weight, back, groups, transposed=True)
    to_x = to_channels(g, to_reader(g, call.output, weight, through, terms=terms, groups=float(groups)), weight.shape[1])
    if not call.wants(1, 2):
        return (to_x,)
    to_weight = convolution_weight_gradient(g, x, weight.shape, taps, groups)
    if has_one_length(weight):
        return to_x, along_rows(g, call.output, weight, to_weight, 1), bias_gradient(g, bias, 1)
    to_weight = across_rows(g, call.output, weight, to_weight)
    pair = along_weight(g, x, [1], terms)
    if pair is not None:
        to_weight = combine(torch.add, to_weight, convolution_weight_gradient(*pair, weight.shape, taps, groups))
    return to_x, to_weight, bias_gradient(g, bias, 1)


@backward(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def convolution_padded(
    call: BackwardCall, g: Value, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: str = "valid",
    dilation: Any = 1, groups: int = 1,
) -> tuple[Gradient, ...]:  # fmt: skip
    """Convolution whose padding is named: "same" or "valid"."""
    rank = len(weight.dims) - 2
    dilations = per_dim(dilation, rank)
    pad = [d * (k - 1) // 2 if padding == "same" else 0 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    return convolution(call, g, x, weight, bias, stride, pad, dilation, groups)


@backward(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(
    call: BackwardCall, g: Value, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> tuple[Gradient, ...]:  # fmt: skip
    """The ordinary convolution with the same kernel; the roles of input and gradient exchanged for the weight."""
    each = _spatial(x, weight, g, stride, padding, dilation)
    taps = [windows(out, kernel, s, p, d, size) for size, kernel, s, p, d, out in each]
    to_x = convolve(g, weight, taps, groups)
    return to_x, convolution_weight_gradient(x, g, weight.shape, taps, groups), bias_gradient(g, bias, 1)
