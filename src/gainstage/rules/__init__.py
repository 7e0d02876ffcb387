"""Rules: what each operation does to the statistics of its operands. Public: this is the place to add an op.

Importing this package registers the rules that come with Gainstage.
"""

from gainstage.rules import (
    attention,
    conditions,
    elementwise,
    experts,
    indexing,
    linear,
    normalization,
    placing,
    random,
    recurrent,
    reduction,
    scatter,
    shapes,
)
from gainstage.rules.registry import (
    Call,
    Rule,
    foreign_rule,
    is_free,
    is_pointwise,
    pointwise,
    rule,
    rule_of,
    rules,
    statistics_free,
)

__all__ = [
    "Call",
    "Rule",
    "attention",
    "conditions",
    "elementwise",
    "experts",
    "foreign_rule",
    "indexing",
    "is_free",
    "is_pointwise",
    "linear",
    "normalization",
    "placing",
    "pointwise",
    "random",
    "recurrent",
    "reduction",
    "rule",
    "rule_of",
    "rules",
    "scatter",
    "shapes",
    "statistics_free",
]
