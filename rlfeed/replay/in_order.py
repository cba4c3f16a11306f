"""Read what is stored in the order in which it was stored, each step once: for learners that want no old steps."""

from typing import NoReturn

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from rlfeed.errors import ConfigError, StaleReadError
from rlfeed.replay import kernels as k
from rlfeed.replay.buffer import ReplayBuffer
from rlfeed.replay.draws import Draws
from rlfeed.replay.readers import allocate_private
from rlfeed.replay.units import Sequence
from rlfeed.types import Batch


class InOrder:
    """Cut what writers store from now on into windows of T rows, lane by lane, and give each window once.

    Windows go on over the ends of episodes: ``mask`` is False at a closing row, which holds the final observation
    alone, and the row after it is first. So ``observation[:, t + 1]`` is always what step t led to. Writers do not wait
    for this reader: keep them from running more than `room` rows ahead in any lane, as `Actors.limit` does.

    Args:
        buffer: Where writers, in any process, store steps.
        length: T, rows of a window, at least 1.

    Raises:
        ConfigError: If a lane has no room for two windows.
    """

    def __init__(self, buffer: ReplayBuffer, length: int) -> None:
        self._sampler = buffer.unit_sampler(Sequence(length, gamma=1.0, boundary="cross"))
        self._length, self._seeds = length, np.arange(buffer.num_envs, dtype=np.int64) << k.LANE_SHIFT
        self._next = self._committed().copy()  # the first row of each lane that has not been given
        rows = buffer.stats().capacity_rows // buffer.num_envs
        self.room = rows - length - 1
        if self.room <= length:
            raise ConfigError(
                f"InOrder: windows have {length} rows and a lane {rows}; expected lanes of at least {2 * length + 2}. "
                f"Raise capacity to {(2 * length + 2) * buffer.num_envs} rows."
            )

    def count(self) -> int:
        """Count the windows that are complete and have not been given.

        Returns:
            How many, over all lanes.
        """
        return int(self._complete().sum())

    def take(self, count: int) -> Batch | None:
        """Give the next windows, first of the lanes that have most; several of one lane in their order.

        Args:
            count: B.

        Returns:
            ``[B, T]``, ``observation`` ``[B, T+1, ...]``; its ``discount`` is 0 where an episode terminated, else 1.
            None while fewer are complete.

        Raises:
            StaleReadError: If a writer has overwritten one of them: it was allowed to run too far ahead.
        """
        complete, heads = self._complete(), self._committed()
        if complete.sum() < count:
            return None
        lanes = np.empty(count, np.int64)
        for i in range(count):
            lanes[i] = complete.argmax()
            complete[lanes[i]] -= 1
        lanes.sort()
        before = np.arange(count) - np.searchsorted(lanes, lanes)  # windows of the same lane in this batch
        ids = self._seeds[lanes] + self._next[lanes] + before * self._length
        draws = Draws(0, 0, ids, heads[lanes], np.ones(count))
        batch = self._sampler.reader.collect(draws, self._refuse, allocate_private)
        self._next += np.bincount(lanes, minlength=len(self._next)) * self._length
        return batch

    def _complete(self) -> Int64[ndarray, " lanes"]:
        # The row after a window has to be there as well: its observation is what the last step led to.
        return np.maximum(self._committed() - 1 - self._next, 0) // self._length

    def _committed(self) -> Int64[ndarray, " lanes"]:
        heads = self._sampler.snapshot()
        if heads is None:
            raise ConfigError("InOrder: the buffer's sampler keeps priorities; expected Uniform(), which is not asked.")
        return heads[: len(self._seeds)]

    def _refuse(self, rows: Int64[ndarray, " B"]) -> NoReturn:
        raise StaleReadError(
            f"InOrder: {len(rows)} windows of {self._length} rows were overwritten before they were read; expected "
            f"writers at most {self.room} rows ahead of what was given. Raise capacity, or hold the writers back."
        )
