"""Cases of the ops that move entries."""

import torch
from rule_cases.operands import LINE, MAP, MORE_TOKENS, TOKENS

from gainstage.testing import RuleCase, constant, correlated, entries

aten = torch.ops.aten
WIDE = correlated((4, 6, 12), mean=0.3, shares={(0, 1): 0.2, (2,): 0.15})
ONES = correlated((4, 1, 5), mean=0.3, shares={(0,): 0.2, (2,): 0.15})
PAIR = correlated((4, 2, 5), mean=-0.2, shares={(0,): 0.3, (1, 2): 0.1})
EDGES = correlated((4, 3, 5), mean=-0.2, shares={(0,): 0.3, (1, 2): 0.1})
NOTHING = constant(torch.zeros(4, 6, 5, dtype=torch.float64))
ALONG = torch.tensor([4, 0, 4])[None, :, None].expand(4, 3, 5)
MATRIX = correlated((6, 5), mean=0.3, shares={(0,): 0.3})
BAGS = torch.tensor([0, 3, 1, 2, 4, 3, 3, 1, 0, 2, 1, 4])
INDEX = torch.tensor([[0, 2, 2], [5, 0, 2]])
PLACES = (torch.arange(60).reshape(4, 3, 5) ** 2) % 6

MASK = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1]]).bool()
MORE_ROWS = correlated((4, 3, 5), mean=-0.2, shares={(0,): 0.3, (1, 2): 0.1})

WHERE = "which row is put where is averaged over"
CUTS = "a view that cuts across two axes takes all entries of the tensor for exchangeable"

