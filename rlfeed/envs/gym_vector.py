"""Gymnasium's vector environments, in any autoreset mode, behind the one contract."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from jaxtyping import Bool
from numpy import ndarray

from rlfeed.envs.autoreset import Outcome, Ready
from rlfeed.envs.boundary import REWARD_LIMIT, ObservationCheck, stack_masks
from rlfeed.envs.seeds import EPISODES_OPTION, episode_seed
from rlfeed.errors import ConfigError, EnvContractError
from rlfeed.nest import Nest, leaves, map_nest


class VectorEnvs:
    """Speak the contract for a ``gymnasium.vector.VectorEnv`` in any of its three autoreset modes.

    NEXT_STEP environments skip the rows that ended for one call, in which Gymnasium resets them: those rows are not
    ready then, and take no step. Only the first reset can be seeded where the environment resets itself; `make_envs`
    wraps its environments so that every episode is.

    Args:
        envs: The vector environment; ``metadata["autoreset_mode"]`` says its mode.
        name: What to call it in errors.
        numbered: Whether every sub-environment is wrapped in `NumberedEpisodes`.

    Raises:
        ConfigError: If the environment does not say its autoreset mode.
        SpaceError: If its observation space cannot be stored.
    """

    def __init__(self, envs: VectorEnv, name: str | None = None, *, numbered: bool = False) -> None:
        self.name = name or (envs.spec.id if envs.spec is not None else type(envs.unwrapped).__name__)
        try:
            self._mode = AutoresetMode((envs.metadata or {}).get("autoreset_mode"))
        except ValueError:
            raise ConfigError(
                f"{self.name}: metadata has no autoreset_mode; expected one of {[m.name for m in AutoresetMode]}, "
                "since it decides where final observations are. Set metadata['autoreset_mode'] in its class."
            ) from None
        self.num_envs: int = envs.num_envs
        self.observation_space: Any = envs.single_observation_space
        self.action_space: Any = envs.single_action_space
        self._envs, self._numbered = envs, numbered
        self._check = ObservationCheck(self.observation_space)
        self._all = np.arange(self.num_envs, dtype=np.int64)
        self._all.flags.writeable = False
        self._ids = self._all  # the rows that are ready
        self._resetting = np.zeros(self.num_envs, bool)  # rows whose next call is Gymnasium's reset, no step
        # Whoever else may write its next observations into these arrays, which the steps of a rollout must survive.
        self._fresh = type(envs) in (SyncVectorEnv, AsyncVectorEnv) and bool(getattr(envs, "copy", False))
        self._last_action: Nest = None
        self._masked = False

    def reset(self, seed: int, first_episodes: Sequence[int]) -> Ready:
        """Begin an episode in every environment.

        Args:
            seed: The run's seed.
            first_episodes: The episodes' numbers, one per environment.

        Returns:
            The first observations, of all environments.
        """
        if self._numbered:
            options = {EPISODES_OPTION: (seed, [int(n) for n in first_episodes])}
            observation, infos = self._envs.reset(options=options)
        else:
            seeds: Any = [episode_seed(seed, env_id, int(n)) for env_id, n in enumerate(first_episodes)]
            if not isinstance(self._envs.unwrapped, SyncVectorEnv | AsyncVectorEnv):
                seeds = seeds[0]  # environments that are vectors by themselves take one seed for all
            observation, infos = self._envs.reset(seed=seeds)
        self._ids = self._all
        self._resetting = np.zeros(self.num_envs, bool)
        self._masked = "action_mask" in infos
        return self._ready(self._own(observation), infos)

    def step(self, action: Nest) -> Outcome:
        """Take one step in the environments that are ready.

        Args:
            action: ``[k, ...]`` per leaf.

        Returns:
            What became of it, and what to act on next.
        """
        acted = self._ids
        observation, reward, terminated, truncated, infos = self._envs.step(self._spread(action))
        observation = self._own(observation)
        terminated, truncated = self._flags("terminated", terminated), self._flags("truncated", truncated)
        ended = terminated | truncated
        successor = observation
        self._resetting = np.zeros(self.num_envs, bool)
        if ended.any():
            if self._mode is AutoresetMode.SAME_STEP:
                successor = self._with_finals(observation, infos, ended)
            elif self._mode is AutoresetMode.DISABLED:
                observation, first_infos = self._envs.reset(options={"reset_mask": ended})
                observation = self._own(observation)
                if self._masked:
                    masks = (infos["action_mask"], first_infos["action_mask"])
                    infos = {"action_mask": np.where(ended[:, None], masks[1], masks[0])}
            else:
                self._resetting = ended
        reward = np.array(reward, np.float64)
        if not np.abs(reward[acted]).max() <= REWARD_LIMIT:
            row = int(np.argmin(np.abs(reward) <= REWARD_LIMIT))
            raise EnvContractError(f"{self._where(row)}: reward is {reward[row]}; expected a finite scalar.")
        fields = (successor, reward, terminated, truncated)
        if len(acted) < self.num_envs:
            fields = map_nest(lambda leaf: leaf[acted], fields)
        return Outcome(*fields, ready=self._ready(observation, infos))

    def close(self) -> None:
        """Close the vector environment."""
        self._envs.close()

    def _ready(self, observation: Nest, infos: dict[str, Any]) -> Ready:
        if self._resetting.all():  # nobody can act: let Gymnasium reset them all now
            observation, _, _, _, infos = self._envs.step(self._last_action)
            observation = self._own(observation)
            self._resetting = np.zeros(self.num_envs, bool)
        mask = None
        if self._masked:
            given = infos.get("action_mask", [None] * self.num_envs)
            mask = stack_masks(list(given), self.action_space, self._where)
        if not self._resetting.any():
            self._ids = self._all
            return Ready(self._all, observation, mask)
        self._ids = ids = np.flatnonzero(~self._resetting)
        return Ready(ids, map_nest(lambda leaf: leaf[ids], observation), None if mask is None else mask[ids])

    def _spread(self, action: Nest) -> Nest:
        if len(self._ids) < self.num_envs:
            # Gymnasium wants an action for the rows it only resets, too: any valid one, such as another row's.
            place = np.zeros(self.num_envs, np.int64)
            place[self._ids] = np.arange(len(self._ids))
            action = map_nest(lambda leaf: leaf[place], action)
        self._last_action = action
        return action

    def _with_finals(self, observation: Nest, infos: dict[str, Any], ended: Bool[ndarray, " N"]) -> Nest:
        finals = infos.get("final_obs")
        if finals is None:
            raise EnvContractError(
                f'{self.name}: info has no "final_obs" although an episode ended; expected it in autoreset mode '
                "SAME_STEP. Put the final observations there, or use another autoreset mode."
            )
        rows = [int(row) for row in np.flatnonzero(ended)]
        if isinstance(finals, dict | tuple):  # batched as observations are
            parts = [map_nest(lambda leaf, row=row: leaf[row], finals) for row in rows]
        else:
            parts = [finals[row] for row in rows]
        stacked = self._check.stack(parts, lambda i: self._where(rows[i]))
        successor = map_nest(np.copy, observation)
        for (_, target), (_, part) in zip(leaves(successor), leaves(stacked), strict=True):
            target[rows] = part
        return successor

    def _flags(self, name: str, values: Any) -> Bool[ndarray, " N"]:
        flags = np.array(values)
        if flags.dtype != bool or flags.shape != (self.num_envs,):
            raise EnvContractError(
                f"{self.name}: {name} is {flags.dtype} of shape {flags.shape}; expected bool of shape "
                f"({self.num_envs},). Return that from step()."
            )
        return flags

    def _own(self, observation: Nest) -> Nest:
        observation = self._check.batch(observation, self._where)
        return observation if self._fresh else map_nest(np.copy, observation)

    def _where(self, row: int) -> str:
        return f"{self.name}: env {row} of {self.num_envs}"
