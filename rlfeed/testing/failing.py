"""Environments that fail, lack something, or tell of masks and states wrongly, in one way each; see `BROKEN`."""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rlfeed.testing.environments import LATE_STEP, HealthyEnv


class RaisesLater(HealthyEnv):
    """Divide by zero in a later step."""

    def _move(self, action: Any) -> None:
        super()._move(action)
        self._speed = 1 // int(self._step < LATE_STEP)


class RaisesAtEdge(HealthyEnv):
    """Have one gear too few for the greatest action of all."""

    def _move(self, action: Any) -> None:
        self._gear = ("low", "high")[int(1 + action[0])]
        super()._move(action)


class ChangesFolder(HealthyEnv):
    """Go to another working directory."""

    def _move(self, action: Any) -> None:
        super()._move(action)
        os.chdir("/")


class CallsExit(HealthyEnv):
    """Call ``sys.exit`` in a later step."""

    def _move(self, action: Any) -> None:
        super()._move(action)
        if self._step >= LATE_STEP:
            sys.exit("game over")


class EndsTheProcess(HealthyEnv):
    """End the process in a later step."""

    def _move(self, action: Any) -> None:
        super()._move(action)
        if self._step >= LATE_STEP:
            os._exit(3)


class Crashes(HealthyEnv):
    """Read from address zero in a later step."""

    def _move(self, action: Any) -> None:
        super()._move(action)
        if self._step >= LATE_STEP:
            ctypes.string_at(0)


class Hangs(HealthyEnv):
    """Never return from a later step."""

    def _move(self, action: Any) -> None:
        super()._move(action)
        while self._step >= LATE_STEP:
            time.sleep(0.01)


class CannotBeMade(HealthyEnv):
    """Raise in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        raise ValueError("no licence")


class CannotBeClosedTwice(HealthyEnv):
    """Raise when it is closed again."""

    _open = True

    def close(self) -> None:
        """See `HealthyEnv`."""
        if not self._open:
            raise OSError("not open")
        self._open = False


# Its spaces, masks and state.


class NoActionSpace(HealthyEnv):
    """Have no action space."""

    def __init__(self) -> None:
        super().__init__()
        del self.action_space


class TextObservation(HealthyEnv):
    """Have a part that is no array."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Dict(word=spaces.Text(5), position=self.observation_space)

    def _observe(self) -> Any:
        return {"word": "left", "position": super()._observe()}


class ChangesActionSpace(HealthyEnv):
    """Change its action space in an episode."""

    def _move(self, action: Any) -> None:
        super()._move(action)
        if self._step >= LATE_STEP:
            self.action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)


class _Masked(HealthyEnv):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Discrete(3)

    def _info(self) -> Any:
        return {"action_mask": self._mask()}

    def _mask(self) -> Any:
        return np.array([True, True, False])


class ShortMask(_Masked):
    """Give a mask for fewer actions than there are."""

    def _mask(self) -> Any:
        return super()._mask()[:2]


class EmptyMask(_Masked):
    """Allow no action in a later step, although the episode goes on."""

    def _mask(self) -> Any:
        return super()._mask() & (self._step < LATE_STEP)


class MaskAtResetOnly(_Masked):
    """Give a mask with ``reset`` alone."""

    def _info(self) -> Any:
        return {} if self._step else super()._info()


class StateWithoutGenerator(HealthyEnv):
    """Leave the generator out of the state."""

    def get_state(self) -> Any:
        """Give the state, without the generator.

        Returns:
            Position and counters.
        """
        return self._position.copy(), self._step, self._length, self._by_time

    def set_state(self, state: Any) -> None:
        """Go back to a state.

        Args:
            state: What `get_state` gave.
        """
        self._position, self._step, self._length, self._by_time = state


class StateOneWay(HealthyEnv):
    """Give its state and not take it back."""

    def get_state(self) -> Any:
        """Give the state.

        Returns:
            The position.
        """
        return self._position.copy()


def one_for_all() -> Callable[[], gymnasium.Env]:
    """Make a factory that gives the same object in every call.

    Returns:
        The factory.
    """
    env = HealthyEnv()
    return lambda: env
