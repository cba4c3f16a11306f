"""An environment as a user would write it in a file: Dict observations, both kinds of ends; it can end its process."""

import os
import signal

import gymnasium
import numpy as np
from gymnasium import spaces

SIGNAL, AT = "TWO_ENDS_SIGNAL", "TWO_ENDS_AT"
taken = 0  # steps of this process, over all environments


class TwoEnds(gymnasium.Env):
    """Walk left or right on a line, shown as a position and as a picture.

    The right end terminates with a reward of 1; ``max_steps`` truncates. At step ``TWO_ENDS_AT`` of the process it
    sends itself the signal ``TWO_ENDS_SIGNAL``.
    """

    def __init__(self, size: int = 6, max_steps: int = 20, name: str = "line") -> None:
        self.size, self.max_steps, self.name = size, max_steps, name
        self.observation_space = spaces.Dict(
            {
                "position": spaces.Box(0, size, (1,), np.float32),
                "picture": spaces.Box(0, 255, (8, 8, 1), np.uint8),
                "parity": spaces.Discrete(2),
            }
        )
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = int(self.np_random.integers(0, 2)), 0
        return self._observation(), {}

    def step(self, action):
        global taken
        taken += 1
        if taken == int(os.environ.get(AT, "-1")):
            os.kill(os.getpid(), getattr(signal, os.environ[SIGNAL]))
        self.steps += 1
        self.at = max(0, self.at + (1 if action == 1 else -1))
        arrived = self.at == self.size
        return self._observation(), float(arrived), arrived, self.steps == self.max_steps, {}

    def _observation(self):
        picture = np.zeros((8, 8, 1), np.uint8)
        picture[self.at, self.at] = 255
        return {"position": np.array([self.at], np.float32), "picture": picture, "parity": np.int64(self.at % 2)}


class NoEnvironment:
    """Not a `gymnasium.Env`."""


class Breaks(gymnasium.Env):
    """An environment whose constructor raises."""

    def __init__(self) -> None:
        raise KeyError("no such map")


class Says(gymnasium.Env):
    """An environment whose observations cannot be stored."""

    observation_space = spaces.Dict({"position": spaces.Box(0, 1, (2,)), "says": spaces.Text(4)})
    action_space = spaces.Discrete(2)
