"""The demonstration: a network that does not train from its default initialization, read, planned, verified and trained."""

from gainstage.demo.story import run

__all__ = ["run"]
