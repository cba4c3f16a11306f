"""Packages that register environments when they are imported, and which ids are theirs."""

import importlib.util
from dataclasses import dataclass

import gymnasium

from rlfeed.errors import suggest


@dataclass(frozen=True, slots=True)
class _Package:
    prefix: str  # of its ids
    module: str  # importing it registers them
    install: str


_PACKAGES = (
    _Package("ALE/", "ale_py", "ale-py"),
    _Package("MiniGrid-", "minigrid", "minigrid"),
    _Package("BabyAI-", "minigrid", "minigrid"),
    _Package("dm_control/", "shimmy", "'shimmy[dm-control]'"),
    _Package("Meta-World/", "metaworld", "metaworld"),
    _Package("Fetch", "gymnasium_robotics", "gymnasium-robotics"),
    _Package("PointMaze_", "gymnasium_robotics", "gymnasium-robotics"),
    _Package("AntMaze_", "gymnasium_robotics", "gymnasium-robotics"),
    _Package("Adroit", "gymnasium_robotics", "gymnasium-robotics"),
    _Package("HandManipulate", "gymnasium_robotics", "gymnasium-robotics"),
    _Package("FrankaKitchen-", "gymnasium_robotics", "gymnasium-robotics"),
    _Package("highway-", "highway_env", "highway-env"),
    _Package("popgym-", "popgym", "popgym"),
    _Package("Vizdoom", "vizdoom.gymnasium_wrapper", "vizdoom"),
)
_MINATAR = (
    " MinAtar registers nothing by itself: pip install MinAtar, write a file with `import minatar.gym` and "
    "`minatar.gym.register_envs()`, and name it as path/to/file.py:{id}."
)


def how_to_get(env_id: str, error: Exception) -> str:
    """Say where an environment that nobody has registered may come from.

    Args:
        env_id: Its id.
        error: What Gymnasium said.

    Returns:
        A sentence with a leading space: the package to install or to import, the nearest ids, or Gymnasium's words.
    """
    if env_id.startswith("MinAtar/"):
        return _MINATAR.format(id=env_id)
    for package in _PACKAGES:
        if env_id.startswith(package.prefix):
            present = importlib.util.find_spec(package.module.partition(".")[0]) is not None
            install = "" if present else f"Install it with pip install {package.install}, then write "
            said = f"{install or 'Write '}{package.module}:{env_id}, so that it is imported first."
            return f" Ids of {package.prefix}... are registered by the package {package.module}. {said}"
    return suggest(env_id, gymnasium.registry) or f" Gymnasium says: {error}"
