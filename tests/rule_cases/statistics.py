"""Cases of reductions, pools, norms, random numbers and recurrent layers."""

import torch
from rule_cases.operands import AMOUNTS, LINE, MAP, MORE_TOKENS, RECTIFIED, TOKENS, VOLUME

from gainstage.signal import apply
from gainstage.testing import RuleCase, constant, correlated, entries, weight

aten = torch.ops.aten
WIDE = correlated((4, 3, 64), mean=0.3, shares={(0, 1): 0.2, (2,): 0.15})
NORMED = correlated((8, 6, 6, 6), mean=0.3, shares={(0, 1): 0.1, (1,): 0.15})
PLAIN = correlated((4, 3, 64), mean=0.3, shares={(2,): 0.15})
PROBABILITIES = apply(torch.sigmoid, TOKENS)
RUNNING = (constant(torch.zeros(4).double()), constant(torch.full((4,), 2.0).double()))
SCALE, SHIFT = entries(64, mean=1.0, std=0.1), entries(64, std=0.2)

STRAYS = "the mean square that is divided by strays from draw to draw where entries have something in common; taken at its mean"
BORDER = "windows at the border of this small map have fewer places; their mean is taken to be as much less as their deviation"
UNEQUAL = "all places of a window are taken to be equally correlated; those of one token are more than those of two"
FEW = "a softmax of few terms is no function of one Gaussian: its sum strays with the terms"
GROWS = "the mean grows along the axis; a value has one mean"

CASES = [
    RuleCase(op=aten.mean.dim, args=(TOKENS, [1])),
    RuleCase(op=aten.mean.dim, args=(TOKENS, [0, -1], True)),
    RuleCase(op=aten.mean.default, args=(TOKENS,)),
    RuleCase(op=aten.sum.dim_IntList, args=(TOKENS, [1])),
    RuleCase(op=aten.sum.dim_IntList, args=(AMOUNTS, [-1], True)),
    RuleCase(op=aten.sum.default, args=(TOKENS,)),
    RuleCase(op=aten.var.correction, args=(WIDE, [-1]), kwargs={"correction": 1}),
    RuleCase(op=aten.var.dim, args=(WIDE, [-1], False)),
    RuleCase(op=aten.std.correction, args=(WIDE, [-1])),
    RuleCase(op=aten.std.dim, args=(WIDE, [-1], False, True)),
    RuleCase(op=aten.softmax.int, args=(WIDE, -1)),
    RuleCase(op=aten._softmax.default, args=(WIDE, 2, False)),
    RuleCase(op=aten.avg_pool1d.default, args=(LINE, [3], [2], [1])),
    RuleCase(op=aten.avg_pool2d.default, args=(MAP, [3, 3], [2, 2], [1, 1]), model_error=0.02, reason=BORDER),
    RuleCase(op=aten.avg_pool2d.default, args=(MAP, [3, 3], [2, 2], [1, 1], True, False), model_error=0.03, reason=BORDER),
    RuleCase(op=aten.avg_pool3d.default, args=(VOLUME, [2, 2, 2])),
    RuleCase(op=aten.adaptive_avg_pool1d.default, args=(LINE, [4])),
    RuleCase(op=aten.adaptive_avg_pool2d.default, args=(MAP, [1, 1])),
    RuleCase(op=aten.adaptive_avg_pool2d.default, args=(MAP, [3, 2])),
    RuleCase(op=aten.adaptive_avg_pool3d.default, args=(VOLUME, [2, 1, 3])),
    RuleCase(op=aten.max_pool1d.default, args=(LINE, [3], [2], [1])),
    RuleCase(op=aten.max_pool1d.default, args=(LINE, [3], [3])),
    RuleCase(op=aten.max_pool2d.default, args=(MAP, [3, 3], [2, 2], [1, 1])),
    RuleCase(op=aten.max_pool2d.default, args=(MAP, [2, 2])),
    RuleCase(op=aten.max_pool3d.default, args=(VOLUME, [2, 2, 2])),
    RuleCase(op=aten.adaptive_max_pool1d.default, args=(LINE, [3])),
    RuleCase(op=aten.adaptive_max_pool2d.default, args=(MAP, [1, 1])),
    RuleCase(op=aten.adaptive_max_pool2d.default, args=(MAP, [3, 2])),
    RuleCase(op=aten.adaptive_max_pool3d.default, args=(VOLUME, [2, 1, 3])),
    RuleCase(op=aten.max_pool1d_with_indices.default, args=(LINE, [3])),
    RuleCase(op=aten.max_pool2d_with_indices.default, args=(MAP, [2, 2], [2, 2])),
    RuleCase(op=aten.max_pool3d_with_indices.default, args=(VOLUME, [2, 2, 2])),
    RuleCase(op=aten.amax.default, args=(PLAIN, [-1])),
    RuleCase(op=aten.max.dim, args=(PLAIN, -1)),
    RuleCase(op=aten.min.dim, args=(PLAIN, -1, True)),
    RuleCase(op=aten.amax.default, args=(WIDE, [1, 2], True), model_error=0.09, shape_error=0.05, reason=UNEQUAL),
    RuleCase(op=aten.amin.default, args=(PLAIN, [-1], True)),
    RuleCase(op=aten.upsample_nearest1d.vec, args=(LINE, [18], None)),
    RuleCase(op=aten.upsample_nearest2d.vec, args=(MAP, [14, 10], None)),
    RuleCase(op=aten.upsample_nearest3d.vec, args=(VOLUME, None, [2.0, 1.0, 2.0])),
    RuleCase(op=aten.upsample_linear1d.vec, args=(LINE, [15], False, None)),
    RuleCase(op=aten.upsample_bilinear2d.vec, args=(MAP, [10, 4], True, None)),
    RuleCase(op=aten.upsample_bicubic2d.vec, args=(MAP, [10, 9], False, None)),
    RuleCase(op=aten._upsample_bicubic2d_aa.vec, args=(MAP, [3, 9], False, None)),
    RuleCase(op=aten._upsample_bilinear2d_aa.vec, args=(MAP, [3, 9], False, None)),
    RuleCase(op=aten.cumsum.default, args=(TOKENS, 1), shape_error=0.1, reason=GROWS),
    RuleCase(op=aten.linalg_vector_norm.default, args=(WIDE, 2, [-1], True), model_error=0.02, shape_error=0.1, reason=STRAYS),
    RuleCase(op=aten.linalg_vector_norm.default, args=(PLAIN, 2, [-1])),
    RuleCase(op=aten.layer_norm.default, args=(WIDE, [64], SCALE, SHIFT)),
    RuleCase(op=aten.layer_norm.default, args=(WIDE, [3, 64]), model_error=0.02, reason=STRAYS),
    RuleCase(op=aten.rms_norm.default, args=(WIDE, [64], SCALE), model_error=0.07, shape_error=0.06, reason=STRAYS),
    RuleCase(op=aten.rms_norm.default, args=(PLAIN, [64], SCALE)),
    RuleCase(
        op=aten.batch_norm.default,
        args=(NORMED, entries(6, mean=1.0, std=0.1), entries(6, std=0.2), None, None, True, 0.1, 1e-5, False),
    ),
    RuleCase(
        op=aten.batch_norm.default,
        args=(
            MAP,
            None,
            None,
            constant(torch.zeros(4).double()),
            constant(torch.full((4,), 2.0).double()),
            False,
            0.1,
            1e-5,
            False,
        ),
    ),
    RuleCase(
        op=aten.group_norm.default,
        args=(NORMED, 2, entries(6, mean=1.0, std=0.1), entries(6, std=0.2)),
        model_error=0.03,
        reason=STRAYS,
    ),
    RuleCase(
        op=aten._weight_norm.default,
        args=(weight(6, 16, 16, std=0.3), entries(6, 1, 1, mean=1.0, std=0.1)),
        shape_error=0.04,
        reason="the distribution of a product is made of few points of each factor",
    ),
    RuleCase(op=aten.instance_norm.default, args=(NORMED, None, None, None, None, True, 0.1, 1e-5, False)),
    RuleCase(op=aten.dropout.default, args=(TOKENS, 0.3, True)),
    RuleCase(op=aten.dropout.default, args=(RECTIFIED, 0.3, True)),
    RuleCase(op=aten.dropout.default, args=(TOKENS, 0.3, False)),
    RuleCase(op=aten.feature_dropout.default, args=(MAP, 0.3, True)),
    RuleCase(op=aten.bernoulli.p, args=(TOKENS, 0.3)),
    RuleCase(op=aten.bernoulli.default, args=(PROBABILITIES,)),
    RuleCase(op=aten.uniform.default, args=(TOKENS, -1.0, 3.0)),
    RuleCase(op=aten.exponential.default, args=(TOKENS, 2.0)),
    RuleCase(op=aten.rand.default, args=([4, 5],)),
    RuleCase(op=aten.rand_like.default, args=(TOKENS,)),
    RuleCase(op=aten.randn.default, args=([4, 5],)),
    RuleCase(op=aten.randn_like.default, args=(TOKENS,)),
    RuleCase(op=aten.softmax.int, args=(MORE_TOKENS, 1), shape_error=0.06, reason=FEW),
]

