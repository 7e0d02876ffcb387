"""The command line. Importing it imports click and nothing heavier: commands import what they need when they run."""

from __future__ import annotations

from gainstage.cli.commands import main

__all__ = ["main"]
