"""Schedules: pure functions of env_steps, so that a resumed run continues them without any state."""

from dataclasses import dataclass

from rlfeed.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Linear:
    """Go from one value to another in a straight line, then stay.

    Args:
        start: The value at env step 0.
        end: The value from ``over`` on.
        over: Env steps the way takes, at least 1.

    Raises:
        ConfigError: If ``over`` is less than 1.
    """

    start: float
    end: float
    over: int

    def __post_init__(self) -> None:
        if self.over < 1:
            raise ConfigError(f"Linear.over: is {self.over} env steps; expected at least 1.")

    def __call__(self, env_steps: int) -> float:
        """Give the value at a step.

        Args:
            env_steps: Steps taken, summed over environments.

        Returns:
            The value.
        """
        return self.start + (self.end - self.start) * min(env_steps / self.over, 1.0)


@dataclass(frozen=True, slots=True)
class Rounds:
    """Count the rounds of work that are due: one at ``first`` env steps and one more every ``every`` steps.

    Where several environments step at once the clock jumps over a round's exact step; the round is due at the first
    count that reaches it, and none is missed.

    Args:
        every: Env steps from round to round, at least 1.
        first: Env steps before the first round; default ``every``.

    Raises:
        ConfigError: If ``every`` is less than 1.
    """

    every: int
    first: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"Rounds.every: is {self.every} env steps; expected at least 1.")

    def due(self, env_steps: int) -> int:
        """Count the rounds that are due by a step.

        Args:
            env_steps: Steps taken, summed over environments.

        Returns:
            How many, from the beginning of the run.
        """
        return max(0, (env_steps - self._first) // self.every + 1)

    def next(self, env_steps: int) -> int:
        """Say when the next round is due.

        Args:
            env_steps: Steps taken, summed over environments.

        Returns:
            The first step after ``env_steps`` at which one more round is due.
        """
        return self._first + self.due(env_steps) * self.every

    @property
    def _first(self) -> int:
        return self.every if self.first is None else self.first
