"""Gymnasium's control tasks without their velocities: what a policy must then remember is what it saw before."""

from typing import Any

import gymnasium
from gymnasium import spaces


class MaskedVelocity(gymnasium.ObservationWrapper):
    """Leave the velocities out of an environment's observations.

    Args:
        id: Gymnasium id of an environment whose observations are vectors.
        positions: Entries of the observation that stay, in this order.
        kwargs: Arguments of the environment.
    """

    def __init__(self, id: str, positions: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(gymnasium.make(id, disable_env_checker=True, **kwargs))
        space: Any = self.env.observation_space
        self._positions = list(positions)
        self.observation_space = spaces.Box(space.low[self._positions], space.high[self._positions], dtype=space.dtype)

    def observation(self, observation: Any) -> Any:
        """Keep the positions.

        Args:
            observation: ``[D]``.

        Returns:
            ``[P]``, a copy.
        """
        return observation[self._positions]


class MaskedVelocityCartPole(MaskedVelocity):
    """Show CartPole's cart position and pole angle alone; 500 steps at most, a reward of 1 for each.

    Args:
        kwargs: Arguments of CartPole-v1.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("CartPole-v1", (0, 2), **kwargs)


class MaskedVelocityPendulum(MaskedVelocity):
    """Show the cosine and sine of the Pendulum's angle alone; episodes of 200 steps.

    Args:
        kwargs: Arguments of Pendulum-v1.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("Pendulum-v1", (0, 1), **kwargs)
