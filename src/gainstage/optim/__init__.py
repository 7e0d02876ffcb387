"""Learning rates: the first update of every optimizer, and the parameter groups that make it the same fraction everywhere."""

from gainstage.optim.first import FirstUpdate, Start
from gainstage.optim.groups import param_groups
from gainstage.optim.laws import LAWS, find_law

__all__ = ["LAWS", "FirstUpdate", "Start", "find_law", "param_groups"]
