"""Probes of continuous control, P14 to P16: answers in closed form."""

from typing import Any

import numpy as np
from gymnasium import spaces

from rlfeed.testing.probes.base import NOTHING, Answers, ProbeEnv, shown


class RegulatorEnv(ProbeEnv):
    """Bring a number to zero: ``x' = x + u`` with a reward of ``-(x ** 2 + u ** 2)``, no noise (P14).

    x begins at -1 to 1, and u is -1 to 1. With gamma 0.9 the best is ``u = -0.588403 x``, with the value
    ``-1.588403 x ** 2``: in general p = 1 + gamma p / (1 + gamma p), u = -(p - 1) x, value -p x^2. Truncated after 5
    steps. Walls at -2 and 2, which the best policy never touches, bound what an explorer can see.
    """

    time_limit = 5
    wall = 2.0
    observation_space = spaces.Box(-wall, wall, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    gamma = 0.9

    @staticmethod
    def curvature(gamma: float) -> float:
        """Solve the Riccati equation.

        Args:
            gamma: Discount per step, 0 to 1.

        Returns:
            p, so that the value of x is ``-p x ** 2``.
        """
        # gamma p^2 + (1 - 2 gamma) p - 1 = 0
        half = (1.0 - 2.0 * gamma) / (2.0 * gamma)
        return -half + (half**2 + 1.0 / gamma) ** 0.5

    @staticmethod
    def answers(gamma: float) -> Answers:
        """Give values over the range in which episodes begin.

        Args:
            gamma: Discount per step, above 0.

        Returns:
            Observations ``[9, 1]`` and their values ``[9]``.
        """
        x = np.linspace(-1.0, 1.0, 9)
        return x[:, None].astype(np.float32), -RegulatorEnv.curvature(gamma) * x**2

    def best_action(self) -> Any:
        """Go most of the way to zero, the best for gamma 0.9; see `ProbeEnv.best_action`."""
        return shown((1.0 - self.curvature(self.gamma)) * self.x)

    def _begin(self) -> Any:
        self.x = float(self.np_random.uniform(-1.0, 1.0))
        return shown(self.x)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        u = float(action[0])
        reward = -(self.x**2 + u**2)
        self.x = float(np.clip(self.x + u, -self.wall, self.wall))
        return shown(self.x), reward, False


class OffsetEnv(ProbeEnv):
    """Find the action 2 in a space from -1 to 3: the reward of the only step is ``-(action - 2) ** 2`` (P15).

    The space is not symmetric about 0: an agent that acts in -1 to 1 reaches 2 only where it is rescaled.
    """

    best = 2.0
    observation_space = NOTHING
    action_space = spaces.Box(-1.0, 3.0, (1,), np.float32)

    def best_action(self) -> Any:
        """Give 2; see `ProbeEnv.best_action`."""
        return shown(self.best)

    def _begin(self) -> Any:
        return shown(0.0)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        return shown(0.0), -((float(action[0]) - self.best) ** 2), True


class TemperatureEnv(ProbeEnv):
    """Play for entropy: the reward of the only step is ``-action ** 2``, or always 0 (P16).

    The soft optimum at temperature alpha is a Gaussian of variance alpha / 2 about 0, so a temperature that is tuned to
    an entropy H comes to ``alpha = exp(2 H - 1) / pi``: 0.01585 at H = -1 (sigma 0.0890), 0.04308 at H = -0.5 (sigma
    0.1468). Where the reward is always 0, the entropy is above its target for nothing: the temperature falls to 0, and
    the entropy comes to log 2, that of the uniform distribution.

    Args:
        flat: Whether the reward is always 0.
    """

    observation_space = NOTHING
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, flat: bool = False) -> None:
        self.flat = flat

    @staticmethod
    def temperature(entropy: float) -> float:
        """Find the temperature at which the best policy has an entropy.

        Args:
            entropy: Of the Gaussian, in nats, well below log 2: its tails are not cut off by the bounds.

        Returns:
            alpha.
        """
        return float(np.exp(2.0 * entropy - 1.0) / np.pi)

    def best_action(self) -> Any:
        """Give 0; see `ProbeEnv.best_action`."""
        return shown(0.0)

    def _begin(self) -> Any:
        return shown(0.0)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        return shown(0.0), 0.0 if self.flat else -(float(action[0]) ** 2), True
