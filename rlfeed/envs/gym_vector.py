"""Gymnasium's vector environments, in any autoreset mode, behind the one contract."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from jaxtyping import Bool, Float64
from numpy import ndarray

from rlfeed.envs.autoreset import Outcome, Ready
from rlfeed.envs.boundary import REWARD_LIMIT, SUCCESS_KEYS, ObservationCheck, stack_masks, success_of
from rlfeed.envs.group import check_distinct
from rlfeed.envs.gym_async import AsyncWatch
from rlfeed.envs.seeds import EPISODES_OPTION, episode_seed, failed
from rlfeed.errors import ConfigError, EnvContractError, RlfeedError, UnsupportedError
from rlfeed.nest import Nest, describe, leaves, map_nest

_STEP = ("observations", "rewards", "terminated", "truncated", "infos")


class VectorEnvs:
    """Speak the contract for a ``gymnasium.vector.VectorEnv`` in any of its three autoreset modes.

    NEXT_STEP environments skip the rows that ended for one call, in which Gymnasium resets them: those rows are not
    ready then, and take no step. Every episode begins with its own seed in mode DISABLED; where the environment resets
    itself only the first reset can be seeded, so that rollouts of one seed are alike all the same. `make_envs` wraps
    its environments so that every episode is seeded in every mode.

    Args:
        envs: The vector environment, also in vector wrappers; ``metadata["autoreset_mode"]`` says its mode.
        name: What to call it in errors.
        numbered: Whether every sub-environment is wrapped in `NumberedEpisodes`.
        step_timeout_s: How long the processes of an `AsyncVectorEnv` may take for a step or a reset, in seconds.
        observation_space: Of one environment, where it is another than the vector environment says.

    Raises:
        ConfigError: If the environment does not say its autoreset mode, or has one environment twice.
        SpaceError: If its observation space cannot be stored.
        UnsupportedError: If it gives batches of some of its environments (``batch_size``).
    """

    def __init__(
        self,
        envs: VectorEnv,
        name: str | None = None,
        *,
        numbered: bool = False,
        step_timeout_s: float = 60.0,
        observation_space: Any = None,
    ) -> None:
        base: Any = envs.unwrapped
        self.name: str = name or getattr(envs.spec, "id", None) or type(base).__name__
        self._mode = _autoreset_mode(envs, self.name)
        self.num_envs: int = envs.num_envs
        if isinstance(base, SyncVectorEnv):
            check_distinct(self.name, base.envs)
        batch_size = getattr(base, "batch_size", None) or getattr(base, "config", {}).get("batch_size")
        if batch_size not in (None, 0, self.num_envs):
            raise UnsupportedError(
                f"{self.name}: gives batches of {batch_size} of its {self.num_envs} environments; expected all of them "
                "in each step. Leave out batch_size."
            )
        self.observation_space: Any = observation_space or envs.single_observation_space
        self.action_space: Any = envs.single_action_space
        self._envs, self._base, self._numbered = envs, base, numbered
        self._watch = AsyncWatch(base, self.name, step_timeout_s) if isinstance(base, AsyncVectorEnv) else None
        self._check = ObservationCheck(self.observation_space)
        self._all = np.arange(self.num_envs, dtype=np.int64)
        self._all.flags.writeable = False
        self._ids = self._all  # the rows that are ready
        self._resetting = np.zeros(self.num_envs, bool)  # rows whose next call is Gymnasium's reset, no step
        # Whoever else may write its next observations into these arrays, which the steps of a rollout must survive.
        self._fresh = type(envs) in (SyncVectorEnv, AsyncVectorEnv) and bool(getattr(envs, "copy", False))
        self._last_action: Nest = None
        self._masked = False
        self._seed = 0
        self._episodes = np.zeros(self.num_envs, np.int64)

    def reset(self, seed: int, first_episodes: Sequence[int]) -> Ready:
        """Begin an episode in every environment.

        Args:
            seed: The run's seed.
            first_episodes: The episodes' numbers, one per environment.

        Returns:
            The first observations, of all environments.
        """
        self._seed, self._episodes = seed, np.array(first_episodes, np.int64)
        if self._numbered:
            options = {EPISODES_OPTION: (seed, self._episodes.tolist())}
            observation, infos = self._reset(options=options)
        else:
            observation, infos = self._reset(seed=self._seeds(self._all))
        # Gymnasium's workers without shared memory forget at a reset that they were to reset at their next step.
        resets_twice = isinstance(self._base, AsyncVectorEnv) and not self._base.shared_memory
        self._resetting &= resets_twice and self._mode is AutoresetMode.NEXT_STEP
        self._masked = "action_mask" in infos
        return self._ready(observation, infos)

    def step(self, action: Nest) -> Outcome:
        """Take one step in the environments that are ready.

        Args:
            action: ``[k, ...]`` per leaf.

        Returns:
            What became of it, and what to act on next.
        """
        acted = self._ids
        observation, reward, terminated, truncated, infos = self._step(self._spread(action))
        reward = self._rewards(reward, acted)
        terminated, truncated = self._flags("terminated", terminated), self._flags("truncated", truncated)
        ended = terminated | truncated
        successor, success = observation, None
        self._resetting = np.zeros(self.num_envs, bool)
        if ended.any():
            success = self._success(infos, np.flatnonzero(ended))
            if self._mode is AutoresetMode.SAME_STEP:
                successor = self._with_finals(observation, infos, ended)
            elif self._mode is AutoresetMode.DISABLED:
                observation, infos = self._with_firsts(observation, infos, ended)
            else:
                self._resetting = ended
        fields = (successor, reward, terminated, truncated)
        if len(acted) < self.num_envs:
            fields = map_nest(lambda leaf: leaf[acted], fields)
            success = None if success is None else success[acted]
        return Outcome(*fields, ready=self._ready(observation, infos), success=success)

    def close(self) -> None:
        """Close the vector environment."""
        if self._watch is not None:
            self._watch.stop()
        self._envs.close()

    def _call(self, call: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if self._watch is not None:
                raise self._watch.explain(call, error) from error
            if isinstance(error, RlfeedError):
                raise
            raise failed(self.name, call, error) from error

    def _reset(self, **kwargs: Any) -> tuple[Nest, dict[str, Any]]:
        observation, infos = self._parts("reset()", ("observations", "infos"), self._envs.reset, **kwargs)
        return self._own(observation), self._infos(infos)

    def _step(self, action: Nest) -> tuple[Nest, Any, Any, Any, dict[str, Any]]:
        observation, *arrays, infos = self._parts("step()", _STEP, self._envs.step, action)
        return self._own(observation), *arrays, self._infos(infos)

    def _parts(self, call: str, names: tuple[str, ...], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = self._call(call, function, *args, **kwargs)
        if not isinstance(result, tuple) or len(result) != len(names):
            got = f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
            raise EnvContractError(
                f"{self.name}: {call} returned {got}; expected {len(names)}: {', '.join(names)}. Return all of them."
            )
        return result

    def _ready(self, observation: Nest, infos: dict[str, Any]) -> Ready:
        if self._resetting.all():  # nobody can act: let Gymnasium reset them all now
            observation, _, _, _, infos = self._step(self._last_action)
            self._resetting = np.zeros(self.num_envs, bool)
        self._ids = self._all if not self._resetting.any() else np.flatnonzero(~self._resetting)
        ids, mask = self._ids, None
        if self._masked:
            given = infos.get("action_mask", [None] * self.num_envs)
            mask = stack_masks([given[row] for row in ids], self.action_space, lambda i: self._where(ids[i]))
        if len(ids) < self.num_envs:
            observation = map_nest(lambda leaf: leaf[ids], observation)
        return Ready(ids, observation, mask)

    def _spread(self, action: Nest) -> Nest:
        if len(self._ids) < self.num_envs:
            # Gymnasium wants an action for the rows it only resets, too: any valid one, such as another row's.
            place = np.zeros(self.num_envs, np.int64)
            place[self._ids] = np.arange(len(self._ids))
            action = map_nest(lambda leaf: leaf[place], action)
        self._last_action = action
        return action

    def _seeds(self, rows: ndarray) -> Any:
        seeds = [episode_seed(self._seed, int(row), int(self._episodes[row])) for row in rows]
        if isinstance(self._base, SyncVectorEnv | AsyncVectorEnv):
            every: list[int | None] = [None] * self.num_envs
            for row, seed in zip(rows, seeds, strict=True):
                every[row] = seed
            return every
        if hasattr(self._base, "ale"):
            return np.array(seeds)
        # Environments that are vectors by themselves take one seed for all, when all begin.
        return seeds[0] if len(rows) == self.num_envs else None

    def _success(self, infos: dict[str, Any], rows: ndarray) -> Float64[ndarray, " N"] | None:
        """Read which of the episodes that ended succeeded; None where the infos tell nothing."""
        told = infos.get("final_info", {}) if self._mode is AutoresetMode.SAME_STEP else infos
        if isinstance(told, dict) and told.keys().isdisjoint(SUCCESS_KEYS):
            return None
        success = np.full(self.num_envs, np.nan)
        for row in rows:
            # A dict of arrays, where "_key" says for which rows the environment gave "key", or one dict for each row.
            of_row = _row_of(told, row) if isinstance(told, dict) else told[row]
            value = success_of(of_row or {})
            success[row] = np.nan if value is None else value
        return None if np.isnan(success).all() else success

    def _with_finals(self, observation: Nest, infos: dict[str, Any], ended: Bool[ndarray, " N"]) -> Nest:
        finals = infos.get("final_obs", infos.get("final_observation"))  # the name before Gymnasium 1.0
        if finals is None:
            raise EnvContractError(
                f'{self.name}: info has no "final_obs" although an episode ended; expected it in autoreset mode '
                "SAME_STEP. Put the final observations there, or use another autoreset mode."
            )
        rows = np.flatnonzero(ended)
        if isinstance(finals, dict | tuple):  # batched as observations are
            parts = [map_nest(lambda leaf, row=row: leaf[row], finals) for row in rows]
        else:
            parts = [finals[row] for row in rows]
        return self._replaced(observation, rows, self._check.stack(parts, lambda i: self._where(rows[i])))

    def _with_firsts(
        self, observation: Nest, infos: dict[str, Any], ended: Bool[ndarray, " N"]
    ) -> tuple[Nest, dict[str, Any]]:
        rows = np.flatnonzero(ended)
        self._episodes[rows] += 1
        options = {"reset_mask": ended.copy()}
        seeds = None if self._numbered else self._seeds(rows)
        firsts, first_infos = self._reset(seed=seeds, options=options)
        if self._masked:
            nothing = [None] * self.num_envs
            told, begun = infos.get("action_mask", nothing), first_infos.get("action_mask", nothing)
            infos = {"action_mask": [begun[row] if ended[row] else told[row] for row in range(self.num_envs)]}
        return self._replaced(observation, rows, map_nest(lambda leaf: leaf[rows], firsts)), infos

    def _replaced(self, observation: Nest, rows: ndarray, parts: Nest) -> Nest:
        result = map_nest(np.copy, observation)
        for (_, target), (_, part) in zip(leaves(result), leaves(parts), strict=True):
            target[rows] = part
        return result

    def _rewards(self, values: Any, acted: ndarray) -> Float64[ndarray, " N"]:
        try:
            reward = np.array(values, np.float64)
        except (TypeError, ValueError):
            raise EnvContractError(f"{self.name}: reward is {values!r}; expected numbers. Return floats.") from None
        if reward.shape != (self.num_envs,):
            raise EnvContractError(
                f"{self.name}: reward has shape {reward.shape}; expected ({self.num_envs},). Return one for each row."
            )
        fine = np.abs(reward[acted]) <= REWARD_LIMIT
        if not fine.all():
            row = int(acted[np.argmin(fine)])
            raise EnvContractError(f"{self._where(row)}: reward is {reward[row]}; expected a finite scalar.")
        return reward

    def _flags(self, name: str, values: Any) -> Bool[ndarray, " N"]:
        flags = np.array(values)
        if flags.dtype != bool or flags.shape != (self.num_envs,):
            raise EnvContractError(
                f"{self.name}: {name} is {flags.dtype} of shape {flags.shape}; expected bool of shape "
                f"({self.num_envs},). Return that from step()."
            )
        return flags

    def _infos(self, infos: Any) -> dict[str, Any]:
        if not isinstance(infos, dict):
            raise EnvContractError(
                f"{self.name}: infos are a {type(infos).__name__}; expected a dict of arrays. Leave out wrappers such "
                "as DictInfoToList."
            )
        return infos

    def _own(self, observation: Nest) -> Nest:
        observation = self._check.batch(observation, self._where)
        for path, leaf in leaves(observation):
            if len(leaf) != self.num_envs:
                raise EnvContractError(
                    f"{self.name}: {describe('observation', path)} has {len(leaf)} rows; expected {self.num_envs}, one "
                    "for each environment."
                )
        return observation if self._fresh else map_nest(np.copy, observation)

    def _where(self, row: int) -> str:
        return f"{self.name}: env {row} of {self.num_envs}"


def _row_of(infos: dict[str, Any], row: int) -> dict[str, Any]:
    keys = [key for key in SUCCESS_KEYS if key in infos]
    return {key: infos[key][row] for key in keys if f"_{key}" not in infos or infos[f"_{key}"][row]}


def _autoreset_mode(envs: VectorEnv, name: str) -> AutoresetMode:
    metadata = envs.metadata
    # Classes that write into the metadata they inherit write into everybody's: what stands there is the last one's.
    stated = None if metadata is VectorEnv.metadata else (metadata or {}).get("autoreset_mode")
    try:
        return AutoresetMode(stated or getattr(envs.unwrapped, "autoreset_mode", None))
    except ValueError:
        raise ConfigError(
            f"{name}: metadata of its own has no autoreset_mode; expected one of {[m.name for m in AutoresetMode]}, "
            "since it decides where final observations are. Set metadata = {'autoreset_mode': ...} in its class."
        ) from None