CASES = [
    RuleCase(op=aten.view.default, args=(WIDE, [4, 6, 3, 4])),
    RuleCase(op=aten.view.default, args=(WIDE, [24, 12])),
    RuleCase(op=aten.reshape.default, args=(WIDE, [4, 8, 9]), model_error=0.12, reason=CUTS),
    RuleCase(op=aten.reshape.default, args=(WIDE, [2, 12, 12])),
    RuleCase(op=aten._unsafe_view.default, args=(WIDE, [4, 72])),
    RuleCase(op=aten.flatten.using_ints, args=(MAP, 1)),
    RuleCase(op=aten.unflatten.int, args=(WIDE, 2, [2, 6])),
    RuleCase(op=aten.unsqueeze.default, args=(TOKENS, -2)),
    RuleCase(op=aten.squeeze.default, args=(ONES,)),
    RuleCase(op=aten.squeeze.dim, args=(ONES, 1)),
    RuleCase(op=aten.squeeze.dims, args=(ONES, [1, 2])),
    RuleCase(op=aten.view_as.default, args=(WIDE, entries(4, 6, 2, 6))),
    RuleCase(op=aten.reshape_as.default, args=(WIDE, entries(24, 12))),
    RuleCase(op=aten.permute.default, args=(TOKENS, [2, 0, 1])),
    RuleCase(op=aten.transpose.int, args=(TOKENS, 1, -1)),
    RuleCase(op=aten.t.default, args=(MATRIX,)),
    RuleCase(op=aten.numpy_T.default, args=(TOKENS,)),
    *(RuleCase(op=op, args=(TOKENS,)) for op in (aten.mT.default, aten.mH.default, aten.adjoint.default)),
    RuleCase(op=aten.movedim.int, args=(TOKENS, -1, 1)),
    RuleCase(op=aten.movedim.int, args=(TOKENS, 0, -1)),
    RuleCase(op=aten.expand.default, args=(ONES, [3, 4, 6, -1])),
    RuleCase(op=aten.expand_as.default, args=(ONES, TOKENS)),
    RuleCase(op=aten.repeat.default, args=(TOKENS, [2, 1, 3, 2])),
    RuleCase(op=aten.repeat_interleave.self_int, args=(TOKENS, 3, 1)),
    RuleCase(op=aten.repeat_interleave.self_int, args=(MATRIX, 2)),
    RuleCase(op=aten.slice.Tensor, args=(TOKENS, 1, 1, 5)),
    RuleCase(op=aten.slice.Tensor, args=(TOKENS, -1, 0, 9223372036854775807, 2)),
    RuleCase(op=aten.slice.Tensor, args=(TOKENS, 1, -1, 9223372036854775807)),
    RuleCase(op=aten.narrow.default, args=(TOKENS, 1, 2, 3)),
    RuleCase(op=aten.select.int, args=(TOKENS, 1, -2)),
    RuleCase(op=aten.chunk.default, args=(WIDE, 5, 2)),
    RuleCase(op=aten.split.Tensor, args=(WIDE, 5, -1)),
    RuleCase(op=aten.split.sizes, args=(WIDE, [3, 9], 2)),
    RuleCase(op=aten.split_with_sizes.default, args=(WIDE, [2, 4], 1)),
    RuleCase(op=aten.tensor_split.sections, args=(WIDE, 5, 2)),
    RuleCase(op=aten.unbind.int, args=(TOKENS, -1)),
    RuleCase(op=aten.cat.default, args=([TOKENS, WIDE, MORE_TOKENS], -1)),
    RuleCase(op=aten.cat.default, args=([TOKENS, TOKENS], 1)),
    RuleCase(op=aten.concat.default, args=([TOKENS, ONES], 1)),
    RuleCase(op=aten.stack.default, args=([TOKENS, TOKENS], 1)),
    RuleCase(op=aten.concatenate.default, args=([TOKENS, MORE_TOKENS], 0)),
    RuleCase(op=aten.slice_scatter.default, args=(TOKENS, PAIR, 1, 1, 3)),
    RuleCase(op=aten.slice_scatter.default, args=(entries(4, 6, 5, mean=0.3), PAIR, 1, 2, 4)),  # nothing in common
    RuleCase(op=aten.slice_scatter.default, args=(TOKENS, PAIR, 1, 1, 5, 2)),
    RuleCase(op=aten.index_put.default, args=(TOKENS, [None, constant(torch.tensor([1, 4])), None], PAIR)),
    RuleCase(op=aten.index_put.default, args=(TOKENS, [constant(MASK)], entries(5))),
    RuleCase(op=aten.index_put.default, args=(TOKENS, [constant(MASK)], entries(9, 5, mean=0.5)), model_error=0.02, reason=WHERE),
    RuleCase(op=aten.index_put.default, args=(TOKENS, [constant(MASK)], constant(torch.tensor(0.5)))),
    RuleCase(
        op=aten.index_put.default,
        args=(TOKENS, [None, constant(PLACES[0, 0]), constant(torch.arange(5))], entries(5)),
        model_error=0.02,
        reason=WHERE,
    ),
    RuleCase(op=aten.index_put.default, args=(TOKENS, [None, constant(torch.tensor([1, 4, 1]))], MORE_ROWS, True)),
    RuleCase(op=aten.index_add.default, args=(TOKENS, 1, constant(torch.tensor([1, 4, 1])), MORE_ROWS), kwargs={"alpha": 0.5}),
    RuleCase(
        op=aten.masked_scatter.default,
        args=(TOKENS, constant(MASK[..., None]), entries(12, 5, mean=0.5)),
        model_error=0.02,
        reason=WHERE,
    ),
    RuleCase(op=aten.scatter_add.default, args=(TOKENS, 1, constant(ALONG), EDGES)),
    RuleCase(op=aten.scatter_reduce.two, args=(TOKENS, 1, constant(ALONG), EDGES, "mean")),
    RuleCase(
        op=aten.scatter_reduce.two,
        args=(NOTHING, 1, constant(ALONG), EDGES, "mean"),
        kwargs={"include_self": False},
        shape_error=0.15,
        reason="means that differ from place to place are taken for a wider distribution",
    ),
    RuleCase(op=aten.select_scatter.default, args=(TOKENS, MATRIX, 0, -1)),
    RuleCase(op=aten.swapaxes.default, args=(TOKENS, 0, 2)),
    RuleCase(op=aten.swapdims.default, args=(TOKENS, 1, 2)),
    RuleCase(op=aten.broadcast_to.default, args=(ONES, [4, 6, 5])),
    RuleCase(op=aten.broadcast_tensors.default, args=([ONES, MORE_TOKENS],)),
    RuleCase(op=aten.tile.default, args=(TOKENS, [2, 1])),
    RuleCase(op=aten.tril.default, args=(TOKENS, 1)),
    RuleCase(op=aten.triu.default, args=(TOKENS, 1)),
    RuleCase(op=aten.stack.default, args=([TOKENS, MORE_TOKENS], 1)),
    RuleCase(op=aten.roll.default, args=(MAP, [2, -1], [2, 3])),
    RuleCase(op=aten.flip.default, args=(TOKENS, [1, 2])),
    RuleCase(op=aten.pad.default, args=(LINE, [2, 1])),
    RuleCase(op=aten.pad.default, args=(MAP, [2, 1, 0, 3])),
    RuleCase(op=aten.pad.default, args=(MAP, [1, 2, 1, 1], "reflect", None)),
    RuleCase(op=aten.pad.default, args=(MAP, [1, 2, 1, 1], "replicate")),
    RuleCase(op=aten.pad.default, args=(MAP, [-1, 2, 1, -2])),
    RuleCase(op=aten.pad.default, args=(TOKENS, [1, 1, 2, 0], "constant", 1.5)),
    RuleCase(op=aten.embedding.default, args=(MATRIX, constant(INDEX))),
    RuleCase(op=aten.embedding_bag.default, args=(MATRIX, constant(BAGS), constant(torch.arange(0, 12, 3)))),
    RuleCase(op=aten.embedding_bag.default, args=(MATRIX, constant(BAGS), constant(torch.arange(0, 12, 3)), False, 1)),
    RuleCase(
        op=aten.embedding_bag.default,
        args=(MATRIX, constant(BAGS), constant(torch.tensor([0, 2, 5, 6, 12])), False, 1, False, None, True),
    ),
    RuleCase(
        op=aten.embedding_bag.padding_idx,
        args=(MATRIX, constant(BAGS), constant(torch.arange(0, 12, 3)), False, 0, False, entries(12, mean=0.5), False, None),
        model_error=0.03,
        shape_error=0.13,
        reason="rows that two bags have in common are averaged over; sums of three products have more of the extremes",
    ),
    RuleCase(
        op=aten.embedding_bag.padding_idx,
        args=(MATRIX, constant(BAGS), constant(torch.tensor([0, 2, 5, 8])), False, 0, False, None, False, 3),
        shape_error=0.1,
        reason="sums of different numbers of rows are spread as much as one is, on average",
    ),
    RuleCase(op=aten.index_select.default, args=(TOKENS, 1, constant(INDEX[0]))),
    RuleCase(op=aten.index_select.default, args=(TOKENS, 1, constant(torch.tensor([3, 1, 0, 5, 2, 4])))),
    RuleCase(op=aten.unfold.default, args=(TOKENS, 1, 3, 1)),
    RuleCase(op=aten.unfold.default, args=(TOKENS, -2, 4, 2)),
    RuleCase(op=aten.unfold.default, args=(TOKENS, 2, 2, 2)),
    RuleCase(op=aten.index.Tensor, args=(TOKENS, [None, constant(INDEX)])),
    RuleCase(op=aten.index.Tensor, args=(TOKENS, [constant(torch.tensor([[0], [1]])), constant(INDEX)])),
    RuleCase(op=aten.index.Tensor, args=(TOKENS, [constant(torch.tensor([True, False, True, True]))])),
    RuleCase(op=aten.index.Tensor, args=(TOKENS, [constant(INDEX % 4), None, constant(INDEX % 5)])),
    RuleCase(op=aten.index.Tensor, args=(TOKENS, [None, constant(INDEX[:, :1]), constant(INDEX % 5 - 5)])),
    RuleCase(op=aten._unsafe_index.Tensor, args=(TOKENS, [None, constant(INDEX), None])),
    RuleCase(op=aten.gather.default, args=(TOKENS, 1, constant(PLACES))),
    RuleCase(op=aten.gather.default, args=(TOKENS, -1, constant(PLACES[:, :3, :2] % 5))),
    RuleCase(op=aten.take_along_dim.default, args=(TOKENS, constant(PLACES[:1, :2]), 1)),
]
