"""Torpor: durable sessions for AI agents."""

__version__ = "0.1.0"
