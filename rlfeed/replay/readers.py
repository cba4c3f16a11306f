"""Readers gather draws of a unit, once, into the dense fields of one block.

n-step sums and discounts are computed on the gathered copy; nothing is baked in at insertion.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rlfeed.errors import ConfigError
from rlfeed.replay import kernels as k
from rlfeed.replay.carver import Carver
from rlfeed.replay.draws import Draws
from rlfeed.replay.hindsight import Relabeller
from rlfeed.replay.storage import Storage
from rlfeed.replay.units import Episode, Sequence, Transition, Unit, rule_of
from rlfeed.types import Batch

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

    _carver: Carver

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


    def nbytes(self, count: int, steps: int) -> int:
        """Say how long the block of a batch is.

        Args:
            count: B.
            steps: T of windows; transitions have none.

        Returns:
            Bytes.
        """
        return self._carver.carve(count, steps if isinstance(self, WindowReader) else 0).layout.nbytes


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
        self._carver = Carver(storage, copied, [(name, dtype, "B") for name, dtype in computed], unit.n_step)
        self._rule = rule_of(unit, storage)
        self._relabeller = None if unit.relabel is None else Relabeller(storage, unit, unit.relabel)

    def collect(self, draws: Draws, again: Redraw, allocate: Allocate) -> Batch:
        """Gather what was drawn into one block; see `Reader.collect`."""
        ids, limits, plan, unit = draws.ids, draws.limits, self._plan, self.unit
        carved = self._carver.carve(len(ids))
        block, todo = allocate(carved.layout.nbytes), np.arange(len(ids))
        address, relabeller = block.data_ptr(), self._relabeller
        goals = relabeller.start(draws, carved.layout, address) if relabeller is not None else None
        while True:
            # Each pass checks what those before it read, and later: what was stale for one is stale for the next.
            passes = todo.copy() if goals is not None or len(carved.stacks) else todo
            stale = k.gather_transitions(
                plan, carved.table, address, ids, limits, passes, unit.gamma, unit.n_step, carved.computed
            )
            if len(carved.stacks):
                passes = todo.copy()
                stale = self._gather_stacks(carved.stacks, address, draws, passes)
            if goals is not None:
                passes = todo.copy()
                stale = goals.gather(passes)
            if not stale:
                break
            todo = passes[:stale]  # only what was overwritten is drawn and copied again
            again(todo)
        batch = Batch.carve(block, carved.layout, plain=allocate is allocate_private)
        if goals is not None:
            goals.reward(batch)
        return batch

    def _gather_stacks(self, fields: np.ndarray, address: int, draws: Draws, todo: np.ndarray) -> int:
        return k.gather_stacks(self._plan, self._rule, fields, address, draws.ids, draws.limits, todo, self.unit.n_step)


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
        self._least = 0
        if isinstance(unit, Sequence) and unit.boundary == "cross":
            self._least = unit.length + unit.burn_in  # fixed shapes
        per_step = [*_FLAGS, ("mask", torch.bool), ("loss_mask", torch.bool), ("is_first", torch.bool)]
        per_window = [("lengths", torch.int64), ("burn_in", torch.int64), ("prev_reward", torch.float32)]
        per_window += [("weights", torch.float32), ("ids", torch.int64)]
        axes = [(name, dtype, "BT") for name, dtype in per_step] + [(name, dtype, "B") for name, dtype in per_window]
        self._carver = Carver(storage, copied, axes)

    def collect(self, draws: Draws, again: Redraw, allocate: Allocate) -> Batch:
        """Gather what was drawn into one block; see `Reader.collect`."""
        ids, unit = draws.ids, self.unit
        count, windows = len(ids), np.empty((len(ids), k.WINDOW_SIZE), np.int64)
        todo, longest, carved, block = np.arange(count), 0, self._carver.carve(count, 0), allocate(0)
        while len(todo):
            found = todo.copy()
            while stale := self._resolve(draws, found, windows):
                found = found[:stale]
                again(found)
            if windows[:, k.EXTENT].max() > longest:  # first, and where a window drawn again is longer than all before
                longest, todo = max(self._least, int(windows[:, k.EXTENT].max())), np.arange(count)
                self._check_length(longest)
                carved = self._carver.carve(count, longest)
                block = allocate(carved.layout.nbytes)
            stale = k.gather_windows(
                self._plan, carved.table, block.data_ptr(), ids, windows, todo, longest, unit.gamma, carved.computed
            )
            todo = todo[:stale]
            if stale:
                again(todo)
        return Batch.carve(block, carved.layout, plain=allocate is allocate_private)

    def _resolve(self, draws: Draws, todo: np.ndarray, windows: np.ndarray) -> int:
        unit = self.unit
        length, burn_in = (unit.length, unit.burn_in) if isinstance(unit, Sequence) else (WHOLE, 0)
        return k.resolve_windows(self._plan, self._rule, draws.ids, draws.limits, todo, length, burn_in, windows)

    def _check_length(self, longest: int) -> None:
        most = self.unit.max_length if isinstance(self.unit, Episode) else None
        if most is not None and longest > most:
            raise ConfigError(
                f"Episode: max_length is {most}, but an episode of {longest} steps was drawn; expected none longer. "
                f"Raise max_length to at least {longest}, or sample windows with Sequence(length=...)."
            )
