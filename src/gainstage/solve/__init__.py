"""From targets to distributions: the forward interpreter, with the parameters decided on the way."""

from gainstage.solve.attention import attention_signals
from gainstage.solve.determinant import find_determinant
from gainstage.solve.distributions import find_family
from gainstage.solve.initial import Present
from gainstage.solve.passage import find_balance
from gainstage.solve.planned import planned_values
from gainstage.solve.solve import solve

__all__ = ["Present", "attention_signals", "find_balance", "find_determinant", "find_family", "planned_values", "solve"]
