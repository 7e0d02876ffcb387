"""The abstract value of a tensor, and its algebra. Knows tensors' shapes and Gaussians; no graph, no operations of torch."""

from gainstage.signal.attention import participation, softmax
from gainstage.signal.contraction import contract, convolve
from gainstage.signal.filters import filter_dim, normalise
from gainstage.signal.gather import lookup
from gainstage.signal.linear import affine, cross_table, dropout, mean_over
from gainstage.signal.maxima import max_over
from gainstage.signal.movement import expand, join, permute, reorder, reshape, select, take
from gainstage.signal.pointwise import apply, combine
from gainstage.signal.value import Value, coins, gaussian, independent, known, measured

__all__ = [
    "Value",
    "affine",
    "apply",
    "coins",
    "combine",
    "contract",
    "convolve",
    "cross_table",
    "dropout",
    "expand",
    "filter_dim",
    "gaussian",
    "independent",
    "join",
    "known",
    "lookup",
    "max_over",
    "mean_over",
    "measured",
    "normalise",
    "participation",
    "permute",
    "reorder",
    "reshape",
    "select",
    "softmax",
    "take",
]
