"""Operations by what they do to a signal's level, by names without namespace and overload: one fact for all forms of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload

from gainstage.graph.model import Node, Ref

RESHAPING = frozenset({
    "view", "_unsafe_view", "reshape", "view_as", "reshape_as", "_reshape_alias", "transpose", "swapaxes", "permute", "movedim",
    "broadcast_tensors",
    "t", "numpy_T", "mT", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "tile",
    "repeat_interleave", "contiguous", "clone", "alias", "detach", "to", "_to_copy", "type_as", "float", "half", "bfloat16",
    "lift_fresh", "lift_fresh_copy", "roll", "flip", "pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "col2im", "im2col", "real",
})  # fmt: skip
SELECTING = frozenset({
    "slice", "select", "narrow", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "getitem", "index",
    "index_select", "gather", "take_along_dim", "unfold", "as_strided", "diagonal", "tril", "triu", "masked_select",
})  # fmt: skip
MOVEMENT = RESHAPING | SELECTING
UNCHANGED = frozenset({"alias", "detach", "contiguous", "clone", "lift_fresh", "to", "_to_copy", "type_as"})  # of RESHAPING
INDEXED = frozenset({"index", "_unsafe_index"})
GATHERS = INDEXED | {"gather", "index_select", "take_along_dim"}
CHOICES = frozenset({"multinomial", "bernoulli", "binomial", "poisson"})  # drawn by chances that the operand gives
# The result has the shape of the first operand.
INTO = frozenset({
    "index_put", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "masked_scatter",
})  # fmt: skip
# Operations of which only so many operands give values; the others lend their shape or type.
MODELS_ONLY: Mapping[str, int] = {
    **dict.fromkeys(("type_as", "view_as", "reshape_as", "expand_as"), 1),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"), 0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), 0),
}
NOISE = frozenset({
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout", "rrelu_noise",
})  # fmt: skip
POOLING = frozenset({
    "mean", "sum", "nansum", "cumsum", "amax", "amin", "max", "min", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "max_pool1d", "max_pool2d",
    "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool2d_with_indices",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_linear1d", "upsample_trilinear3d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "grid_sampler",
    "grid_sampler_2d", "lp_pool2d",
})  # fmt: skip
SOFTMAX = frozenset({"softmax", "_softmax"})
BOUNDED = SOFTMAX | {"sigmoid", "hardsigmoid", "tanh", "hardtanh", "sin", "cos", "log_softmax", "_log_softmax", "sign", "erf"}
EXPONENTIALS = frozenset({"exp", "exp2", "expm1"})
PROBABILITY = frozenset({"softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "log_sigmoid", "logsigmoid", "tanh"})
NORMS: Mapping[str, tuple[int, int | None]] = {  # places of scale and shift among the arguments
    "layer_norm": (2, 3),
    "native_layer_norm": (2, 3),
    "rms_norm": (2, None),
    "_fused_rms_norm": (2, None),
    "group_norm": (2, 3),
    "native_group_norm": (1, 2),
    "batch_norm": (1, 2),
    "native_batch_norm": (1, 2),
    "cudnn_batch_norm": (1, 2),
    "_native_batch_norm_legit": (1, 2),
    "_native_batch_norm_legit_functional": (1, 2),
    "instance_norm": (1, 2),
    "local_response_norm": (9, None),
}
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"})
LOOKUP = frozenset({"embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"})
ROW_READS = LOOKUP | GATHERS
ATTENTION = frozenset({
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math", "_scaled_dot_product_cudnn_attention",
})  # fmt: skip
LOSSES = frozenset({
    "cross_entropy_loss", "nll_loss", "nll_loss2d", "nll_loss_nd", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss",
    "kl_div",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "poisson_nll_loss", "gaussian_nll_loss", "multi_margin_loss",
    "soft_margin_loss", "hinge_embedding_loss",
})  # fmt: skip
JOINING = frozenset({
    "cat", "concat", "stack", "hstack", "vstack", "slice_scatter", "select_scatter", "index_put", "index_add", "index_copy",
    "scatter", "scatter_add", "masked_scatter", "where", "masked_fill",
})  # fmt: skip
CONCATENATION = frozenset({"cat", "concat", "hstack"})
PICKING = frozenset({"topk", "sort", "argsort", "argmax", "max"})
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution", "_convolution"})
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
CONVOLUTIONS = _CONVOLUTIONS | _TRANSPOSED
LAYERS = CONVOLUTIONS | {"linear"}  # products of an input and a weight, in this order, and a bias
PRODUCTS = frozenset(
    {"matmul", "mm", "_sparse_mm", "bmm", "mv", "dot", "vdot", "baddbmm", "addbmm", "einsum"}
)  # either operand may be the weight
_PLACES: Mapping[str, tuple[int, int, int | None]] = {  # places of data, weight and bias
    **dict.fromkeys(LAYERS, (0, 1, 2)),
    "addmm": (1, 2, 0),
    "addmv": (2, 1, 0),
    "baddbmm": (1, 2, 0),
    "addbmm": (1, 2, 0),
    **dict.fromkeys(
        ("matmul", "mm", "_sparse_mm", "bmm", "mv", "dot", "vdot", "_grouped_mm", "grouped_mm", "grouped_mm_fallback"),
        (0, 1, None),
    ),
}
# The weight is known by its place even where data come from parameters too.
PLACED = frozenset(_PLACES) - PRODUCTS
CONTRACTIONS = frozenset(_PLACES) | {"einsum", "bilinear", "_trilinear"}


@dataclass(frozen=True, slots=True)
class Places:
    """Which nodes a contraction contracts, and the bias that it adds."""

    first: str
    second: str
    bias: str | None = None


def argument(node: Node, place: int) -> Any:
    """Argument by its place in the schema, given by position or by name; None where it is left out."""
    if place < len(node.args):
        return node.args[place]
    if isinstance(node.op, OpOverload) and place < len(node.op._schema.arguments):
        return node.kwargs.get(node.op._schema.arguments[place].name)
    return None


def operand(node: Node, place: int | None) -> str | None:
    """Name of the node at this place of the arguments, if one is there."""
    given = None if place is None else argument(node, place)
    return given.name if isinstance(given, Ref) else None


def places(node: Node) -> Places | None:
    """Data and weight of a contraction, by their places; None for other operations and for products of three and more."""
    name = node.short_name
    if name == "einsum":
        factors = argument(node, 1)
        if len(factors) != 2:
            return None
        return Places(factors[0].name, factors[1].name)
    if name not in _PLACES:
        return None
    data, weight, bias = (operand(node, place) for place in _PLACES[name])
    return None if data is None or weight is None else Places(data, weight, bias)


def is_transposed(node: Node) -> bool:
    """Tell whether a convolution is transposed: its weight is [in, out / groups, ...]."""
    name = node.short_name
    return name in _TRANSPOSED or (name in ("convolution", "_convolution") and bool(argument(node, 6)))


def groups_of(node: Node) -> int:
    """Number of groups of a convolution."""
    given = argument(node, 8 if node.short_name in ("convolution", "_convolution") else 6)
    return 1 if given is None else int(given)
