"""Environments whose observations and rewards are normalised, by statistics that are saved and frozen in evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy import ndarray

from rlfeed.envs.autoreset import Envs, Outcome, Ready
from rlfeed.envs.faults import Fault
from rlfeed.envs.moments import RunningMoments
from rlfeed.envs.resume import REENACTED, Resumable
from rlfeed.errors import CheckpointError, ConfigError
from rlfeed.nest import Nest, Path
from rlfeed.types import Mode, Stateful

_MASK = ("action_mask",)


class NormalizedEnvs:
    """Normalise what other environments give.

    Parts of observations that are floats come out with mean 0 and variance 1, final observations with the same
    statistics as those they follow; integers, such as images, and an ``action_mask`` stay as they are. Every
    observation is counted once, before it is normalised. Rewards are divided by the deviation of the discounted
    return so far; the statistics of episodes stay those of the rewards as they were. In mode ``"greedy"``, in
    `evaluate` and while ``frozen`` is True nothing is counted.

    Args:
        envs: Any environments.
        observation: Whether observations are normalised.
        reward: Whether rewards are.
        gamma: Discount per step of the return whose deviation rewards are divided by.
        clip: What comes out lies in -clip .. clip.
        epsilon: Added to variances.
        deltas: Whether to keep what `take_delta` gives.

    Raises:
        ConfigError: If an argument is wrong; all findings at once.
    """

    def __init__(
        self,
        envs: Envs,
        *,
        observation: bool = True,
        reward: bool = False,
        gamma: float = 0.99,
        clip: float = 10.0,
        epsilon: float = 1e-8,
        deltas: bool = False,
    ) -> None:
        _check(gamma, clip, epsilon)
        self.envs, self.name, self.num_envs = envs, envs.name, envs.num_envs
        self.action_space: Any = envs.action_space
        self.frozen = False
        self.mode: Mode = "explore"  # a Rollout says it before every step
        self._gamma, self._clip, self._epsilon = gamma, clip, epsilon
        self._parts = _float_parts(envs.observation_space, ()) if observation else {}
        self.observation_space: Any = self._normalised_space(envs.observation_space, ())
        self.observation_moments = {
            path: RunningMoments(tuple(space.shape or ()), deltas=deltas) for path, space in self._parts.items()
        }
        self.reward_moments = RunningMoments(deltas=deltas) if reward else None
        self._source: NormalizedEnvs | None = None  # whose statistics these are, where not its own
        self._ids = np.arange(self.num_envs)
        self._returns = np.zeros(self.num_envs)  # of the running episodes, discounted backwards

    def evaluation(self, envs: Envs) -> "NormalizedEnvs":
        """Normalise other environments with these statistics, as they are at each moment, and count nothing there.

        Args:
            envs: Environments to evaluate on, of the same spaces.

        Returns:
            The environments, frozen for good.
        """
        other = NormalizedEnvs(
            envs,
            observation=bool(self._parts),
            reward=self.reward_moments is not None,
            gamma=self._gamma,
            clip=self._clip,
            epsilon=self._epsilon,
        )
        other.observation_moments, other.reward_moments = self.observation_moments, self.reward_moments
        other._source = self
        return other

    def reset(self, seed: int, first_episodes: Sequence[int]) -> Ready:
        """Begin an episode in every environment; see `Envs`."""
        ready = self.envs.reset(seed, first_episodes)
        self._ids, self._returns = ready.env_ids, np.zeros(self.num_envs)
        self._count(ready.observation, None)
        return replace(ready, observation=self._normalised(ready.observation))

    def step(self, action: Nest) -> Outcome:
        """Take one step; see `Envs`."""
        outcome = self.envs.step(action)
        ids = self._ids if outcome.env_ids is None else outcome.env_ids
        ready, successor = outcome.ready, outcome.next_observation
        self._ids = ready.env_ids
        whole = None if outcome.lost is None else ~outcome.lost
        same = ready.observation is successor  # where no episode ended
        over = np.zeros(len(ids), bool) if same else _over(outcome)
        self._count(successor, whole)
        if not same:
            # What is ready and follows on nothing is the first observation of an episode: nobody has counted it yet.
            begins = np.ones(self.num_envs, bool)
            begins[ids[~over]] = False
            self._count(ready.observation, begins[ready.env_ids])
        shown = self._normalised(successor)
        following = replace(ready, observation=shown if same else self._normalised(ready.observation))
        changes: dict[str, Any] = {"next_observation": shown, "ready": following}
        if self.reward_moments is not None:
            changes["reward"] = self._scaled_reward(self.reward_moments, outcome.reward, ids, whole)
            changes["raw_reward"] = outcome.reward
            self._returns[ids[over]] = 0.0
        return replace(outcome, **changes)

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def take_delta(self) -> dict[str, Any]:
        """Give what was counted since the last call, to be merged elsewhere.

        Returns:
            Moments as `merge` takes them; empty ones unless made with ``deltas=True``.
        """
        return _states([m.take_delta() for m in self.observation_moments.values()], _delta_of(self.reward_moments))

    def merge(self, delta: Mapping[str, Any]) -> None:
        """Count what another process has counted: the statistics are as if all had been seen here.

        Args:
            delta: What `take_delta` gave there.

        Raises:
            CheckpointError: If it is of other observations.
        """
        for mine, state in self._paired(delta):
            other = RunningMoments(mine.mean.shape)
            other.load_state_dict(state)
            mine.merge(other)

    def state_dict(self) -> dict[str, Any]:
        """Give the statistics, and the state of the environments inside where they have one.

        Returns:
            The state.
        """
        state = _states(list(self.observation_moments.values()), self.reward_moments)
        state["returns"] = self._returns.copy()
        if isinstance(self.envs, Stateful):
            state["envs"] = self.envs.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the statistics back.

        Args:
            state: What `state_dict` gave.

        Raises:
            CheckpointError: If they are of other observations, or rewards were normalised there and are not here.
        """
        for mine, saved in self._paired(state):
            mine.load_state_dict(saved)
        if len(state["returns"]) == self.num_envs:
            self._returns = np.array(state["returns"], np.float64)
        if isinstance(self.envs, Stateful) and "envs" in state:
            self.envs.load_state_dict(state["envs"])

    @property
    def choice(self) -> str:
        """Say where the environments inside are stepped, and why; see `make_envs`."""
        return getattr(self.envs, "choice", "")

    @property
    def faults(self) -> Sequence[Fault]:
        """List how the environments inside broke; see `SerialEnvs`."""
        return getattr(self.envs, "faults", ())

    @property
    def episodes(self) -> ndarray:
        """Number the open episodes; see `SerialEnvs`."""
        return getattr(self.envs, "episodes")  # noqa: B009 - not all environments have it

    def save_episodes(self) -> dict[str, Any] | None:
        """Give what brings the open episodes of the environments inside back; see `Resumable`."""
        return self.envs.save_episodes() if isinstance(self.envs, Resumable) else None

    def resume_episodes(self, state: Mapping[str, Any]) -> tuple[Ready, ndarray] | None:
        """Bring open episodes back, or begin the next ones; see `Resumable`.

        What comes back was counted when it was seen first; the first observations of new episodes are counted here.
        """
        back = self.envs.resume_episodes(state) if isinstance(self.envs, Resumable) else None
        if back is None:
            return None
        ready, codes = back
        gone = codes > REENACTED
        self._ids, self._returns[gone] = ready.env_ids, 0.0
        self._count(ready.observation, gone)
        return replace(ready, observation=self._normalised(ready.observation)), codes

    def _count(self, observation: Nest, rows: ndarray | None) -> None:
        if not self._counts:
            return
        for path, moments in self.observation_moments.items():
            leaf = _at(observation, path)
            moments.update(leaf if rows is None else leaf[rows])

    @property
    def _counts(self) -> bool:
        return self._source is None and not self.frozen and self.mode != "greedy"

    def _normalised(self, observation: Nest, path: Path = ()) -> Nest:
        if isinstance(observation, dict):
            return {key: self._normalised(part, (*path, key)) for key, part in observation.items()}
        if isinstance(observation, tuple):
            return tuple(self._normalised(part, (*path, index)) for index, part in enumerate(observation))
        moments = self.observation_moments.get(path)
        if moments is None:
            return observation
        return moments.scale(observation, center=True, clip=self._clip, epsilon=self._epsilon)

    def _scaled_reward(self, moments: RunningMoments, reward: ndarray, ids: ndarray, whole: ndarray | None) -> ndarray:
        running = self._returns[ids] * self._gamma + reward
        self._returns[ids] = running
        if self._counts:
            moments.update(running if whole is None else running[whole])
        return moments.scale(reward, center=False, clip=self._clip, epsilon=self._epsilon)

    def _normalised_space(self, space: Any, path: Path) -> Any:
        if isinstance(space, spaces.Dict):
            parts = {key: self._normalised_space(part, (*path, key)) for key, part in space.spaces.items()}
            return spaces.Dict(parts)
        if isinstance(space, spaces.Tuple):
            return spaces.Tuple(self._normalised_space(part, (*path, i)) for i, part in enumerate(space.spaces))
        if path not in self._parts:
            return space
        return spaces.Box(-self._clip, self._clip, space.shape, space.dtype.type)

    def _paired(self, state: Mapping[str, Any]) -> list[tuple[RunningMoments, Mapping[str, Any]]]:
        saved, mine = list(state["observation"]), list(self.observation_moments.values())
        if len(saved) != len(mine) or (state["reward"] is None) != (self.reward_moments is None):
            raise CheckpointError(
                f"NormalizedEnvs: the state normalises {_outline(len(saved), state['reward'])}; these environments "
                f"{_outline(len(mine), self.reward_moments)}. Make them with the recorded settings."
            )
        if self.reward_moments is not None:
            saved, mine = [*saved, state["reward"]], [*mine, self.reward_moments]
        return list(zip(mine, saved, strict=True))


