"""The one contract that environments speak inside rlfeed.

`Ready` is what to act on next; `Outcome` is what became of the actions. The successor of an action is always the
outcome's ``next_observation``, the true final observation where an episode ended; the observation to act on next is
always the ready one. Pseudo-steps, which some autoreset modes make, never come out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from rlfeed.nest import Nest


@dataclass(frozen=True, eq=False, slots=True)
class Ready:
    """Hold what to act on next.

    Args:
        env_ids: ``[m]``, ascending: the environments that wait for an action.
        observation: ``[m, ...]`` per leaf.
        action_mask: ``[m, A]``, True = allowed; None where the environments give no masks in their infos.
    """

    env_ids: Int64[ndarray, " m"]
    observation: Nest
    action_mask: Bool[ndarray, "m A"] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """Hold what became of actions: of k environments, those of the last `Ready` unless ``env_ids`` says others.

    Args:
        next_observation: ``[k, ...]`` per leaf: what the environment returned for the action. The same arrays as
            ``ready.observation`` where no episode ended.
        reward: ``[k]`` float64, as the environment gave it unless ``raw_reward`` is that.
        terminated: ``[k]`` bool.
        truncated: ``[k]`` bool.
        ready: What to act on next.
        lost: ``[k]`` bool, True where the environment was lost in this step, which is none then: its episode is cut and
            ``ready`` has a new one, or will have; None means nowhere.
        cut: ``[k]`` bool, True where the step is whole, but its episode ends there without a flag, because the process
            of the environment was replaced; None means nowhere.
        env_ids: ``[k]``, ascending: the environments whose action has come to an end; None means those of the last
            `Ready`. Where they come as they are ready, the others follow later.
        success: ``[k]`` float64, whether the episode that ended there succeeded, as its info tells; NaN where it tells
            nothing, None where none does.
        raw_reward: ``[k]`` float64, the reward before it was normalised: what episode statistics add up; None where it
            is ``reward``.
    """

    next_observation: Nest
    reward: Float64[ndarray, " k"]
    terminated: Bool[ndarray, " k"]
    truncated: Bool[ndarray, " k"]
    ready: Ready
    lost: Bool[ndarray, " k"] | None = None
    cut: Bool[ndarray, " k"] | None = None
    env_ids: Int64[ndarray, " k"] | None = None
    success: Float64[ndarray, " k"] | None = None
    raw_reward: Float64[ndarray, " k"] | None = None


@runtime_checkable
class Envs(Protocol):
    """Be one or more environments of the same spaces, stepped together.

    Args:
        name: What to call them in errors and directory names.
        num_envs: N.
        observation_space: Of one environment.
        action_space: Of one environment.
    """

    name: str
    num_envs: int
    observation_space: Any
    action_space: Any

    def reset(self, seed: int, first_episodes: Sequence[int]) -> Ready:
        """Begin an episode in every environment.

        Args:
            seed: The run's seed.
            first_episodes: The episodes' numbers, one per environment; later episodes count on from there.

        Returns:
            The first observations, of all environments.
        """
        ...

    def step(self, action: Nest) -> Outcome:
        """Take one step in the environments of the last `Ready`, and begin new episodes where one ended.

        Args:
            action: ``[k, ...]`` per leaf, one row for each environment that was ready.

        Returns:
            What became of it, and what to act on next; its arrays are never written again.
        """
        ...

    def close(self) -> None:
        """Release what the environments hold."""
        ...
