"""Thin bridges to other libraries, which are imported where they are used."""

from gainstage.integrations.flows import Flow

__all__ = ["Flow"]
