"""Readers gather draws of a unit, once, into the dense fields of one block.

n-step sums and discounts are computed on the gathered copy; nothing is baked in at insertion.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rlfeed.errors import ConfigError
from rlfeed.replay import kernels as k
from rlfeed.replay.draws import Draws
from rlfeed.replay.storage import Column, Storage
from rlfeed.replay.units import Episode, Sequence, Transition, Unit, rule_of
from rlfeed.types import Batch, Layout, Slot

Allocate = Callable[[int], Tensor]
Redraw = Callable[[np.ndarray], None]
WHOLE = 1 << 40  # steps no episode reaches


def reader_for(storage: Storage, unit: Unit) -> "Reader":
    """Bind a unit to a storage.

    Args:
        storage: What to read.
        unit: How.

    Returns:
        The unit's reader.
    """
    return TransitionReader(storage, unit) if isinstance(unit, Transition) else WindowReader(storage, unit)


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
    """Gather what was drawn into the dense fields of one block.

    Args:
        storage: What to read.
        unit: The unit.
    """

    def __init__(self, storage: Storage, unit: Unit) -> None:
        self.unit = unit
        self._plan = storage.plan

    @abstractmethod
    def collect(self, draws: Draws, again: Redraw, allocate: Allocate) -> Batch:
        """Gather draws into one block.

        Args:
            draws: What was drawn.
            again: Draws the named rows again, in place: they were overwritten before they could be copied.
            allocate: Where the block comes from.

        Returns:
            The batch.
        """


_FLAGS = [("reward", torch.float32), ("terminated", torch.bool), ("truncated", torch.bool), ("discount", torch.float32)]


class TransitionReader(Reader):
    """Draw and gather n-step transitions.

    Args:
        storage: What to read.
        unit: The unit.
    """

    unit: Transition

    def __init__(self, storage: Storage, unit: Transition) -> None:
        super().__init__(storage, unit)
        copied = [
            ("observation", "observation", k.ROLE_STEP, "B"),
            ("next_observation", "observation", k.ROLE_SUCCESSOR, "B"),
            ("action", "action", k.ROLE_STEP, "B"),
            ("extras", "extras", k.ROLE_STEP, "B"),
        ]
        computed = [*_FLAGS, ("weights", torch.float32), ("ids", torch.int64)]
        self._carver = Carver(storage, copied, [(name, dtype, "B") for name, dtype in computed])

    def collect(self, draws: Draws, again: Redraw, allocate: Allocate) -> Batch:
        """Gather what was drawn into one block; see `Reader.collect`."""
        ids, limits = draws.ids, draws.limits
        layout, table, out = self._carver.carve(len(ids))
        block, unit, todo = allocate(layout.nbytes), self.unit, np.arange(len(ids))
        address = block.data_ptr()
        while stale := k.gather_transitions(
            self._plan, table, address, ids, limits, todo, unit.gamma, unit.n_step, out
        ):
            todo = todo[:stale]  # only what was overwritten is drawn and copied again
            again(todo)
        return Batch.carve(block, layout, plain=allocate is allocate_private)


class WindowReader(Reader):
    """Draw and gather windows of steps: sequences and whole episodes, padded.

    Args:
        storage: What to read.
        unit: The unit.
    """

    unit: "Sequence | Episode"

    def __init__(self, storage: Storage, unit: "Sequence | Episode") -> None:
        super().__init__(storage, unit)
        copied = [
            ("observation", "observation", k.ROLE_OBSERVATION, "BS"),
            ("action", "action", k.ROLE_STEP, "BT"),
            ("extras", "extras", k.ROLE_STEP, "BT"),
            ("carry", "carry", k.ROLE_CARRY, "B"),
            ("prev_action", "action", k.ROLE_PREVIOUS, "B"),
        ]
        self._rule = rule_of(unit, storage)
        crosses = isinstance(unit, Sequence) and unit.boundary == "cross"
        self._least = unit.length + unit.burn_in if crosses else 0  # fixed shapes
        per_step = [*_FLAGS, ("mask", torch.bool), ("loss_mask", torch.bool), ("is_first", torch.bool)]
        per_window = [("lengths", torch.int64), ("burn_in", torch.int64), ("prev_reward", torch.float32)]
        per_window += [("weights", torch.float32), ("ids", torch.int64)]
        axes = [(name, dtype, "BT") for name, dtype in per_step] + [(name, dtype, "B") for name, dtype in per_window]
        self._carver = Carver(storage, copied, axes)

    def collect(self, draws: Draws, again: Redraw, allocate: Allocate) -> Batch:
        """Gather what was drawn into one block; see `Reader.collect`."""
        ids, limits, unit = draws.ids, draws.limits, self.unit
        count, windows = len(ids), np.empty((len(ids), k.WINDOW_SIZE), np.int64)
        length, burn_in = (unit.length, unit.burn_in) if isinstance(unit, Sequence) else (WHOLE, 0)
        todo, longest, carved, block = np.arange(count), 0, self._carver.carve(count, 0), allocate(0)
        while len(todo):
            found = todo.copy()
            while stale := k.resolve_windows(self._plan, self._rule, ids, limits, found, length, burn_in, windows):
                found = found[:stale]
                again(found)
            if windows[:, k.EXTENT].max() > longest:  # first, and where a window drawn again is longer than all before
                longest, todo = max(self._least, int(windows[:, k.EXTENT].max())), np.arange(count)
                self._check_length(longest)
                carved = self._carver.carve(count, longest)
                block = allocate(carved[0].nbytes)
            _, table, out = carved
            address = block.data_ptr()
            stale = k.gather_windows(self._plan, table, address, ids, windows, todo, longest, unit.gamma, out)
            todo = todo[:stale]
            if stale:
                again(todo)
        return Batch.carve(block, carved[0], plain=allocate is allocate_private)

    def _check_length(self, longest: int) -> None:
        most = self.unit.max_length if isinstance(self.unit, Episode) else None
        if most is not None and longest > most:
            raise ConfigError(
                f"Episode: max_length is {most}, but an episode of {longest} steps was drawn; expected none longer. "
                f"Raise max_length to at least {longest}, or sample windows with Sequence(length=...)."
            )
