"""Agents: one file each, read from top to bottom, built on the library; and their presets by name."""

from collections.abc import Callable

from agents.config import TrainConfig
from agents.dqn import dqn

PRESETS: dict[str, Callable[[], TrainConfig]] = {"dqn": dqn}

__all__ = ["PRESETS"]
