"""Exact episode statistics: what the environments returned, summed in float64."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

WINDOW = 100
_NEWS = 100_000  # where nobody asks for them, such as in an evaluation, they may not pile up


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """Hold the result of one whole episode.

    Args:
        env_id: The environment.
        total_reward: The undiscounted return.
        length: Steps.
        env_steps: The run's env steps when it ended.
        success: What the environment's info told, such as 0.0 or 1.0; None where it told nothing.
    """

    env_id: int
    total_reward: float
    length: int
    env_steps: int
    success: float | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Hold where the time of a rollout went, since it was made.

    Args:
        policy_s: Seconds until actions were decided and checked.
        environments_s: Seconds in which the environments took them.
        rest_s: Seconds from there to the next step: storing, statistics, and whatever its user did meanwhile.
        env_steps: Steps in that time, summed over environments.
    """

    policy_s: float
    environments_s: float
    rest_s: float
    env_steps: int

    def rates(self, before: "Timing | None" = None) -> dict[str, float]:
        """Give steps per second of each stage, as if it were alone.

        Args:
            before: An earlier reading; then only what came after it counts.

        Returns:
            ``"policy"``, ``"environments"`` and ``"rest"``; NaN where no time went by.
        """
        start = before or Timing(0.0, 0.0, 0.0, 0)
        steps = self.env_steps - start.env_steps
        spent = {
            "policy": self.policy_s - start.policy_s,
            "environments": self.environments_s - start.environments_s,
            "rest": self.rest_s - start.rest_s,
        }
        return {stage: steps / seconds if seconds > 0 else float("nan") for stage, seconds in spent.items()}


class EpisodeStatistics:
    """Sum up rewards and lengths of episodes; one that was lost or cut is none.

    ``episodes`` counts those that ended, ``lost`` the environments that were lost, ``cut`` the episodes that were cut
    beside one; ``finished`` has those that ended in the last step, ``window`` the last 100; `take` gives each once.

    Args:
        num_envs: N.
    """

    def __init__(self, num_envs: int) -> None:
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)
        self.episodes = 0
        self.lost = 0
        self.cut = 0
        self.finished: tuple[EpisodeRecord, ...] = ()
        self.window: deque[EpisodeRecord] = deque(maxlen=WINDOW)
        self._news: deque[EpisodeRecord] = deque(maxlen=_NEWS)

    def take(self) -> tuple[EpisodeRecord, ...]:
        """Give every episode once.

        Returns:
            Those that have ended since this was asked last, in order; the last 100,000 of them.
        """
        news = tuple(self._news)
        self._news.clear()
        return news

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

    @property
    def mean_success(self) -> float:
        """Average what the last 100 episodes told of their success.

        Returns:
            The mean over those that told; NaN where none did.
        """
        told = [record.success for record in self.window if record.success is not None]
        return float(np.mean(told)) if told else float("nan")

    def update(
        self,
        env_ids: Int64[ndarray, " k"],
        reward: Float64[ndarray, " k"],
        ended: Bool[ndarray, " k"] | None,
        lost: Bool[ndarray, " k"] | None,
        env_steps: int,
        *,
        cut: Bool[ndarray, " k"] | None = None,
        success: Float64[ndarray, " k"] | None = None,
    ) -> None:
        """Count one step.

        Args:
            env_ids: The environments that took it.
            reward: Their rewards.
            ended: True where an episode is over, however; None where none is.
            lost: True where the environment was lost: the step and its episode do not count; None: nowhere.
            env_steps: The run's env steps, this one included.
            cut: True where the step is whole but its episode does not count; None: nowhere.
            success: What infos told of the episodes that ended, NaN where nothing; None: nowhere.
        """
        if len(env_ids) == len(self._returns):
            self._returns += reward
            self._lengths += 1
        else:
            self._returns[env_ids] += reward
            self._lengths[env_ids] += 1
        if ended is None:
            self.finished = ()
            return
        whole = ended
        if lost is not None:
            self.lost += int(lost.sum())
            whole = whole & ~lost
        if cut is not None:
            self.cut += int(cut.sum())
            whole = whole & ~cut
        told = [None] * len(env_ids) if success is None else [None if x != x else x for x in success.tolist()]
        self.finished = tuple(
            EpisodeRecord(i, float(self._returns[i]), int(self._lengths[i]), env_steps, told[row])
            for row, i in zip(whole.nonzero()[0].tolist(), env_ids[whole].tolist(), strict=True)
        )
        self.window.extend(self.finished)
        self._news.extend(self.finished)
        self.episodes += len(self.finished)
        self.discard(env_ids[ended])

    def discard(self, env_ids: Int64[ndarray, " k"]) -> None:
        """Forget the running episodes of some environments.

        Args:
            env_ids: Which.
        """
        self._returns[env_ids] = 0.0
        self._lengths[env_ids] = 0

    def state_dict(self) -> dict[str, Any]:
        """Give counts, window, and the sums of running episodes.

        Returns:
            The state.
        """
        return {
            "episodes": self.episodes,
            "lost": self.lost,
            "cut": self.cut,
            "window": [(r.env_id, r.total_reward, r.length, r.env_steps, r.success) for r in self.window],
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take everything back; `discard` the episodes that do not come back.

        Args:
            state: What `state_dict` gave.
        """
        self.episodes, self.lost, self.cut = int(state["episodes"]), int(state["lost"]), int(state["cut"])
        self.finished = ()
        self._news.clear()
        self.window = deque((EpisodeRecord(*record) for record in state["window"]), maxlen=WINDOW)
        self._returns[:] = state["returns"]
        self._lengths[:] = state["lengths"]