UNITS, INPUTS = 48, 12
SEQUENCE = correlated((4, 4, INPUTS), shares={(1, 2): 0.3})
STEP = entries(4, INPUTS)
STATE = constant(torch.zeros(1, 4, UNITS, dtype=torch.float64))
CELL_STATE = constant(torch.zeros(4, UNITS, dtype=torch.float64))
LAST = "the last state is given the mean over all steps, and the mean of rectified units grows from step to step"
NARROW = "units are simulated as if infinitely many; the error falls like 1/width, 3 % at 96"


def recurrent_weights(gates):
    std = UNITS**-0.5
    return [weight(gates * UNITS, INPUTS, std=std), weight(gates * UNITS, UNITS, std=std), *biases(gates)]


def biases(gates):
    return [weight(gates * UNITS, std=0.1), weight(gates * UNITS, std=0.1)]


def layer(op, state, gates, error=0.06, reason=NARROW):
    args = (SEQUENCE, state, recurrent_weights(gates), True, 1, 0.0, True, False, False)
    return RuleCase(op=op, args=args, model_error=error, shape_error=0.06, reason=reason)


def cell(op, state, gates):
    w_ih, w_hh, b_ih, b_hh = recurrent_weights(gates)
    return RuleCase(op=op, args=(STEP, state, w_ih, w_hh, b_ih, b_hh), model_error=0.06, shape_error=0.06, reason=NARROW)


CASES += [
    layer(aten.lstm.input, [STATE, STATE], 4),
    layer(aten.gru.input, STATE, 3),
    layer(aten.rnn_tanh.input, STATE, 1),
    layer(aten.rnn_relu.input, STATE, 1, 0.08, LAST),
    cell(aten.lstm_cell.default, [CELL_STATE, CELL_STATE], 4),
    cell(aten.gru_cell.default, CELL_STATE, 3),
    cell(aten.rnn_tanh_cell.default, CELL_STATE, 1),
    cell(aten.rnn_relu_cell.default, CELL_STATE, 1),
]
