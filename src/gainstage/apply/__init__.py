"""Writing parameters: counter-based random numbers, the families' values, and all-or-nothing writing."""

from gainstage.apply.draw import draw_range
from gainstage.apply.materialize import materialize, param_init_fn
from gainstage.apply.stream import Stream, stream_of
from gainstage.apply.tailor import tailor
from gainstage.apply.write import apply

__all__ = ["Stream", "apply", "draw_range", "materialize", "param_init_fn", "stream_of", "tailor"]
