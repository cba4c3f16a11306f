"""Agents: one file each, read from top to bottom, built on the library; and their presets by name."""

from agents.dqn import dqn, rainbow

PRESETS = {"dqn": dqn, "rainbow": rainbow}

__all__ = ["PRESETS", "dqn", "rainbow"]
