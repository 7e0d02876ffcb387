"""Rules: what each operation does to the statistics of its operands. Public: this is the place to add an op.

Importing this package registers the rules that come with Gainstage.
"""

from gainstage.rules import attention, elementwise, indexing, linear, normalization, random, reduction, shapes
from gainstage.rules.registry import Call, Rule, is_free, pointwise, rule, rules, statistics_free

__all__ = [
    "Call",
    "Rule",
    "attention",
    "elementwise",
    "indexing",
    "is_free",
    "linear",
    "normalization",
    "pointwise",
    "random",
    "reduction",
    "rule",
    "rules",
    "shapes",
    "statistics_free",
]
