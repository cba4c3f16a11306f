"""Units say how a drawn index becomes a sample: a transition, a window of steps, a whole episode."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlfeed.errors import ConfigError, UnsupportedError
from rlfeed.replay import kernels as k

Boundary = Literal["pad", "strict", "cross"]


@dataclass(frozen=True, slots=True)
class Transition:
    """Sample n-step transitions.

    Args:
        n_step: Rewards to sum, >= 1; fewer where the episode ends before.
        gamma: Discount per step, 0 .. 1.
        relabel: A `Hindsight` for goal environments.
    """

    n_step: int = 1
    gamma: float = 0.99
    relabel: Any = None

    def __post_init__(self) -> None:
        _check(self, n_step=(self.n_step, 1), gamma=self.gamma)
        if self.relabel is not None:
            raise UnsupportedError(f"Transition: relabel is {self.relabel!r}; expected None in this version.")


@dataclass(frozen=True, slots=True)
class Sequence:
    """Sample windows of steps for recurrent learners; a start is the first *trained* step.

    Args:
        length: Steps to train on, >= 1; fewer where the episode ends before.
        burn_in: Steps before the start to warm the recurrent state with, clipped at the episode's first step.
        gamma: Discount per step, 0 .. 1.
        boundary: ``"pad"``: every stored step may start a window; ``"strict"``: only full windows; ``"cross"``:
            windows run on over the ends of episodes.
        stride: Starts every so many steps; None is 1.
    """

    length: int
    burn_in: int = 0
    gamma: float = 0.99
    boundary: Boundary = "pad"
    stride: int | None = None

    def __post_init__(self) -> None:
        _check(self, length=(self.length, 1), burn_in=(self.burn_in, 0), gamma=self.gamma)
        if self.boundary not in ("pad", "strict"):
            raise UnsupportedError(
                f"Sequence: boundary is {self.boundary!r}; expected 'pad' or 'strict' in this version."
            )
        if self.stride not in (None, 1):
            raise UnsupportedError(f"Sequence: stride is {self.stride}; expected None or 1 in this version.")


@dataclass(frozen=True, slots=True)
class Episode:
    """Sample whole episodes that ended or were cut, padded to the longest of the batch.

    Args:
        max_length: Steps; a longer episode is an error. None: any length.
        gamma: Discount per step, 0 .. 1.
    """

    max_length: int | None = None
    gamma: float = 0.99

    def __post_init__(self) -> None:
        _check(self, max_length=(self.max_length if self.max_length is not None else 1, 1), gamma=self.gamma)


Unit = Transition | Sequence | Episode


def _check(unit: Unit, *, gamma: float, **least: tuple[int, int]) -> None:
    name = type(unit).__name__
    wrong = []
    for key, (value, low) in least.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
            wrong.append(f"{key} is {value!r}; expected an int >= {low}")
    if not 0.0 <= gamma <= 1.0:
        wrong.append(f"gamma is {gamma!r}; expected 0 .. 1")
    if wrong:
        raise ConfigError(f"{name}: " + "; ".join(wrong) + ".")


def rule_of(unit: Unit) -> np.ndarray:
    """Say which rows may start a sample of a unit, to the kernels.

    Args:
        unit: The unit.

    Returns:
        ``[RULE_SIZE]`` int64.
    """
    rule = np.zeros(k.RULE_SIZE, np.int64)
    rule[k.NEED], rule[k.BACK] = 1, -1
    if isinstance(unit, Transition):
        rule[k.NEED], rule[k.PLAIN] = unit.n_step, unit.n_step == 1
    elif isinstance(unit, Sequence):
        rule[k.NEED], rule[k.BACK], rule[k.STRICT] = unit.length, unit.burn_in, unit.boundary == "strict"
    else:
        rule[k.WHOLE] = 1
    return rule


def span_of(unit: Unit) -> int:
    """Say how many rows a sample touches at most.

    Args:
        unit: The unit.

    Returns:
        Rows; 0 where that is up to the episodes.
    """
    if isinstance(unit, Transition):
        return unit.n_step + 1
    # A window touches the step before it (previous action) and the successor of its last step.
    return unit.length + unit.burn_in + 2 if isinstance(unit, Sequence) else 0


def need_of(unit: Unit) -> str:
    """Say what must be stored before a sample of a unit can be drawn.

    Args:
        unit: The unit.

    Returns:
        Words for a message.
    """
    if isinstance(unit, Episode):
        return "at least one episode that has ended and whose first step is still stored"
    if isinstance(unit, Sequence):
        return f"{unit.length} steps of one episode" + ("" if unit.boundary == "strict" else ", or an episode's end")
    if unit.n_step > 1:
        return f"an episode's end, or {unit.n_step} steps of one episode"
    return "at least one step with its successor"
