"""Cases of linear maps, matrix products, convolutions and attention."""

from dataclasses import replace
from itertools import pairwise

import torch
from rule_cases.operands import LINE, MAP, TOKENS, VOLUME

from gainstage.testing import RuleCase, constant, correlated, entries, weight

aten = torch.ops.aten
sdpa = aten.scaled_dot_product_attention.default
HEADS_A = correlated((3, 2, 6, 8), mean=0.1, shares={(0, 2): 0.2, (3,): 0.1})
HEADS_B = correlated((3, 2, 8, 5), mean=0.2, std=0.5, shares={(0, 3): 0.3})
VECTOR = entries(8, mean=0.5)
BIAS = weight(6, std=0.3)
QUERY = correlated((3, 2, 6, 16), shares={(0, 1, 3): 0.3})
KEY, VALUE = weight(3, 2, 7, 16), correlated((3, 2, 7, 16), shares={(0, 1, 3): 0.3})
CAUSAL = torch.ones(6, 7, dtype=torch.bool).tril(1)
ROWS = correlated((40, 8), mean=0.1, shares={(0,): 0.2})
OFFSETS = torch.tensor([10, 16, 40], dtype=torch.int32)


def grouped(x, stack, offs):
    """What the grouped product computes, in any element type."""
    starts = [0, *offs.tolist()]
    return torch.cat([x[a:b] @ stack[i] for i, (a, b) in enumerate(pairwise(starts))])


STRAYS = "the variance of the logits strays with the length of each of the 16-wide queries; "
GAUSSIAN = "a sum of products is taken to be Gaussian; of few terms, or of terms with a factor in common, it is a mixture"
PRODUCTS = [
    RuleCase(op=aten.linear.default, args=(TOKENS, weight(7, 5, std=0.4), weight(7, std=0.3))),
    RuleCase(op=aten.linear.default, args=(TOKENS, weight(7, 5, std=0.4))),
    RuleCase(op=aten.linear.default, args=(TOKENS, weight(5, std=0.4))),
    RuleCase(op=aten.addmm.default, args=(BIAS, ROWS, weight(8, 6)), kwargs={"beta": 0.5, "alpha": 2.0}),
    RuleCase(op=aten.matmul.default, args=(HEADS_A, HEADS_B)),
    RuleCase(op=aten.matmul.default, args=(HEADS_A, VECTOR)),
    RuleCase(op=aten.matmul.default, args=(VECTOR, HEADS_B)),
    RuleCase(op=aten.matmul.default, args=(HEADS_A, weight(8, 3))),
    RuleCase(op=aten.matmul.default, args=(VECTOR, entries(8))),
    RuleCase(op=aten.mm.default, args=(ROWS, weight(8, 6))),
    RuleCase(op=aten._sparse_mm.default, args=(ROWS, weight(8, 6)), stand_in=aten.mm.default),
    RuleCase(op=aten.bmm.default, args=(TOKENS, correlated((4, 5, 3), shares={(0,): 0.3}))),
    RuleCase(op=aten.mv.default, args=(ROWS, VECTOR)),
    RuleCase(
        op=aten.baddbmm.default,
        args=(entries(4, 6, 3), TOKENS, correlated((4, 5, 3), shares={(0,): 0.3})),
        kwargs={"beta": 0.5, "alpha": 2.0},
    ),
    RuleCase(op=aten.einsum.default, args=("bhtd,bhds->bhts", [HEADS_A, HEADS_B])),
    RuleCase(op=aten.einsum.default, args=("...td, ...ds -> ...ts", [HEADS_A, HEADS_B])),
    RuleCase(op=aten.einsum.default, args=("bhtd->tb", [HEADS_A])),
    RuleCase(op=aten.einsum.default, args=("bhtd,bhds,do->bhso", [HEADS_A, HEADS_B, weight(8, 3)])),
    RuleCase(op=aten.einsum.default, args=("bid,bjd->bij", [TOKENS, entries(4, 3, 5)])),
    RuleCase(op=aten.einsum.default, args=("bid,d->bid", [TOKENS, entries(5)])),
    RuleCase(op=aten.conv1d.default, args=(LINE, weight(6, 4, 3, std=0.3), BIAS, [2], [1])),
    RuleCase(op=aten.conv2d.default, args=(MAP, weight(6, 4, 3, 3, std=0.2), BIAS, [1, 1], [1, 1])),
    RuleCase(op=aten.conv2d.default, args=(MAP, weight(6, 2, 3, 2, std=0.2), None, [2, 1], [0, 1], [2, 1], 2)),
    RuleCase(op=aten.conv2d.default, args=(MAP, weight(4, 1, 3, 3, std=0.3), None, [1, 1], [1, 1], [1, 1], 4)),
    RuleCase(op=aten.conv3d.default, args=(VOLUME, weight(3, 4, 2, 2, 3, std=0.2), None, [1, 2, 1], [0, 1, 1])),
    RuleCase(op=aten.conv1d.padding, args=(LINE, weight(6, 4, 4, std=0.3), BIAS, [1], "same")),
    RuleCase(op=aten.conv2d.padding, args=(MAP, weight(6, 4, 3, 3, std=0.2), BIAS, [1, 1], "same", [2, 2])),
    RuleCase(op=aten.conv3d.padding, args=(VOLUME, weight(3, 4, 2, 2, 3, std=0.2), None, [1, 1, 1], "valid")),
    RuleCase(op=aten.conv_transpose1d.default, args=(LINE, weight(4, 6, 4, std=0.3), BIAS, [2], [1], [1])),
    RuleCase(op=aten.conv_transpose2d.input, args=(MAP, weight(4, 6, 3, 3, std=0.3), BIAS, [2, 2], [1, 1], [1, 1])),
    RuleCase(op=aten.conv_transpose2d.input, args=(MAP, weight(4, 3, 2, 2, std=0.3), None, [2, 2], [0, 0], [0, 0], 2)),
    RuleCase(op=aten.conv_transpose3d.input, args=(VOLUME, weight(4, 3, 2, 2, 2, std=0.3), None, [2, 2, 2])),
    RuleCase(op=sdpa, args=(QUERY, KEY, VALUE), model_error=0.02, reason=STRAYS),
    RuleCase(op=sdpa, args=(QUERY, KEY, VALUE, constant(CAUSAL)), model_error=0.02, reason=STRAYS),
    RuleCase(op=sdpa, args=(QUERY, KEY, VALUE, None, 0.2), kwargs={"scale": 0.2}),
    RuleCase(op=aten._grouped_mm.default, args=(ROWS, weight(3, 8, 5), constant(OFFSETS)), stand_in=grouped),
]
CASES = [replace(case, shape_error=None, reason=case.reason + GAUSSIAN) for case in PRODUCTS]
