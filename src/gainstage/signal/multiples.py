"""Gradients that are one another's multiples: what comes of one on its way back is known from the other."""

from __future__ import annotations

from dataclasses import MISSING, fields

import numpy as np

from gainstage.signal.value import Value

_ROUNDING = 1e-12

# What no second moment depends on behind products with slopes, averages and movements: names, and how draws stray.
_APART = frozenset(
    {"dims", "mean", "table", "marginal", "rho", "source", "amplitude", "lineage", "stray", "overlap", "uneven", "read"}
)


def is_multiple(g: Value, other: Value) -> bool:
    """Tell whether the tables of two Gaussian gradients of one tensor are proportional, and nothing else is known of either."""
    sizes, others = ([[axis.size for axis in dim] for dim in value.dims] for value in (g, other))
    if sizes != others or g.mean != 0.0 or other.mean != 0.0 or min(g.second_moment, other.second_moment) <= 0.0:
        return False
    if not all(value.marginal.is_gaussian and _is_plain(value) for value in (g, other)):
        return False
    return bool(np.abs(g.table / g.second_moment - other.table / other.second_moment).max() <= _ROUNDING)


def _is_plain(value: Value) -> bool:
    pairs = ((getattr(value, name), default) for name, default in _PLAIN)
    return all(own is default or (isinstance(default, (int, float)) and own == default) for own, default in pairs)


_PLAIN = tuple((f.name, f.default) for f in fields(Value) if f.init and f.default is not MISSING and f.name not in _APART)
