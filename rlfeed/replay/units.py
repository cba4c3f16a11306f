"""Units say how a drawn index becomes a sample: a transition, a window of steps, a whole episode.

Each unit has a reader that draws numbered starts and gathers them, once, into the dense fields of one block.
n-step sums and discounts are computed on the gathered copy; nothing is baked in at insertion.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlfeed.errors import ConfigError, NotEnoughDataError, StaleReadError, UnsupportedError
from rlfeed.replay import kernels as k
from rlfeed.replay.storage import Column, Storage
from rlfeed.types import Batch, Layout, Slot

Boundary = Literal["pad", "strict", "cross"]
Allocate = Callable[[int], Tensor]
Redraw = Callable[[np.ndarray], None]
WHOLE = 1 << 40  # steps no episode reaches
REDRAWS = 1000


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


def reader_for(storage: Storage, unit: Unit) -> "Reader":
    """Bind a unit to a storage.

    Args:
        storage: What to read.
        unit: How.

    Returns:
        The unit's reader.

    Raises:
        ConfigError: If a lane is shorter than what one sample touches.
    """
    if isinstance(unit, Transition):
        return TransitionReader(storage, unit)
    if isinstance(unit, Sequence | Episode):
        return WindowReader(storage, unit)
    raise ConfigError(f"unit: is {unit!r}; expected Transition(...), Sequence(...) or Episode(...).")


class Carver:
    """Lay the fields of a batch out in a block: dense, each 64-byte aligned.

    Args:
        storage: Whose columns.
        groups: For each batch field: its name, the step field it comes from, its role in the gather and its axes
            (letters of ``B T S``, S = T + 1).
        computed: For each computed field: its name, dtype and axes.
    """

    def __init__(
        self,
        storage: Storage,
        groups: list[tuple[str, str, int, str]],
        computed: list[tuple[str, torch.dtype, str]],
    ) -> None:
        self._copied: list[tuple[str, Column, str]] = []
        roles: list[tuple[Column, int]] = []
        for name, source, role, axes in groups:
            for column in storage.columns_of(source):
                self._copied.append((name, column, axes))
                roles.append((column, role))
        self._computed = computed
        self._table = storage.table(roles)
        self._cache: dict[tuple[int, int], tuple[Layout, np.ndarray, np.ndarray]] = {}

    def carve(self, rows: int, steps: int = 0) -> tuple[Layout, np.ndarray, np.ndarray]:
        """Give the layout for a size of batch.

        Args:
            rows: B.
            steps: T.

        Returns:
            The layout, the field table for the gather, and the offsets of the computed fields in their order.
        """
        found = self._cache.get((rows, steps))
        if found is None:
            if len(self._cache) > 4096:  # lengths of whole episodes can take any value
                self._cache.clear()
            found = self._cache[rows, steps] = self._carve(rows, steps)
        return found

    def _carve(self, rows: int, steps: int) -> tuple[Layout, np.ndarray, np.ndarray]:
        size = {"B": rows, "T": steps, "S": steps + 1}
        slots, offset = [], 0

        def place(name: str, path: tuple[str | int, ...], dtype: torch.dtype, axes: str, tail: tuple[int, ...]) -> int:
            nonlocal offset
            shape = (*(size[a] for a in axes), *tail)
            slots.append(Slot(name, path, dtype, shape, offset))
            start, offset = offset, -(-(offset + math.prod(shape) * dtype.itemsize) // 64) * 64
            return start

        table = self._table.copy()
        for line, (name, column, axes) in zip(table, self._copied, strict=True):
            line[k.OTHER] = place(name, column.path, _torch_dtype(column.spec.dtype), axes, column.spec.shape)
        computed = np.array([place(name, (), dtype, axes, ()) for name, dtype, axes in self._computed], np.int64)
        return Layout(tuple(slots), offset), table, computed


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def allocate_private(nbytes: int) -> Tensor:
    """Allocate a block in ordinary memory.

    Args:
        nbytes: Its length.

    Returns:
        uint8, 64-byte aligned, not initialised.
    """
    return torch.empty(nbytes, dtype=torch.uint8)


class Reader(ABC):
    """Draw numbered starts and gather them: what every unit's reader shares.

    Args:
        storage: What to read.
        unit: The unit.
        span: Rows that one sample touches at most; 0 where its length is the episode's.
    """

    def __init__(self, storage: Storage, unit: Unit, span: int) -> None:
        self.unit = unit
        self._storage, self._plan = storage, storage.plan
        if span > storage.rows:
            raise ConfigError(
                f"{unit}: one sample touches {span} rows, but a lane has {storage.rows}; expected lanes that hold a "
                f"sample. Raise capacity to at least {span * storage.lanes} rows, or sample less."
            )

    @abstractmethod
    def draw(self, key: int, number: int, ids: np.ndarray, limits: np.ndarray, attempt: int = 0) -> int:
        """Make draws ``number, number + 1, ...`` on what is stored now.

        Args:
            key: The stream of draws.
            number: The first draw.
            ids: ``[B]`` int64, receives the ids.
            limits: ``[B]`` int64, receives each lane's head at the draw: what the sample may see.
            attempt: Above 0 only to repeat a draw that turned out torn.

        Returns:
            B, or NO_START where no stored step can start a sample.
        """

    @abstractmethod
    def collect(self, ids: np.ndarray, limits: np.ndarray, again: Redraw, allocate: Allocate) -> Batch:
        """Gather what was drawn into one block.

        Args:
            ids: ``[B]`` int64.
            limits: ``[B]`` int64.
            again: Draws the named rows again, in place: they were overwritten before they could be copied.
            allocate: Where the block comes from.

        Returns:
            The batch.
        """

    def read(self, key: int, number: int, count: int, allocate: Allocate = allocate_private) -> Batch:
        """Make draws ``number .. number + count - 1`` and gather them.

        Args:
            key: The stream of draws.
            number: The first draw.
            count: B.
            allocate: Where the block comes from.

        Returns:
            The batch.

        Raises:
            NotEnoughDataError: If no stored step can start a sample.
            StaleReadError: If writers overtake the reader again and again.
        """
        ids, limits, attempts = np.empty(count, np.int64), np.empty(count, np.int64), iter(range(1, REDRAWS))

        def again(rows: np.ndarray) -> None:
            attempt = next(attempts, 0)
            if attempt == 0:
                raise self._overtaken(len(rows), count)
            for row in rows.tolist():
                one = slice(row, row + 1)
                if self.draw(key, number + row, ids[one], limits[one], attempt << 16) == k.NO_START:
                    raise self.nothing()

        if self.draw(key, number, ids, limits) == k.NO_START:
            raise self.nothing()
        return self.collect(ids, limits, again, allocate)

    def _overtaken(self, rows: int, count: int) -> StaleReadError:
        return StaleReadError(
            f"{self.unit}: {rows} of {count} samples were overwritten before they could be copied, {REDRAWS} times in "
            f"a row; expected lanes much longer than what is written meanwhile, they have {self._storage.rows} rows. "
            "Raise capacity."
        )

    def nothing(self) -> NotEnoughDataError:
        """Say that nothing can be drawn.

        Returns:
            The error, with what is stored and what is needed.
        """
        counts, lanes, rows = np.zeros(3, np.int64), self._storage.lanes, self._storage.rows
        steps = k.count_steps(self._plan, counts)
        full = counts[1] == lanes * rows
        remedy = f"Its {lanes} lanes of {rows} rows are full: raise capacity." if full else "Collect more steps first."
        return NotEnoughDataError(
            f"ReplayBuffer: holds {steps} steps and {counts[0]} whole episodes, none of which can start "
            f"{self.unit}; expected {self._need()}. {remedy}"
        )

    def _need(self) -> str:
        return "at least one step with its successor"


_FLAGS = [("reward", torch.float32), ("terminated", torch.bool), ("truncated", torch.bool), ("discount", torch.float32)]


class TransitionReader(Reader):
    """Draw and gather n-step transitions.

    Args:
        storage: What to read.
        unit: The unit.
    """

    unit: Transition

    def __init__(self, storage: Storage, unit: Transition) -> None:
        super().__init__(storage, unit, unit.n_step + 1)
        copied = [
            ("observation", "observation", k.ROLE_STEP, "B"),
            ("next_observation", "observation", k.ROLE_SUCCESSOR, "B"),
            ("action", "action", k.ROLE_STEP, "B"),
            ("extras", "extras", k.ROLE_STEP, "B"),
        ]
        computed = [*_FLAGS, ("weights", torch.float32), ("ids", torch.int64)]
        self._carver = Carver(storage, copied, [(name, dtype, "B") for name, dtype in computed])

    def draw(self, key: int, number: int, ids: np.ndarray, limits: np.ndarray, attempt: int = 0) -> int:
        """Make draws ``number, number + 1, ...``; see `Reader.draw`."""
        return k.draw_steps(self._plan, key, number, attempt, self.unit.n_step, -1, 0, ids, limits)

    def collect(self, ids: np.ndarray, limits: np.ndarray, again: Redraw, allocate: Allocate) -> Batch:
        """Gather what was drawn into one block; see `Reader.collect`."""
        layout, table, out = self._carver.carve(len(ids))
        block, unit, todo = allocate(layout.nbytes), self.unit, np.arange(len(ids))
        address = block.data_ptr()
        while stale := k.gather_transitions(
            self._plan, table, address, ids, limits, todo, unit.gamma, unit.n_step, out
        ):
            todo = todo[:stale]  # only what was overwritten is drawn and copied again
            again(todo)
        return Batch.carve(block, layout)

    def _need(self) -> str:
        steps = self.unit.n_step
        return super()._need() if steps == 1 else f"an episode's end, or {steps} steps of one episode"


class WindowReader(Reader):
    """Draw and gather windows of steps: sequences and whole episodes, padded.

    Args:
        storage: What to read.
        unit: The unit.
    """

    unit: "Sequence | Episode"

    def __init__(self, storage: Storage, unit: "Sequence | Episode") -> None:
        # A window touches the step before it (previous action) and the successor of its last step.
        super().__init__(storage, unit, unit.length + unit.burn_in + 2 if isinstance(unit, Sequence) else 0)
        copied = [
            ("observation", "observation", k.ROLE_OBSERVATION, "BS"),
            ("action", "action", k.ROLE_STEP, "BT"),
            ("extras", "extras", k.ROLE_STEP, "BT"),
            ("carry", "carry", k.ROLE_CARRY, "B"),
            ("prev_action", "action", k.ROLE_PREVIOUS, "B"),
        ]
        per_step = [*_FLAGS, ("mask", torch.bool), ("loss_mask", torch.bool), ("is_first", torch.bool)]
        per_window = [("lengths", torch.int64), ("burn_in", torch.int64), ("prev_reward", torch.float32)]
        per_window += [("weights", torch.float32), ("ids", torch.int64)]
        axes = [(name, dtype, "BT") for name, dtype in per_step] + [(name, dtype, "B") for name, dtype in per_window]
        self._carver = Carver(storage, copied, axes)

    def draw(self, key: int, number: int, ids: np.ndarray, limits: np.ndarray, attempt: int = 0) -> int:
        """Make draws ``number, number + 1, ...``; see `Reader.draw`."""
        unit = self.unit
        if isinstance(unit, Episode):
            return k.draw_episodes(self._plan, key, number, attempt, ids, limits)
        strict = int(unit.boundary == "strict")
        return k.draw_steps(self._plan, key, number, attempt, unit.length, unit.burn_in, strict, ids, limits)

    def collect(self, ids: np.ndarray, limits: np.ndarray, again: Redraw, allocate: Allocate) -> Batch:
        """Gather what was drawn into one block; see `Reader.collect`."""
        unit, count, windows = self.unit, len(ids), np.empty((len(ids), 4), np.int64)
        length, back = (unit.length, unit.burn_in) if isinstance(unit, Sequence) else (WHOLE, 0)
        todo, longest, carved, block = np.arange(count), 0, self._carver.carve(count, 0), allocate(0)
        while len(todo):
            found = todo.copy()
            while stale := k.resolve_windows(self._plan, ids, limits, found, length, back, windows):
                found = found[:stale]
                again(found)
            if windows[:, 1].max() > longest:  # at first, and where a window drawn again is longer than all before
                longest, todo = int(windows[:, 1].max()), np.arange(count)
                self._check_length(longest)
                carved = self._carver.carve(count, longest)
                block = allocate(carved[0].nbytes)
            _, table, out = carved
            address = block.data_ptr()
            stale = k.gather_windows(self._plan, table, address, ids, windows, todo, longest, unit.gamma, out)
            todo = todo[:stale]
            if stale:
                again(todo)
        return Batch.carve(block, carved[0])

    def _check_length(self, longest: int) -> None:
        most = self.unit.max_length if isinstance(self.unit, Episode) else None
        if most is not None and longest > most:
            raise ConfigError(
                f"Episode: max_length is {most}, but an episode of {longest} steps was drawn; expected none longer. "
                f"Raise max_length to at least {longest}, or sample windows with Sequence(length=...)."
            )

    def _need(self) -> str:
        if isinstance(self.unit, Episode):
            return "at least one episode that has ended and whose first step is still stored"
        steps = self.unit.length
        return f"{steps} steps of one episode" + ("" if self.unit.boundary == "strict" else ", or an episode's end")
