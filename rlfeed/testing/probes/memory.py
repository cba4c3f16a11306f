"""Probes of what is fed back, P10 to P12 and P17: the carry, the previous action and reward, and their reset."""

from typing import Any

import numpy as np
from gymnasium import spaces

from rlfeed.testing.probes.base import NOTHING, SIGNS, Actions, ProbeEnv, PushEnv, shown


class RecallEnv(PushEnv):
    """Show -1 or +1 once, then nothing for ``delay`` steps; the last push is rewarded where it has that sign (P10).

    An agent that remembers reaches 1, a memoryless one stays at 0. The reward is ``cue * push``, of the last step.

    Args:
        delay: Steps between the cue and the push that counts, at least 1: 30 is more than a usual burn-in, so it needs
            the stored carry as well.
        actions: See `PushEnv`.
    """

    observation_space = SIGNS

    def __init__(self, delay: int = 5, actions: Actions = "discrete") -> None:
        super().__init__(actions)
        self.delay = delay

    def best_action(self) -> Any:
        """Push as the cue said; see `ProbeEnv.best_action`."""
        return self.pushing(self.cue)

    def _begin(self) -> Any:
        self.cue = self._sign()
        return shown(self.cue)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        last = self.steps > self.delay
        return shown(0.0), self.cue * self.push(action) * last, last


class LeakEnv(PushEnv):
    """Reward what can only be known from the episode before (P11): an agent whose reset is whole has a mean of 0.

    The first observation is 0, and the first push is rewarded by ``previous cue * push``. Then the episode's own cue is
    shown, -1 or +1, and the second step gives a tenth of it as its reward and ends the episode. So the cue is in the
    carry, in the last reward, in the last frame, and in the last action if the agent likes; whatever of these is not
    reset lets it reach a mean of 1. More than 0.2 is a leak.

    An episode depends on the one before it, on purpose: `check_env` notes that.

    Args:
        actions: See `PushEnv`.
    """

    observation_space = SIGNS
    _last_cue: float | None = None

    def best_action(self) -> Any:
        """Push as the episode before said, which nobody may know; see `ProbeEnv.best_action`."""
        return self.pushing(self.previous_cue)

    def _begin(self) -> Any:
        self.cue, unseen = self._sign(), self._sign()
        self.previous_cue = unseen if self._last_cue is None else self._last_cue
        self._last_cue = self.cue
        return shown(0.0)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        if self.steps == 1:
            return shown(self.cue), self.previous_cue * self.push(action), False
        return shown(0.0), 0.1 * self.cue, True


class AlternateEnv(ProbeEnv):
    """Reward every action that differs from the one before, with nothing to see, for 10 steps (P12).

    Before the first action stands action 0, as the previous action that an agent is fed is zero there. An agent that
    is fed its previous action reaches 10 however it explores; one that has learned a clock loses its place with each
    random action. Truncated: more could follow.
    """

    time_limit = 10
    observation_space = NOTHING
    action_space = spaces.Discrete(2)

    def best_action(self) -> Any:
        """Change over; see `ProbeEnv.best_action`."""
        return np.int64(1 - self.previous_action)

    def _begin(self) -> Any:
        self.previous_action = 0
        return shown(0.0)

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        differs = int(action) != self.previous_action
        self.previous_action = int(action)
        return shown(0.0), float(differs), False


class CorridorEnv(PushEnv):
    """Walk from the middle of a corridor to the end that was shown to be good (P17).

    The observation is ``[left, position, right]``, the outer two with +1 for the good end and -1 for the bad one, at
    the first two observations only, during which nobody moves; afterwards they are 0. Each push moves by a fifth of
    the way. A step costs 0.1, arriving gives +1 or -1 instead; after 30 steps the episode is truncated. The best return
    is 0.4; straight to an end that a coin decides makes -0.6 in the mean. The info tells ``is_success``.

    Source:
        Pleines et al. 2023, Memory Gym (their proof-of-concept environment, with the walk held back while the cue is
        visible and the start in the middle).

    Args:
        actions: See `PushEnv`.
    """

    time_limit = 30
    cue_steps = 2
    cells = 5
    observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)

    def best_action(self) -> Any:
        """Walk to the good end; see `ProbeEnv.best_action`."""
        return self.pushing(self.good)

    def _begin(self) -> Any:
        self.good, self.position = self._sign(), 0
        return self._seen()

    def _move(self, action: Any) -> tuple[Any, float, bool]:
        if self.steps > self.cue_steps:
            self.position += 1 if self.push(action) > 0 else -1
        arrived = abs(self.position) == self.cells
        return self._seen(), self.good * self.position / self.cells if arrived else -0.1, arrived

    def _seen(self) -> Any:
        cue = self.good if self.steps < self.cue_steps else 0.0
        return shown(-cue, self.position / self.cells, cue)

    def _info(self) -> dict[str, Any]:
        arrived = abs(self.position) == self.cells
        over = arrived or self.steps == self.time_limit
        return {"is_success": arrived and self.position * self.good > 0} if over else {}
