"""Backward rules: what each operation does to the statistics of gradients. Public: importing registers those of Gainstage."""

from gainstage.rules.backward import attention, elementwise, indexing, linear, loss, reduction, shapes
from gainstage.rules.backward.elementwise import times_slope
from gainstage.rules.backward.registry import BackwardCall, BackwardRule, Gradient, backward, backward_rules
from gainstage.rules.backward.sums import zeros

__all__ = [
    "BackwardCall",
    "BackwardRule",
    "Gradient",
    "attention",
    "backward",
    "backward_rules",
    "elementwise",
    "indexing",
    "linear",
    "loss",
    "reduction",
    "shapes",
    "times_slope",
    "zeros",
]
