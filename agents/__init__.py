"""Agents: one file each, read from top to bottom, built on the library; and their presets by name."""

from agents.dqn import dqn, rainbow
from agents.r2d2 import r2d2

PRESETS = {"dqn": dqn, "r2d2": r2d2, "rainbow": rainbow}

__all__ = ["PRESETS", "dqn", "r2d2", "rainbow"]
