"""Environments that are broken in one way each, and what `check_env` says of them.

Each is `HealthyEnv` with one hook, or one method, done as people do it wrong. Most can be combined:
``type("Both", (NaNObservation, ArrayReward), {})`` has both faults.
"""

import os
import random
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from rlfeed.testing.environments import LATE_STEP, HealthyEnv
from rlfeed.testing.failing import (
    CallsExit,
    CannotBeClosedTwice,
    CannotBeMade,
    ChangesActionSpace,
    ChangesFolder,
    Crashes,
    EmptyMask,
    EndsTheProcess,
    Hangs,
    MaskAtResetOnly,
    NoActionSpace,
    RaisesAtEdge,
    RaisesLater,
    ShortMask,
    StateOneWay,
    StateWithoutGenerator,
    TextObservation,
    one_for_all,
)

# What it returns.


class NaNObservation(HealthyEnv):
    """Return NaN in a later step."""

    def _observe(self) -> Any:
        observation = super()._observe()
        if self._step >= LATE_STEP:
            observation.flat[1] = np.nan
        return observation


class WideObservation(HealthyEnv):
    """Return float64 under a space of float32."""

    def _observe(self) -> Any:
        return super()._observe().astype(np.float64)


class ShapeChanges(HealthyEnv):
    """Return another shape in a later step."""

    def _observe(self) -> Any:
        observation = super()._observe()
        return np.append(observation, observation[:1]) if self._step >= LATE_STEP else observation


class OutsideSpace(HealthyEnv):
    """Return a value outside the bounds in a later step."""

    def _observe(self) -> Any:
        observation = super()._observe()
        if self._step >= LATE_STEP:
            observation[0] = 7
        return observation


class ResetOutsideSpace(HealthyEnv):
    """Return a value outside the bounds from ``reset`` alone."""

    def _observe(self) -> Any:
        observation = super()._observe()
        if not self._step:
            observation[0] = -7
        return observation


class MissingKey(HealthyEnv):
    """Leave a key out of a nested observation in a later step."""

    def __init__(self) -> None:
        super().__init__()
        inner = spaces.Dict(left=self.observation_space, right=self.observation_space)
        self.observation_space = spaces.Dict(arm=inner)

    def _observe(self) -> Any:
        arm = {"left": super()._observe(), "right": super()._observe()}
        if self._step >= LATE_STEP:
            del arm["right"]
        return {"arm": arm}


class DiscreteOutside(HealthyEnv):
    """Return n from a ``Discrete(n)``, whose values end at n - 1."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Discrete(LATE_STEP)

    def _observe(self) -> Any:
        return min(self._step, LATE_STEP)


class TensorObservation(HealthyEnv):
    """Return a tensor."""

    def _observe(self) -> Any:
        return torch.from_numpy(super()._observe())


class ArrayReward(HealthyEnv):
    """Return the reward as an array of one element."""

    def _reward(self) -> Any:
        return np.array([super()._reward()])


class NaNReward(HealthyEnv):
    """Return a reward of NaN in a later step."""

    def _reward(self) -> Any:
        return float("nan") if self._step >= LATE_STEP else super()._reward()


class NoReward(HealthyEnv):
    """Forget the reward."""

    def _reward(self) -> Any:
        return None


class IntegerFlags(HealthyEnv):
    """Return 0 and 1 for the flags."""

    def step(self, action: Any) -> Any:
        """See `HealthyEnv`."""
        observation, reward, terminated, *rest = super().step(action)
        return observation, reward, int(terminated), *rest


class FourValues(HealthyEnv):
    """Return four values from ``step``, as the old gym did."""

    def step(self, action: Any) -> Any:
        """See `HealthyEnv`."""
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, info


class BareReset(HealthyEnv):
    """Return the observation alone from ``reset``, as the old gym did."""

    def reset(self, **kwargs: Any) -> Any:
        """See `HealthyEnv`."""
        return super().reset(**kwargs)[0]


class NoInfo(HealthyEnv):
    """Return None for the info."""

    def _info(self) -> Any:
        return None


class SuccessInWords(HealthyEnv):
    """Tell success in words."""

    def _info(self) -> Any:
        return {"is_success": "yes"}


# Whose memory it is.


class ReusesArray(HealthyEnv):
    """Return one and the same array, overwritten, from every step."""

    def _observe(self) -> Any:
        self._array = getattr(self, "_array", np.zeros(3, np.float32))
        self._array[:] = self._position
        return self._array


class GivesItsMemoryAway(HealthyEnv):
    """Return the array that it goes on computing with."""

    def _observe(self) -> Any:
        return self._position


class WritesIntoAction(HealthyEnv):
    """Scale the action in place."""

    def _move(self, action: Any) -> None:
        action *= 0.5
        super()._move(action)


# Where its randomness comes from.


class GlobalNumPy(HealthyEnv):
    """Draw from NumPy's global generator."""

    def _draw(self, size: int) -> np.ndarray:
        return np.random.uniform(-1, 1, size)  # noqa: NPY002


class GlobalRandom(HealthyEnv):
    """Draw from Python's global generator."""

    def _draw(self, size: int) -> np.ndarray:
        return np.array([random.uniform(-1, 1) for _ in range(size)])


class SeedsTheWorld(HealthyEnv):
    """Seed NumPy's global generator, which others draw from."""

    def _seed(self, seed: int | None) -> None:
        super()._seed(seed)
        np.random.seed(seed)  # noqa: NPY002


class ForgetsSeed(HealthyEnv):
    """Not hand the seed to ``super().reset``."""

    def _seed(self, seed: int | None) -> None:
        super()._seed(None)


