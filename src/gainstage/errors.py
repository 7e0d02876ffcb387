"""Every way in which Gainstage refuses: one exception per situation.

All derive from :class:`GainstageError`, so that ``except gs.GainstageError`` catches what is ours and nothing else.
A message says what happened, where (operation, module path, the user's own line) and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class GainstageError(Exception):
    """Base of everything that Gainstage raises on purpose."""


class CaptureError(GainstageError):
    """The model could not be turned into a graph; ``line`` is the user's, where known."""

    def __init__(self, reason: str, line: str = "") -> None:
        super().__init__(f"{reason} The line: {line}" if line else reason)
        self.reason = reason.rstrip(".")
        self.line = line


class NoSignalError(GainstageError):
    """There is no floating-point value to follow from an input or a parameter to an output."""


class UnsupportedOpError(GainstageError):
    """Operations without a rule; the message names all of them at once."""


class UnsupportedParameterError(GainstageError):
    """A parameter that is quantized, sparse or no floating-point number, or lazy where its values are needed."""


class NonFiniteError(GainstageError):
    """NaN or infinity in a parameter, a buffer or an input."""


class InputError(GainstageError):
    """An argument of a public function does not make sense."""


class UnknownNameError(InputError):
    """A policy, role, parameter or module that does not exist; the message suggests the nearest names."""


class RoleConflictError(GainstageError):
    """One parameter is asked to serve two roles that contradict each other."""


class PlanFormatError(GainstageError):
    """Text that is not a plan, a damaged plan, or one of a schema version that this release cannot read."""


class PlanMismatchError(GainstageError):
    """A plan that was made for another model; the message names the first difference."""


class RankError(GainstageError):
    """The processes that share a model do not agree, or one of them failed or is gone; raised on all of them."""


class RuleError(GainstageError):
    """A rule was registered twice, or returned something that its operation cannot return."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name ends in: ``" (nearest: fc.weight)"``, or nothing where none is like it."""
    close = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""
