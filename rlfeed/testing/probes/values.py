"""Probes of value estimates, P1 to P9, P13 and P19: what is to be learned is the value of what is seen."""

from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from rlfeed.testing.probes.base import NOTHING, SIGNS, Actions, Answers, PushEnv, WatchEnv, shown


class ChainEnv(WatchEnv):
    """Walk from cell 0 over ``length`` steps; the last one terminates with a reward of 1 (P1, P3 and P6).

    The value of cell k is ``gamma ** (length - 1 - k)``. Two steps show a discount, eight show what two cannot: where
    rollouts are cut (use a length that does not divide 8), and the seeds of backward recursions.

    Args:
        length: Steps of every episode, at least 1.
        actions: See `WatchEnv`.
    """

    def __init__(self, length: int = 8, actions: Actions = "discrete") -> None:
        super().__init__(actions)
        self.length = length
        self.observation_space = spaces.Discrete(length + 1)

    @staticmethod
    def answers(length: int, gamma: float) -> Answers:
        """Give the value of every cell.

        Args:
            length: Of the chain.
            gamma: Discount per step.

        Returns:
            Cells ``[length]`` and their values ``[length]``.
        """
        cells = np.arange(length)
        return cells, gamma ** (length - 1.0 - cells)

    def _begin(self) -> Any:
        return np.int64(0)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        last = self.steps == self.length
        return np.int64(self.steps), float(last), last


class SignEnv(WatchEnv):
    """Show -1 or +1, and give it as the reward of the only step (P2): the value is what is seen.

    Args:
        actions: See `WatchEnv`.
    """

    observation_space = SIGNS

    def _begin(self) -> Any:
        self.sign = self._sign()
        return shown(self.sign)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        return shown(self.sign), self.sign, True


class ArmEnv(PushEnv):
    """Reward the push of the only step, with nothing to see (P4): the best pushes by +1, its value is 1.

    Args:
        actions: See `PushEnv`.
    """

    observation_space = NOTHING

    def best_action(self) -> Any:
        """Push up; see `ProbeEnv.best_action`."""
        return self.pushing(1.0)

    def _begin(self) -> Any:
        return shown(0.0)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        return shown(0.0), self.push(action), True


class MatchEnv(PushEnv):
    """Show -1 or +1, and reward a push of the same sign in the only step (P5): both have a value of 1.

    Args:
        actions: See `PushEnv`.
    """

    observation_space = SIGNS

    def best_action(self) -> Any:
        """Push as shown; see `ProbeEnv.best_action`."""
        return self.pushing(self.sign)

    def _begin(self) -> Any:
        self.sign = self._sign()
        return shown(self.sign)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        return shown(self.sign), self.sign * self.push(action), True


class EndlessEnv(WatchEnv):
    """Go round a ring of 5 cells, a reward of 1 each step, truncated after 8 (P7, and P8 in any autoreset mode).

    There is no end, so every cell's value is ``1 / (1 - gamma)``: 50 at 0.98. Truncation taken for termination makes it
    about 7. An episode's final observation is cell 3, the next one begins at cell 0.

    Args:
        actions: See `WatchEnv`.
    """

    time_limit = 8
    cells = 5
    observation_space = spaces.Discrete(cells)

    @staticmethod
    def answers(gamma: float) -> Answers:
        """Give the value of every cell.

        Args:
            gamma: Discount per step, below 1.

        Returns:
            Cells ``[5]`` and their values ``[5]``.
        """
        return np.arange(EndlessEnv.cells), np.full(EndlessEnv.cells, 1.0 / (1.0 - gamma))

    def _begin(self) -> Any:
        return np.int64(0)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        return np.int64(self.steps % self.cells), 1.0, False


class PowersEnv(WatchEnv):
    """Give a reward of ``10 ** k`` at step k of 5 (P9): the digits of a sum of rewards name the steps in it.

    With gamma 1, sums over 3 steps are 111, 1110, 11100, and at the end 11000 and 10000: every step of the episode
    begins one.

    Args:
        end: How the episode ends.
        actions: See `WatchEnv`.
    """

    length = 5
    observation_space = spaces.Discrete(length + 1)

    def __init__(self, end: Literal["terminated", "truncated"] = "terminated", actions: Actions = "discrete") -> None:
        super().__init__(actions)
        self.end = end
        self.time_limit = self.length if end == "truncated" else None

    @staticmethod
    def sums(n_step: int) -> list[float]:
        """Add the rewards of n steps, gamma 1, from every step of an episode.

        Args:
            n_step: At least 1.

        Returns:
            The sums, of fewer steps where the episode ends.
        """
        rewards = [10.0**step for step in range(PowersEnv.length)]
        return [sum(rewards[step : step + n_step]) for step in range(PowersEnv.length)]

    def _begin(self) -> Any:
        return np.int64(0)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        over = self.steps == self.length and self.end == "terminated"
        return np.int64(self.steps), 10.0 ** (self.steps - 1), over


class RandomLengthEnv(WatchEnv):
    """Last 1 to 20 steps, drawn for each episode, and give a reward of ``1 / length`` in the last one (P13).

    The observation is ``[1 / length, steps left / 20]``, so the value is
    ``gamma ** (steps left - 1) / length``, exactly.

    Args:
        actions: See `WatchEnv`.
    """

    longest = 20
    observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)

    @staticmethod
    def answers(gamma: float) -> Answers:
        """Give the value of the first observation of every length.

        Args:
            gamma: Discount per step.

        Returns:
            Observations ``[20, 2]`` and their values ``[20]``.
        """
        lengths = np.arange(1, RandomLengthEnv.longest + 1)
        seen = np.stack([1.0 / lengths, lengths / RandomLengthEnv.longest], axis=1)
        return seen.astype(np.float32), gamma ** (lengths - 1.0) / lengths

    def _begin(self) -> Any:
        self.length = int(self.np_random.integers(1, self.longest + 1))
        return self._seen()

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        last = self.steps == self.length
        return self._seen(), last / self.length, last

    def _seen(self) -> Any:
        return shown(1.0 / self.length, (self.length - self.steps) / self.longest)


class LotteryEnv(WatchEnv):
    """Pay 1 with probability 0.3 in the only step, else nothing (P19).

    The value is 0.3; a distribution over returns has a mass of 0.7 on 0 and of 0.3 on 1.

    Args:
        actions: See `WatchEnv`.
    """

    probability = 0.3
    observation_space = NOTHING

    def _begin(self) -> Any:
        return shown(0.0)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        return shown(0.0), float(self.np_random.random() < self.probability), True


def one_answer(observation: float, value: float) -> Answers:
    """Give the answer of an environment that shows one number.

    Args:
        observation: What it shows.
        value: Its value.

    Returns:
        Observations ``[1, 1]`` and values ``[1]``.
    """
    return np.array([[observation]], np.float32), np.array([value])


def sign_answers(minus: float, plus: float) -> Answers:
    """Give the answers of an environment that shows -1 or +1.

    Args:
        minus: The value of -1.
        plus: The value of +1.

    Returns:
        Observations ``[2, 1]`` and values ``[2]``.
    """
    return np.array([[-1.0], [1.0]], np.float32), np.array([minus, plus])