class TakesNoSeed(HealthyEnv):
    """Have a ``reset`` without arguments, as the old gym did."""

    def reset(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `HealthyEnv`."""
        return super().reset()


class NeedsSeed(HealthyEnv):
    """Compute with the seed, which may be None."""

    def _seed(self, seed: int | None) -> None:
        super()._seed(seed + 1)  # pyright: ignore[reportOptionalOperand]


class OwnEntropy(HealthyEnv):
    """Draw from a generator of its own, which no seed reaches."""

    def __init__(self) -> None:
        super().__init__()
        self._own = np.random.default_rng()

    def _draw(self, size: int) -> np.ndarray:
        return self._own.uniform(-1, 1, size)


class ConstantSeed(HealthyEnv):
    """Begin again with one and the same seed where none is given."""

    def _seed(self, seed: int | None) -> None:
        super()._seed(42 if seed is None else seed)


class NewEntropy(HealthyEnv):
    """Make a new generator in every ``reset``."""

    def _seed(self, seed: int | None) -> None:
        super()._seed(seed)
        self.np_random = np.random.default_rng(seed)
        self._np_random_seed = seed


class SharesItsState(HealthyEnv):
    """Keep in the class what each object should keep."""

    shared: ClassVar[dict[str, np.ndarray]] = {}

    def _observe(self) -> Any:
        if not self._step:
            self.shared["position"] = self._position
        return self.shared["position"].copy()

    def _move(self, action: Any) -> None:
        self._position = self.shared["position"]
        super()._move(action)
        self.shared["position"] = self._position


class DependsOnItsProcess(HealthyEnv):
    """Be another environment in every process."""

    def _move(self, action: Any) -> None:
        super()._move(action * np.sin(os.getpid()))


class RemembersEpisodes(HealthyEnv):
    """Not begin anew in ``reset``: a counter goes on."""

    _total = 0

    def _move(self, action: Any) -> None:
        self._total += 1
        super()._move(np.sin(self._total))


# Name: what makes it, and words of what is found, for errors.
BROKEN: dict[str, tuple[Callable[[], gymnasium.Env], str]] = {
    "NaN observation": (NaNObservation, "observation[1] is nan"),
    "wide observation": (WideObservation, "observation has dtype float64 but its space says float32"),
    "shape changes": (ShapeChanges, "observation has shape (4,) but its space says (3,)"),
    "outside space": (OutsideSpace, "observation[0] is 7.0, outside -1.0 to 1.0"),
    "reset outside space": (ResetOutsideSpace, "observation[0] is -7.0, outside -1.0 to 1.0"),
    "missing key": (MissingKey, 'observation["arm"] has the keys [\'left\']'),
    "Discrete outside": (DiscreteOutside, "observation is 4, outside 0 to 3"),
    "tensor observation": (TensorObservation, "observation is a torch.Tensor"),
    "array reward": (ArrayReward, "reward must be a scalar, got shape (1,)"),
    "NaN reward": (NaNReward, "reward is nan"),
    "no reward": (NoReward, "reward is None, a NoneType"),
    "integer flags": (IntegerFlags, "terminated is 0, a int"),
    "four values": (FourValues, "step() returned 4 values"),
    "bare reset": (BareReset, "reset() returned a ndarray"),
    "no info": (NoInfo, "info of "),
    "success in words": (SuccessInWords, "info[\"is_success\"] is 'yes'"),
    "reuses array": (ReusesArray, "step() wrote into the observation that it had returned before"),
    "writes into action": (WritesIntoAction, "step() wrote into its action"),
    "global NumPy": (GlobalNumPy, "uses NumPy's np.random"),
    "global random": (GlobalRandom, "uses Python's random"),
    "seeds the world": (SeedsTheWorld, "reset() uses NumPy's np.random"),
    "forgets seed": (ForgetsSeed, "self.np_random is used and was not seeded"),
    "takes no seed": (TakesNoSeed, "takes no seed"),
    "needs seed": (NeedsSeed, "raised TypeError: unsupported operand"),
    "own entropy": (OwnEntropy, "the same seed and actions gave something else in a second environment"),
    "constant seed": (ConstantSeed, "began the same episode"),
    "new entropy": (NewEntropy, "is not decided by the seed of the reset before it"),
    "shares its state": (SharesItsState, "two environments stepped in turn disturb each other"),
    "raises later": (RaisesLater, "step() raised ZeroDivisionError"),
    "raises at the edge": (RaisesAtEdge, "step() raised IndexError for the action ["),
    "changes folder": (ChangesFolder, "step() changes the working directory"),
    "calls exit": (CallsExit, "step() raised SystemExit"),
    "ends the process": (EndsTheProcess, "the process ended with exit code 3"),
    "crashes": (Crashes, "the process was killed by SIGSEGV"),
    "hangs": (Hangs, "did not return within"),
    "cannot be made": (CannotBeMade, "its constructor raised ValueError"),
    "cannot be closed twice": (CannotBeClosedTwice, "the second close() raised OSError"),
    "no action space": (NoActionSpace, "action_space is missing"),
    "text observation": (TextObservation, "is Text("),
    "changes action space": (ChangesActionSpace, "action_space has become"),
    "short mask": (ShortMask, 'info["action_mask"] is array([ True,  True])'),
    "empty mask": (EmptyMask, 'info["action_mask"] allows no action'),
    "mask at reset only": (MaskAtResetOnly, '"action_mask" is missing here'),
    "state without generator": (StateWithoutGenerator, "after set_state(get_state()) the same actions"),
    "state one way": (StateOneWay, "has get_state() and no set_state()"),
    "one for all": (one_for_all(), "called twice it gave the same object"),
}