def _over(outcome: Outcome) -> ndarray:
    over = outcome.terminated | outcome.truncated
    for broken in (outcome.lost, outcome.cut):
        over = over if broken is None else over | broken
    return over


def _check(gamma: float, clip: float, epsilon: float) -> None:
    rules = {
        "gamma": (gamma, 0 <= gamma <= 1, "0 to 1"),
        "clip": (clip, clip > 0 and math.isfinite(clip), "a finite number above 0"),
        "epsilon": (epsilon, epsilon > 0, "above 0"),
    }
    wrong = [f"{name} is {value}; expected {rule}." for name, (value, fine, rule) in rules.items() if not fine]
    if wrong:
        raise ConfigError(f"NormalizedEnvs: {' '.join(wrong)}")


def _float_parts(space: Any, path: Path) -> dict[Path, Any]:
    if isinstance(space, spaces.Dict):
        return {p: s for key, part in space.spaces.items() for p, s in _float_parts(part, (*path, key)).items()}
    if isinstance(space, spaces.Tuple):
        return {p: s for i, part in enumerate(space.spaces) for p, s in _float_parts(part, (*path, i)).items()}
    return {path: space} if np.dtype(space.dtype).kind == "f" and path != _MASK else {}


def _at(nest: Nest, path: Path) -> Any:
    for part in path:
        nest = nest[part]
    return nest


def _delta_of(moments: RunningMoments | None) -> RunningMoments | None:
    return None if moments is None else moments.take_delta()


def _states(observation: list[RunningMoments], reward: RunningMoments | None) -> dict[str, Any]:
    return {
        "observation": [moments.state_dict() for moments in observation],
        "reward": None if reward is None else reward.state_dict(),
    }


def _outline(parts: int, reward: Any) -> str:
    return f"{parts} parts of observations and {'no' if reward is None else 'the'} reward"
