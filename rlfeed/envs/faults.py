"""What becomes of a run whose environment breaks: it goes on with a new episode, for so long."""

import time
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Literal

from rlfeed.errors import ConfigError, RlfeedError, suggest

OnFault = Literal["raise", "restart"]
ON_FAULT = ("raise", "restart")
MAX_RESTARTS = 5  # in a row
KEPT = 100  # faults that are kept to look at
_FORGET_S = 600.0  # without a fault
_FIRST_WAIT_S, _MOST_WAIT_S = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class Fault:
    """Describe how an environment broke.

    Args:
        env_id: The environment.
        episode: The number of its episode, which was cut.
        error: What happened: where, the last action, the environment's own traceback or the signal.
        time_s: When, on the monotonic clock.
    """

    env_id: int
    episode: int
    error: RlfeedError
    time_s: float


class FaultPolicy:
    """Decide whether a run goes on when an environment breaks, and say so.

    An environment is given up that breaks again and again: more than so many times without an episode that comes to
    its end, or ten minutes, in between. Before it is begun anew there is a pause that doubles every time.

    Args:
        name: What the environments are called.
        on_fault: ``"raise"`` at once, or ``"restart"``.
        max_restarts: How often in a row one environment is begun anew.

    Raises:
        ConfigError: If an argument is wrong.
    """

    def __init__(self, name: str, on_fault: OnFault, max_restarts: int) -> None:
        if on_fault not in ON_FAULT:
            raise ConfigError(
                f"make_envs: on_fault is {on_fault!r}; expected one of {ON_FAULT}.{suggest(str(on_fault), ON_FAULT)}"
            )
        if isinstance(max_restarts, bool) or not isinstance(max_restarts, int) or max_restarts < 0:
            raise ConfigError(f"make_envs: max_restarts is {max_restarts!r}; expected an integer of at least 0.")
        self.name, self.on_fault, self.max_restarts = name, on_fault, max_restarts
        self.faults: deque[Fault] = deque(maxlen=KEPT)
        self._in_a_row: dict[int, tuple[int, float]] = {}  # how often, and when last

    def meet(self, env_id: int, episode: int, error: RlfeedError, besides: str = "") -> None:
        """Take note of a fault; returns when the environment may be begun anew.

        Args:
            env_id: The environment.
            episode: The number of its episode.
            error: What happened.
            besides: What else that costs, for the warning.

        Raises:
            RlfeedError: The fault itself, where the run cannot go on.
        """
        now_s = time.monotonic()
        self.faults.append(Fault(env_id, episode, error, now_s))
        if self.on_fault == "raise":
            raise error
        times, last_s = self._in_a_row.get(env_id, (0, now_s))
        times = 1 if now_s - last_s > _FORGET_S else times + 1
        self._in_a_row[env_id] = (times, now_s)
        if times > self.max_restarts:
            raise type(error)(
                f"{error}\nEnv {env_id} broke {times} times in a row, max_restarts is {self.max_restarts}: it is not "
                "begun anew."
            )
        warnings.warn(
            f"{error}\nIts episode is cut and a new one begins (restart {times} of {self.max_restarts} in a row)."
            f"{besides}",
            RuntimeWarning,
            stacklevel=3,
        )
        if times > 1:
            time.sleep(min(_FIRST_WAIT_S * 2 ** (times - 2), _MOST_WAIT_S))

    def ended(self, env_ids: list[int]) -> None:
        """Take note of episodes that came to their end.

        Args:
            env_ids: In which environments.
        """
        if self._in_a_row:
            for env_id in env_ids:
                self._in_a_row.pop(env_id, None)
