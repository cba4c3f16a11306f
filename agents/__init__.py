"""Agents: one file each, read from top to bottom, built on the library; and their presets by name."""

from agents.dqn import dqn

PRESETS = {"dqn": dqn}

__all__ = ["PRESETS", "dqn"]
