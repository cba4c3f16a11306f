"""Units say how a drawn index becomes a sample: a transition, a window of steps, a whole episode."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from rlfeed.errors import ConfigError
from rlfeed.replay import kernels as k
from rlfeed.replay.samplers import Hindsight, Mixture, Prioritized, Sampler
from rlfeed.replay.storage import Storage

Boundary = Literal["pad", "strict", "cross"]


@dataclass(frozen=True, slots=True)
class Transition:
    """Sample n-step transitions.

    Args:
        n_step: Rewards to sum, >= 1; fewer where the episode ends before.
        gamma: Discount per step, 0 .. 1.
        relabel: Goals in hindsight, for goal environments: then only episodes that ended or were cut are sampled.
    """

    n_step: int = 1
    gamma: float = 0.99
    relabel: Hindsight | None = None

    def __post_init__(self) -> None:
        _check(self, n_step=(self.n_step, 1), gamma=self.gamma)
        if self.relabel is not None and not isinstance(self.relabel, Hindsight):
            raise ConfigError(f"Transition: relabel is {self.relabel!r}; expected None or a Hindsight.")


@dataclass(frozen=True, slots=True)
class Sequence:
    """Sample windows of steps for recurrent learners; a start is the first *trained* step.

    Near the end of an unfinished episode a start waits until its ``length`` steps are there, or an end. With a stride
    above 1 an episode's starts are its steps 0, stride, 2 stride, ...; those whose window would pass the end of an
    ended episode become one, ``length`` steps before that end (or the first step of a shorter episode): all but
    ``"cross"``, which has no ends to align to, and but where the buffer's ``carry_every`` is above 1: there every
    start stays on the grid, where a carry is stored, and the last window is shorter.

    Args:
        length: Steps to train on, >= 1; fewer where the episode ends before.
        burn_in: Steps before the start to warm the recurrent state with, clipped at the episode's first step.
        gamma: Discount per step, 0 .. 1.
        boundary: ``"pad"``: every stored step may start a window, which ends with its episode; ``"strict"``: only
            full windows; ``"cross"``: any step, and the window takes the next ``length`` *rows*, on over the ends of
            episodes. A closing row is masked, zero but for the final observation, and the row after it is first;
            T is always burn_in + length, and ``lengths`` counts rows.
        stride: Starts every so many steps, >= 1. None is 1; where the buffer's sampler is prioritized, length // 2:
            neighbouring windows would share one priority.
    """

    length: int
    burn_in: int = 0
    gamma: float = 0.99
    boundary: Boundary = "pad"
    stride: int | None = None

    def __post_init__(self) -> None:
        stride = 1 if self.stride is None else self.stride
        _check(self, length=(self.length, 1), burn_in=(self.burn_in, 0), stride=(stride, 1), gamma=self.gamma)
        if self.boundary not in get_args(Boundary):
            raise ConfigError(f"Sequence: boundary is {self.boundary!r}; expected one of {get_args(Boundary)}.")


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


def carry_spacing(storage: Storage) -> int:
    """Say how many steps of an episode lie between two that may begin a window.

    Args:
        storage: What is sampled.

    Returns:
        Steps between two stored carries; 1 where there are none.
    """
    return storage.carry_every if "carry" in storage.fields else 1


def resolved(unit: Unit, storage: Storage, sampler: Sampler) -> Unit:
    """Settle what a unit leaves to its buffer: the stride of a sequence.

    Args:
        unit: The unit.
        storage: What is sampled.
        sampler: How.

    Returns:
        The unit, its stride a number.

    Raises:
        ConfigError: If windows would begin where no carry is stored.
    """
    if not isinstance(unit, Sequence):
        return unit
    every, stride = carry_spacing(storage), unit.stride
    if stride is None:
        stride = max(1, unit.length // 2) if _has_priorities(sampler) else 1
    if every > 1 and (stride % every or unit.burn_in % every):
        raise ConfigError(
            f"{unit}: its stride is {stride} and its burn_in {unit.burn_in}, but the buffer stores a carry every "
            f"{every} steps; expected multiples of {every}, or no window finds a carry where it begins. Pass such a "
            "stride and burn_in, or build the buffer with carry_every=1."
        )
    return replace(unit, stride=stride)


def _has_priorities(sampler: Sampler) -> bool:
    if isinstance(sampler, Mixture):
        return any(map(_has_priorities, sampler.samplers))
    return isinstance(sampler, Prioritized)


def rule_of(unit: Unit, storage: Storage) -> np.ndarray:
    """Say which rows may start a sample of a unit, to the kernels.

    Args:
        unit: The unit, from `resolved`.
        storage: What is sampled.

    Returns:
        ``[RULE_SIZE]`` int64.
    """
    rule, stacked = np.zeros(k.RULE_SIZE, np.int64), max(storage.frames.values(), default=1) - 1
    rule[k.NEED], rule[k.GRID] = 1, 1
    if isinstance(unit, Transition):
        rule[k.NEED], rule[k.BACK] = unit.n_step, stacked
        rule[k.ENDED] = unit.relabel is not None
        rule[k.PLAIN] = unit.n_step == 1 and stacked == 0 and unit.relabel is None
    elif isinstance(unit, Sequence):
        rule[k.NEED], rule[k.GRID] = unit.length, unit.stride or 1
        rule[k.BACK] = unit.burn_in + max(1, stacked)  # the step before the window gives the previous action
        rule[k.STRICT], rule[k.CROSS] = unit.boundary == "strict", unit.boundary == "cross"
        rule[k.ALIGNED] = carry_spacing(storage) == 1
    else:
        rule[k.WHOLE] = rule[k.ENDED] = 1
    return rule


def span_of(unit: Unit, storage: Storage) -> int:
    """Say how many rows a sample touches at most.

    Args:
        unit: The unit.
        storage: What is sampled.

    Returns:
        Rows, from the oldest frame to the last successor; for whole episodes only what is known of them.
    """
    rule = rule_of(unit, storage)
    return int(rule[k.BACK] + rule[k.NEED]) + 1


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
        if unit.boundary == "cross":
            return f"{unit.length + 1} rows of one lane from a step on"
        return f"{unit.length} steps of one episode" + ("" if unit.boundary == "strict" else ", or an episode's end")
    if unit.relabel is not None:
        return "an episode that has ended or was cut"
    if unit.n_step > 1:
        return f"an episode's end, or {unit.n_step} steps of one episode"
    return "at least one step with its successor"
