"""Environments in this process, one after the other: the fastest way for light ones."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from rlfeed.envs.autoreset import Outcome, Ready
from rlfeed.envs.boundary import ObservationCheck, check_flags, check_rewards, stack_masks
from rlfeed.envs.seeds import episode_seed, failed
from rlfeed.errors import ConfigError, EnvContractError
from rlfeed.nest import Nest, leaves, map_nest


class SerialEnvs:
    """Step environments in this process, one after the other.

    Arrays are fresh in every step, so steps may be kept. What the environments return is checked.

    Args:
        envs: At least one environment, all of the same spaces.
        name: What to call them in errors; by default the first one's id or class name.

    Raises:
        ConfigError: If there is none, if one is given twice, or if their spaces differ.
        SpaceError: If the observation space cannot be stored.
    """

    def __init__(self, envs: Sequence[gymnasium.Env], name: str | None = None) -> None:
        if not envs:
            raise ConfigError("SerialEnvs: got no environment; expected at least one.")
        first = envs[0]
        self.name = name or (first.spec.id if first.spec is not None else type(first.unwrapped).__name__)
        self.num_envs = len(envs)
        self.observation_space = first.observation_space
        self.action_space = first.action_space
        check_distinct(self.name, envs)
        self._envs = list(envs)
        self._check = ObservationCheck(self.observation_space)
        self._ids = np.arange(self.num_envs, dtype=np.int64)
        self._ids.flags.writeable = False
        self._seed = 0
        self._episodes = [0] * self.num_envs
        self._clock = 0
        self._began = [0] * self.num_envs  # what the clock showed when the row's episode began
        self._masked = False

    def reset(self, seed: int, first_episodes: Sequence[int]) -> Ready:
        """Begin an episode in every environment.

        Args:
            seed: The run's seed.
            first_episodes: The episodes' numbers, one per environment.

        Returns:
            The first observations, of all environments.
        """
        self._seed, self._episodes = seed, [int(n) for n in first_episodes]
        observations, infos = self._begin(range(self.num_envs))
        self._masked = any("action_mask" in info for info in infos)
        return self._ready(self._check.stack(observations, self._where), infos)

    def step(self, action: Nest) -> Outcome:
        """Take one step in every environment, and begin new episodes where one ended.

        Args:
            action: ``[N, ...]`` per leaf.

        Returns:
            What became of it, and what to act on next.
        """
        self._clock += 1
        results = []
        for env, act in zip(self._envs, split_rows(action), strict=True):
            try:
                results.append(env.step(act))
            except Exception as error:
                raise failed(self._place(len(results)), f"step({act!r})", error) from error
        try:
            observations, rewards, terminated, truncated, infos = zip(*results, strict=True)
        except (TypeError, ValueError):
            raise self._wrong_results(results) from None
        reward = check_rewards(rewards, self._where)
        terminations = check_flags("terminated", terminated, self._where)
        truncations = check_flags("truncated", truncated, self._where)
        successor = observation = self._check.stack(observations, self._where)
        if True in terminated or True in truncated:
            rows = [row for row in range(self.num_envs) if terminated[row] or truncated[row]]
            observation, infos = self._with_firsts(successor, list(infos), rows)
        return Outcome(successor, reward, terminations, truncations, self._ready(observation, infos))

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs:
            env.close()

    def _ready(self, observation: Nest, infos: Sequence[Any]) -> Ready:
        if not self._masked:
            return Ready(self._ids, observation)
        masks = [info.get("action_mask") for info in infos]
        return Ready(self._ids, observation, stack_masks(masks, self.action_space, self._where))

    def _with_firsts(self, successor: Nest, infos: list[Any], rows: list[int]) -> tuple[Nest, list[Any]]:
        for row in rows:
            self._episodes[row] += 1
        firsts, first_infos = self._begin(rows)
        stacked = self._check.stack(firsts, lambda i: self._where(rows[i]))
        observation = map_nest(np.copy, successor)
        for (_, target), (_, part) in zip(leaves(observation), leaves(stacked), strict=True):
            target[rows] = part
        for row, info in zip(rows, first_infos, strict=True):
            infos[row] = info
        return observation, infos

    def _begin(self, rows: Sequence[int]) -> tuple[list[Any], list[Any]]:
        observations, infos = [], []
        for row in rows:
            self._began[row] = self._clock
            seed = episode_seed(self._seed, row, self._episodes[row])
            try:
                result = self._envs[row].reset(seed=seed)
            except Exception as error:
                raise failed(self._where(row), f"reset(seed={seed})", error) from error
            if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
                raise EnvContractError(
                    f"{self._where(row)}: reset() returned {_outline(result)}; expected the pair (observation, info), "
                    "info a dict. Return both."
                )
            observations.append(result[0])
            infos.append(result[1])
        return observations, infos

    def _where(self, row: int) -> str:
        step = self._clock - self._began[row]
        return f"{self.name}: env {row} of {self.num_envs}, step {step} of its episode {self._episodes[row]}"

    def _place(self, row: int) -> str:
        return f"{self._where(row)} (seed {episode_seed(self._seed, row, self._episodes[row])})"

    def _wrong_results(self, results: list[Any]) -> EnvContractError:
        row = next((i for i, result in enumerate(results) if not isinstance(result, tuple) or len(result) != 5), 0)
        return EnvContractError(
            f"{self._where(row)}: step() returned {_outline(results[row])}; expected the five values (observation, "
            "reward, terminated, truncated, info). Return all five; an old `done` is terminated or truncated."
        )


def check_distinct(name: str, envs: Sequence[gymnasium.Env]) -> None:
    """Check that environments are different objects of the same spaces.

    Args:
        name: What to call them in errors.
        envs: The environments.

    Raises:
        ConfigError: If one is there twice, or if their spaces differ.
    """
    seen: dict[int, int] = {}
    for index, env in enumerate(envs):
        twin = seen.setdefault(id(env.unwrapped), index)
        if twin != index:
            raise ConfigError(
                f"{name}: environments {twin} and {index} are the same object; expected one object for each row. "
                "Build a new environment in every call of the factory."
            )
        for kind in ("observation_space", "action_space"):
            if getattr(env, kind) != getattr(envs[0], kind):
                raise ConfigError(
                    f"{name}: {kind} of environment {index} is {getattr(env, kind)}, that of environment 0 is "
                    f"{getattr(envs[0], kind)}; expected the same. Build all environments alike."
                )


def split_rows(action: Nest) -> list[Any]:
    """Split batched actions into one per environment.

    Args:
        action: ``[k, ...]`` per leaf.

    Returns:
        k actions that share no memory with the batch: an environment may write into its own.
    """
    if isinstance(action, dict):
        parts = [split_rows(part) for part in action.values()]
        return [dict(zip(action, row, strict=True)) for row in zip(*parts, strict=True)]
    if isinstance(action, tuple):
        return list(zip(*(split_rows(part) for part in action), strict=True))
    # The elements of a vector are scalars of their own already.
    return list(action) if action.ndim == 1 else list(action.copy())


def _outline(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} values"
    return f"a {type(value).__name__}"
