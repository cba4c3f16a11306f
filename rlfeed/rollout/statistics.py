"""Exact episode statistics: what the environments returned, summed in float64."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

WINDOW = 100


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """Hold the result of one whole episode.

    Args:
        env_id: The environment.
        total_reward: The undiscounted return.
        length: Steps.
        env_steps: The run's env steps when it ended.
    """

    env_id: int
    total_reward: float
    length: int
    env_steps: int


class EpisodeStatistics:
    """Sum up rewards and lengths of episodes; a lost episode is none.

    Args:
        num_envs: N.
    """

    def __init__(self, num_envs: int) -> None:
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)
        self.episodes = 0
        self.lost = 0
        self.finished: tuple[EpisodeRecord, ...] = ()
        self.window: deque[EpisodeRecord] = deque(maxlen=WINDOW)

    @property
    def mean_return(self) -> float:
        """Average the returns of the last 100 episodes.

        Returns:
            The mean; NaN before the first episode ended.
        """
        return float(np.mean([record.total_reward for record in self.window])) if self.window else float("nan")

    @property
    def mean_length(self) -> float:
        """Average the lengths of the last 100 episodes.

        Returns:
            Steps; NaN before the first episode ended.
        """
        return float(np.mean([record.length for record in self.window])) if self.window else float("nan")

    def update(
        self,
        env_ids: Int64[ndarray, " k"],
        reward: Float64[ndarray, " k"],
        ended: Bool[ndarray, " k"] | None,
        lost: Bool[ndarray, " k"] | None,
        env_steps: int,
    ) -> None:
        """Count one step.

        Args:
            env_ids: The environments that took it.
            reward: Their rewards.
            ended: True where an episode ended; None where none did.
            lost: True where the environment was lost: the step and its episode do not count; None: nowhere.
            env_steps: The run's env steps, this one included.
        """
        if len(env_ids) == len(self._returns):
            self._returns += reward
            self._lengths += 1
        else:
            self._returns[env_ids] += reward
            self._lengths[env_ids] += 1
        if lost is not None:
            self.discard(env_ids[lost])
            self.lost += int(lost.sum())
        if ended is None:
            self.finished = ()
            return
        over = env_ids[ended] if lost is None else env_ids[ended & ~lost]
        self.finished = tuple(
            EpisodeRecord(int(i), float(self._returns[i]), int(self._lengths[i]), env_steps) for i in over
        )
        self.window.extend(self.finished)
        self.episodes += len(self.finished)
        self.discard(over)

    def discard(self, env_ids: Int64[ndarray, " k"]) -> None:
        """Forget the running episodes of some environments.

        Args:
            env_ids: Which.
        """
        self._returns[env_ids] = 0.0
        self._lengths[env_ids] = 0

    def state_dict(self) -> dict[str, Any]:
        """Give counts and window; running episodes are not kept, since they do not come back.

        Returns:
            The state.
        """
        window = [(r.env_id, r.total_reward, r.length, r.env_steps) for r in self.window]
        return {"episodes": self.episodes, "lost": self.lost, "window": window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take counts and window back; running episodes begin at zero.

        Args:
            state: What `state_dict` gave.
        """
        self.episodes, self.lost = int(state["episodes"]), int(state["lost"])
        self.finished = ()
        self.window = deque((EpisodeRecord(*record) for record in state["window"]), maxlen=WINDOW)
        self._returns[:] = 0.0
        self._lengths[:] = 0
