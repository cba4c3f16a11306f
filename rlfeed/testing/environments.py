"""Environments with known answers: what went through the data path can be told from its value."""

from collections.abc import Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

End = Literal["terminated", "truncated", "both"]
ENDS = ("terminated", "truncated", "both")
LATE_STEP = 4  # faults of broken environments begin here or at once: every episode is longer


class IdentifiableEnv(gymnasium.Env):
    """Name the environment, episode, step and last action in every observation.

    The vector is float32 ``[env, episode, step, last action]`` (last action -1 after a reset); the reward of the step
    that leads to step t is ``1000 env + 10 episode + t / 100``. As a Dict it lies beside a uint8 image of
    ``[8, 8, 1]``, filled with ``(31 env + 7 episode + step) % 251``. Episodes end as a pattern says, also with both
    flags at once.

    Args:
        env: The number in its observations.
        lengths: Steps of the episodes, in turn; empty: 1 to 6, drawn from the episode's seed.
        ends: How the episodes end, in turn.
        observation: ``"box"`` for the vector, ``"dict"`` for ``{"vector", "image"}``.
        reuse_arrays: Return the same arrays in every step, overwritten, as careless environments do.
    """

    def __init__(
        self,
        env: int = 0,
        *,
        lengths: Sequence[int] = (3, 1, 5, 2),
        ends: Sequence[End] = ENDS,
        observation: Literal["box", "dict"] = "box",
        reuse_arrays: bool = False,
    ) -> None:
        self.env, self.lengths, self.ends = env, tuple(lengths), tuple(ends)
        self.reuse_arrays = reuse_arrays
        self.episode, self.length, self.step_in_episode, self.last_action = -1, 0, 0, -1
        vector = spaces.Box(-np.inf, np.inf, (4,), np.float32)
        image = spaces.Box(0, 255, (8, 8, 1), np.uint8)
        self.observation_space = vector if observation == "box" else spaces.Dict({"vector": vector, "image": image})
        self.action_space = spaces.Discrete(5)
        self._vector, self._image = np.zeros(4, np.float32), np.zeros((8, 8, 1), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode.

        Args:
            seed: Decides the length where ``lengths`` is empty.
            options: Ignored.

        Returns:
            The first observation and an empty info.
        """
        super().reset(seed=seed)
        self.episode += 1
        self.step_in_episode, self.last_action = 0, -1
        drawn = int(self.np_random.integers(1, 7)) if not self.lengths else 0
        self.length = drawn or self.lengths[self.episode % len(self.lengths)]
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one step.

        Args:
            action: Shown in the next observation.

        Returns:
            Observation, reward, terminated, truncated and an empty info.
        """
        self.step_in_episode += 1
        self.last_action = int(action)
        over = self.step_in_episode == self.length
        end = self.ends[self.episode % len(self.ends)]
        reward = 1000.0 * self.env + 10.0 * self.episode + self.step_in_episode / 100
        return self._observation(), reward, over and end != "truncated", over and end != "terminated", {}

    def _observation(self) -> Any:
        self._vector[:] = (self.env, self.episode, self.step_in_episode, self.last_action)
        self._image[:] = (31 * self.env + 7 * self.episode + self.step_in_episode) % 251
        box = isinstance(self.observation_space, spaces.Box)
        observation = self._vector if box else {"vector": self._vector, "image": self._image}
        if not self.reuse_arrays:
            self._vector, self._image = self._vector.copy(), self._image.copy()
        return observation


class ConstantRewardEnv(gymnasium.Env):
    """Give a reward of 1 for one action and 0 for the others; the best return is the episode's length.

    Args:
        length: Steps of every episode; ends by truncation.
        best_action: The action that is rewarded.
        actions: How many there are.
    """

    def __init__(self, length: int = 10, best_action: int = 1, actions: int = 2) -> None:
        self.length, self.best_action, self._step = length, best_action, 0
        self.observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(actions)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Passed to Gymnasium.
            options: Ignored.

        Returns:
            A zero and an empty info.
        """
        super().reset(seed=seed)
        self._step = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one step.

        Args:
            action: Rewarded where it is the best one.

        Returns:
            The fraction of the episode that is over, reward, terminated, truncated and an empty info.
        """
        self._step += 1
        progress = np.array([self._step / self.length], np.float32)
        return progress, float(action == self.best_action), False, self._step == self.length, {}


class HealthyEnv(gymnasium.Env):
    """Wander at random in a cube; right in every respect. Episodes of 6 to 13 steps end in both ways.

    Its parts are hooks, which broken environments replace.
    """

    def __init__(self) -> None:
        self.observation_space: Any = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space: Any = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._step, self._length, self._by_time = 0, 0, False
        self._position = np.zeros(3, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode.

        Args:
            seed: Decides the episode.
            options: Ignored.

        Returns:
            The first position and an info.
        """
        self._seed(seed)
        self._step = 0
        start, length, end = self._draw(3), self._draw(1), self._draw(1)
        self._position = start.astype(np.float32)
        self._length, self._by_time = 6 + int(4 * (1 + length[0])), bool(end[0] > 0)
        return self._observe(), self._info()

    def step(self, action: Any) -> Any:
        """Take one step.

        Args:
            action: Moves the position.

        Returns:
            The position, how close to the middle it is, the two flags, and an info.
        """
        self._step += 1
        self._move(action)
        over = self._step >= self._length
        return self._observe(), self._reward(), over and not self._by_time, over and self._by_time, self._info()

    def _seed(self, seed: int | None) -> None:
        super().reset(seed=seed)

    def _draw(self, size: int) -> np.ndarray:
        return self.np_random.uniform(-1, 1, size)

    def _move(self, action: Any) -> None:
        push = float(np.sum(action))
        self._position = np.clip(self._position + 0.1 * push + 0.1 * self._draw(3), -1, 1).astype(np.float32)

    def _observe(self) -> Any:
        return self._position.copy()

    def _reward(self) -> Any:
        return -float(np.abs(self._position).sum())

    def _info(self) -> Any:
        return {}
