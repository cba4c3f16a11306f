"""EnvPool's environments behind the one contract: many in one process, stepped by threads of their own."""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from numpy import ndarray

from rlfeed.envs.autoreset import Ready
from rlfeed.envs.gym_vector import VectorEnvs
from rlfeed.envs.seeds import episode_seed
from rlfeed.errors import ConfigError, EnvMakeError, EnvNotFoundError, UnsupportedError, suggest

_OURS = ("num_envs", "batch_size", "seed", "env_seed", "max_num_players", "gym_reset_return_info", "base_path")


class EnvPoolEnvs(VectorEnvs):
    """Speak the contract for an environment of EnvPool's Gymnasium interface.

    It resets itself in the step after an end, which is none. Where a time limit and a termination fall together it
    tells of the truncation only. Its seeds are set when it is made: one that `make_envs` makes is made anew at every
    reset, so that rollouts of one seed are alike; one made elsewhere keeps its own.

    Args:
        pool: What ``envpool.make_gymnasium`` gives, also in Gymnasium's vector wrappers.
        name: What to call it in errors.
        make: Makes the pool anew with a seed for each environment.
        first_env_id: The number of the first one; episodes have their seeds by it.

    Raises:
        UnsupportedError: If the pool is asynchronous, or its environments have several players.
        SpaceError: If its observation space cannot be stored.
    """

    def __init__(
        self,
        pool: VectorEnv,
        name: str | None = None,
        *,
        make: Callable[[Sequence[int]], VectorEnv] | None = None,
        first_env_id: int = 0,
    ) -> None:
        base: Any = pool.unwrapped
        players = base.config.get("max_num_players", 1)
        if players > 1:
            raise UnsupportedError(
                f"{name or type(base).__name__}: its environments have up to {players} players; expected one "
                "row for each environment. Use a task of one player."
            )
        _declare(pool)
        super().__init__(pool, name, observation_space=_mended(pool.single_observation_space))
        self._make, self._first = make, first_env_id

    def reset(self, seed: int, first_episodes: Sequence[int]) -> Ready:
        """Begin an episode in every environment. See `Envs`."""
        if self._make is not None:
            self._envs.close()
            seeds = [episode_seed(seed, self._first + row, int(n)) for row, n in enumerate(first_episodes)]
            self._envs = self._base = self._make(seeds)
        return super().reset(seed, first_episodes)

    def _seeds(self, rows: ndarray) -> None:
        """Give none: a pool warns of seeds at a reset."""


def is_envpool(envs: Any) -> bool:
    """Tell whether something is an environment of EnvPool, without importing it.

    Args:
        envs: Anything.

    Returns:
        True for EnvPool's Gymnasium interface, also in vector wrappers.
    """
    base = getattr(envs, "unwrapped", envs)
    return isinstance(envs, VectorEnv) and hasattr(base, "async_reset") and hasattr(base, "all_env_ids")


def make_envpool(task: str, num_envs: int, kwargs: Mapping[str, Any], first_env_id: int = 0) -> EnvPoolEnvs:
    """Make environments of EnvPool.

    Args:
        task: EnvPool's name of the task, such as ``CartPole-v1``.
        num_envs: How many.
        kwargs: The task's own settings, such as ``max_episode_steps``, and ``num_threads``.
        first_env_id: The number of the first one.

    Returns:
        The environments.

    Raises:
        EnvNotFoundError: If EnvPool is not installed, or has no such task.
        ConfigError: If a setting is unknown, or one that rlfeed decides.
        EnvMakeError: If EnvPool cannot make them.
    """
    try:
        envpool: Any = importlib.import_module("envpool")
    except ImportError as error:
        raise EnvNotFoundError(
            f"envpool:{task}: EnvPool cannot be imported ({error}); expected it to be installed. "
            "Run pip install 'rlfeed[envpool]'."
        ) from None
    known_tasks = envpool.list_all_envs()
    if task not in known_tasks:
        raise EnvNotFoundError(f"envpool:{task}: EnvPool has no such task.{suggest(task, known_tasks)}")
    known = [key for key in envpool.make_spec(task).config._fields if key not in _OURS]
    if unknown := [key for key in kwargs if key not in known]:
        hints = "".join(suggest(key, known) for key in unknown)
        raise ConfigError(f"envpool:{task}: has no setting {', '.join(unknown)}; expected some of {known}.{hints}")

    def make(seeds: Sequence[int]) -> VectorEnv:
        pool = envpool.make_gymnasium(task, num_envs=num_envs, seed=list(seeds), **kwargs)
        _declare(pool)
        return pool

    try:
        return EnvPoolEnvs(make(range(num_envs)), f"envpool:{task}", make=make, first_env_id=first_env_id)
    except (RuntimeError, TypeError, ValueError) as error:
        raise EnvMakeError(
            f"envpool:{task}: EnvPool raised {type(error).__name__}: {error}; expected an environment. Mend the "
            f"arguments {dict(kwargs)}."
        ) from error


def _declare(pool: VectorEnv) -> None:
    """Let a pool make its spaces, which it does when they are first asked for, and keeps, without its warnings."""
    with warnings.catch_warnings():  # it declares float32 in float64
        warnings.filterwarnings("ignore", message=".*precision lowered by casting")
        _ = pool.single_observation_space, pool.single_action_space


def _mended(space: Any) -> Any:
    """Open the bounds that mean none: some tasks say that their floats are at least the smallest positive one."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _mended(part) for key, part in space.spaces.items()})
    if not isinstance(space, spaces.Box) or space.dtype is None or space.dtype.kind != "f":
        return space
    limits = np.finfo(space.dtype)
    low = np.where((space.low == limits.tiny) | (space.low == limits.min), -np.inf, space.low)
    high = np.where(space.high == limits.max, np.inf, space.high)
    return spaces.Box(low.astype(space.dtype), high.astype(space.dtype), dtype=space.dtype.type)
