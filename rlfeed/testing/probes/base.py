"""What every probe is made of: an environment with hidden answers, and what is known of it."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float32, Float64, Shaped
from numpy import ndarray

Actions: TypeAlias = Literal["discrete", "continuous"]
Answers: TypeAlias = tuple[Shaped[ndarray, "rows ..."], Float64[ndarray, " rows"]]

NOTHING = spaces.Box(0.0, 1.0, (1,), np.float32)  # of environments that show nothing: always 0
SIGNS = spaces.Box(-1.0, 1.0, (1,), np.float32)


class ProbeEnv(gymnasium.Env):
    """Play a probe: a subclass says how its episodes begin and what a step does.

    Everything is drawn from the seed of ``reset``. Where the row of a probe has a time limit, the episode is truncated
    by it, and no observation tells the time.
    """

    time_limit: int | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Decides the episode.
            options: Ignored.

        Returns:
            The first observation and an empty info.
        """
        super().reset(seed=seed)
        self.steps = 0
        return self._begin(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one step.

        Args:
            action: Of the action space.

        Returns:
            Observation, reward, terminated, truncated and an info.
        """
        self.steps += 1
        observation, reward, terminated = self._move(action)
        return observation, float(reward), bool(terminated), self.steps == self.time_limit, self._info()

    @abstractmethod
    def best_action(self) -> Any:
        """Look behind the scenes for the best action now.

        Returns:
            An action of the action space.
        """

    @abstractmethod
    def _begin(self) -> Any:
        """Give the first observation."""

    @abstractmethod
    def _move(self, action: Any) -> tuple[Any, float, bool]:
        """Give observation, reward and terminated."""

    def _info(self) -> dict[str, Any]:
        return {}

    def _sign(self) -> float:
        return 1.0 if self.np_random.random() < 0.5 else -1.0


class PushEnv(ProbeEnv):
    """Take actions as a push from -1 to 1, in a form for each kind of agent.

    Args:
        actions: ``"discrete"``: action 0 pushes by -1 and 1 by +1; ``"continuous"``: the action is the push.
    """

    def __init__(self, actions: Actions = "discrete") -> None:
        continuous = actions == "continuous"
        self.action_space: Any = spaces.Box(-1.0, 1.0, (1,), np.float32) if continuous else spaces.Discrete(2)

    def push(self, action: Any) -> float:
        """Translate an action.

        Args:
            action: Of the action space.

        Returns:
            The push, -1 to 1.
        """
        return float(action[0]) if isinstance(self.action_space, spaces.Box) else 2.0 * int(action) - 1.0

    def pushing(self, push: float) -> Any:
        """Find the action of a push.

        Args:
            push: -1 or 1.

        Returns:
            The action.
        """
        return np.array([push], np.float32) if isinstance(self.action_space, spaces.Box) else np.int64(push > 0)


class WatchEnv(ProbeEnv):
    """Ignore actions: only the value of what is seen can be learned.

    Args:
        actions: ``"discrete"``: there is a single action; ``"continuous"``: -1 to 1.
    """

    def __init__(self, actions: Actions = "discrete") -> None:
        continuous = actions == "continuous"
        self.action_space: Any = spaces.Box(-1.0, 1.0, (1,), np.float32) if continuous else spaces.Discrete(1)

    def best_action(self) -> Any:
        """Give any action; see `ProbeEnv.best_action`."""
        return np.zeros(1, np.float32) if isinstance(self.action_space, spaces.Box) else np.int64(0)


def shown(*values: float) -> Float32[ndarray, " values"]:
    """Make an observation.

    Args:
        values: What it shows.

    Returns:
        ``[values]`` float32, an array of its own.
    """
    return np.array(values, np.float32)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Hold what is known of a probe.

    Args:
        make: The environment's class, or what makes it; takes ``actions`` where both kinds are listed.
        isolates: What is broken in an agent that fails here and passes the probes before.
        actions: The kinds of action space that it comes in.
        needs_memory: Whether only an agent with a carry can reach ``best_return``.
        answers: Called with a discount per step; gives observations ``[rows, ...]`` and the value of each under the
            best policy. None where a value cannot be told from one observation, or by hand.
        best_return: Undiscounted return of an episode under the best policy, in the mean over episodes.
        passes_at: Mean return of greedy episodes from which on the probe is passed; None where policies are all alike.
        fails_at: Mean return of greedy episodes from which on the probe is failed: the agent knows what it cannot know.
        tolerance: By how much a learned value may differ from the answer.
        gamma: The discount with which the probe is usually played.
    """

    make: Callable[..., ProbeEnv]
    isolates: str
    actions: tuple[Actions, ...] = ("discrete", "continuous")
    needs_memory: bool = False
    answers: Callable[[float], Answers] | None = None
    best_return: float
    passes_at: float | None = None
    fails_at: float | None = None
    tolerance: float = 0.1
    gamma: float = 0.9
