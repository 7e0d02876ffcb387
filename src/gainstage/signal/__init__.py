"""The abstract value of a tensor, and its algebra. Knows tensors' shapes and Gaussians; no graph, no operations of torch."""

from gainstage.signal.adjoint import (
    across_rows,
    along_rows,
    has_one_length,
    lookup_gradient,
    normalise_gradient,
    to_channels,
    to_reader,
    turned_by,
)
from gainstage.signal.adjoint_given import (
    accumulated,
    along_own,
    along_weight,
    left_by_slope,
    through_slope,
    to_be_summed,
    to_summand,
)
from gainstage.signal.adjoint_maxima import largest_gradient
from gainstage.signal.adjoint_softmax import of_product, softmax_gradient
from gainstage.signal.attention import participation, softmax
from gainstage.signal.contraction import contract, convolve
from gainstage.signal.correlation import convolution_weight_gradient
from gainstage.signal.dropping import dropout
from gainstage.signal.filters import filter_dim, normalise
from gainstage.signal.gather import lookup
from gainstage.signal.joining import join
from gainstage.signal.known import known, measured
from gainstage.signal.linear import affine, mean_over
from gainstage.signal.maxima import max_over
from gainstage.signal.mixture import mixture
from gainstage.signal.movement import expand, permute, reorder, reshape
from gainstage.signal.multiples import is_multiple
from gainstage.signal.pairing import covariance_between, cross_table
from gainstage.signal.pointwise import apply, combine, of_one_latent
from gainstage.signal.selection import gathered, pick
from gainstage.signal.slicing import select, take
from gainstage.signal.slopes import slope
from gainstage.signal.traits import Added
from gainstage.signal.value import Value, coins, gaussian, independent

__all__ = [
    "Added",
    "Value",
    "accumulated",
    "across_rows",
    "affine",
    "along_own",
    "along_rows",
    "along_weight",
    "apply",
    "coins",
    "combine",
    "contract",
    "convolution_weight_gradient",
    "convolve",
    "covariance_between",
    "cross_table",
    "dropout",
    "expand",
    "filter_dim",
    "gathered",
    "gaussian",
    "has_one_length",
    "independent",
    "is_multiple",
    "join",
    "known",
    "largest_gradient",
    "left_by_slope",
    "lookup",
    "lookup_gradient",
    "max_over",
    "mean_over",
    "measured",
    "mixture",
    "normalise",
    "normalise_gradient",
    "of_one_latent",
    "of_product",
    "participation",
    "permute",
    "pick",
    "reorder",
    "reshape",
    "select",
    "slope",
    "softmax",
    "softmax_gradient",
    "take",
    "through_slope",
    "to_be_summed",
    "to_channels",
    "to_reader",
    "to_summand",
    "turned_by",
]
