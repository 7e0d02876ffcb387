"""What every parameter is for, read off the graph: never off its name."""

from gainstage.roles.beside import branches_beside
from gainstage.roles.infer import infer_roles
from gainstage.roles.model import CONTRACTED, Branch, Head, LogDeterminant, Logits, Merge, Role, Roles, Setter, Stream, Use
from gainstage.roles.tables import is_data

__all__ = [
    "CONTRACTED",
    "Branch",
    "Head",
    "LogDeterminant",
    "Logits",
    "Merge",
    "Role",
    "Roles",
    "Setter",
    "Stream",
    "Use",
    "branches_beside",
    "infer_roles",
    "is_data",
]
