"""Environments in this process, one after the other: the fastest way for light ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from rlfeed.envs.autoreset import Outcome, Ready
from rlfeed.envs.boundary import mask_length
from rlfeed.envs.faults import MAX_RESTARTS, Fault, FaultPolicy, OnFault
from rlfeed.envs.group import EnvGroup, Faults, check_distinct
from rlfeed.envs.resume import REENACTED, Diary, capture, pasts_of, resume_group
from rlfeed.errors import ConfigError
from rlfeed.nest import Nest, leaves, map_nest


class SerialEnvs:
    """Step environments in this process, one after the other.

    Arrays are fresh in every step, so steps may be kept. What the environments return is checked.

    Args:
        envs: At least one environment, all of the same spaces.
        name: What to call them in errors; by default the first one's id or class name.
        first_env_id: The number of the first one; episodes have their seeds by it.
        makers: Make each environment anew where it broke; without them it is only reset.
        on_fault: What to do when one breaks: ``"raise"``, or ``"restart"``: the step is lost, a new episode begins.
        max_restarts: How often in a row one is begun anew.
        choice: Why they are stepped here, kept for whoever asks.

    Raises:
        ConfigError: If there is none, if one is given twice, or if their spaces differ.
        SpaceError: If the observation space cannot be stored.
    """

    def __init__(
        self,
        envs: Sequence[gymnasium.Env],
        name: str | None = None,
        *,
        first_env_id: int = 0,
        makers: Sequence[Callable[[], gymnasium.Env]] | None = None,
        on_fault: OnFault = "raise",
        max_restarts: int = MAX_RESTARTS,
        choice: str = "",
    ) -> None:
        if not envs:
            raise ConfigError("SerialEnvs: got no environment; expected at least one.")
        first = envs[0]
        self.name = name or (first.spec.id if first.spec is not None else type(first.unwrapped).__name__)
        self.num_envs, self.choice = len(envs), choice
        self.observation_space = first.observation_space
        self.action_space = first.action_space
        check_distinct(self.name, envs)
        total = first_env_id + self.num_envs
        self._group = EnvGroup(envs, self.name, first=first_env_id, num_envs=total, makers=makers)
        self._policy = FaultPolicy(self.name, on_fault, max_restarts)
        self._ids = np.arange(self.num_envs, dtype=np.int64)
        self._ids.flags.writeable = False
        self._mask_length = mask_length(self.action_space)
        self._ready = Ready(self._ids, self._group.check.empty(self.num_envs))
        self._diary = Diary(self.num_envs)

    @property
    def episodes(self) -> Int64[ndarray, " N"]:
        """Number the open episodes.

        Returns:
            ``[N]``; where environments broke, numbers have been passed over.
        """
        return np.array(self._group.episodes, np.int64)

    @property
    def faults(self) -> Sequence[Fault]:
        """List how environments broke: the last hundred times.

        Returns:
            The faults, oldest first.
        """
        return tuple(self._policy.faults)

    def reset(self, seed: int, first_episodes: Sequence[int]) -> Ready:
        """Begin an episode in every environment.

        Args:
            seed: The run's seed.
            first_episodes: The episodes' numbers, one per environment.

        Returns:
            The first observations, of all environments.
        """
        observation, mask = self._group.check.empty(self.num_envs), self._empty_mask()
        self._diary.begin()
        self._settle(self._group.start(seed, first_episodes, observation, mask), observation, mask)
        self._ready = Ready(self._ids, observation, mask if self._group.masked else None)
        return self._ready

    def step(self, action: Nest) -> Outcome:
        """Take one step in every environment, and begin new episodes where one ended.

        Args:
            action: ``[N, ...]`` per leaf.

        Returns:
            What became of it, and what to act on next.
        """
        group = self._group
        successor = observation = group.check.empty(self.num_envs)
        mask = self._empty_mask() if group.masked else None
        faults = group.step(action, observation, mask)
        reward, terminated = np.array(group.reward), np.array(group.terminated)
        truncated, lost, success, over = np.array(group.truncated), None, None, None
        if faults:
            lost = np.isin(self._ids, list(faults))
            reward[lost], terminated[lost], truncated[lost] = 0.0, False, False
            for row in faults:  # nobody knows what followed: what was acted on stands for it
                for (_, target), (_, before) in zip(leaves(successor), leaves(self._ready.observation), strict=True):
                    target[row] = before[row]
        if group.ended or faults:
            if group.success:
                success = np.full(self.num_envs, np.nan)
                success[list(group.success)] = list(group.success.values())
            self._policy.ended([group.first + row for row in group.ended])
            observation = map_nest(np.copy, successor)
            over = terminated | truncated if lost is None else terminated | truncated | lost
        self._diary.note(self._ready.observation, action, reward, over)
        if over is not None:
            self._settle(faults, observation, mask, group.ended)
        self._ready = Ready(self._ids, observation, mask)
        return Outcome(successor, reward, terminated, truncated, self._ready, lost, success=success)

    def save_episodes(self) -> dict[str, Any]:
        """Give what brings the open episodes back; see `Resumable`.

        Returns:
            The state.
        """
        group, ready = self._group, self._ready
        return {
            "seed": group.seed,
            "episodes": self.episodes,
            "observation": ready.observation,
            "mask": ready.action_mask,
            "states": capture(group.envs),
            **self._diary.save(),
        }

    def resume_episodes(self, state: Mapping[str, Any]) -> tuple[Ready, Int64[ndarray, " N"]]:
        """Bring open episodes back, or begin the next ones; see `Resumable`.

        Args:
            state: What `save_episodes` gave.

        Returns:
            What to act on next, and how each environment has come back: a key of ``COMEBACKS``.
        """
        observation, mask = self._group.check.empty(self.num_envs), self._empty_mask()
        pasts = pasts_of(state, self._diary.load(state))
        faults, codes = resume_group(self._group, state["seed"], state["episodes"], pasts, observation, mask)
        self._settle(faults, observation, mask)
        self._diary.forget([row for row, code in enumerate(codes) if code > REENACTED])
        self._ready = Ready(self._ids, observation, mask if self._group.masked else None)
        return self._ready, np.array(codes)

    def close(self) -> None:
        """Close every environment."""
        self._group.close()

    def _empty_mask(self) -> np.ndarray | None:
        return np.empty((self.num_envs, self._mask_length), bool) if self._mask_length else None

    def _settle(
        self, faults: Faults, observation: Nest, mask: np.ndarray | None, ended: Sequence[int] = ()
    ) -> None:
        """Begin the next episodes, where one ended and where an environment broke, until all have begun."""
        group, begin = self._group, list(ended)
        while faults or begin:
            for row, error in faults.items():
                self._policy.meet(group.first + row, group.episodes[row], error)
            unmade = group.renew(faults)
            begin = sorted([*begin, *faults])
            for row in begin:
                group.episodes[row] += 1
            made = [row for row in begin if row not in unmade]
            faults, begin = {**unmade, **group.begin(made, observation, mask)}, []
