"""The learner's clock: each batch delivered makes the draws of a later one, after the priorities that are due."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlfeed.feed.mix import Mix
from rlfeed.replay.table import DrawTable

LATE_TICKS = 2  # after which priorities from a device take effect, however fast the device was


# Ids ``[B]``, the buffers they are of (None where there is one), and their values.
Update = tuple[np.ndarray, np.ndarray | None, np.ndarray]


@dataclass(slots=True)
class _Late:
    """Priorities that may still be on their way from a device."""

    ticks: int
    fetch: Callable[[], Update]


class Clock:
    """Tick: apply the priorities that are due, then draw the next batch into the table.

    Args:
        mix: What is drawn from.
        table: Receives the draws.
    """

    def __init__(self, mix: Mix, table: DrawTable) -> None:
        self.mix, self.table = mix, table
        self.drawn = self.delivered = self.discarded = 0  # batches, in the life of this loader
        self._late: list[_Late] = []

    def tick(self, timeout_s: float) -> None:
        """Draw the next batch; see `Mix.tick`.

        Args:
            timeout_s: Seconds to wait for writers.
        """
        for late in [late for late in self._late if late.ticks == 1]:
            self.mix.update_priorities(*late.fetch())
            self._late.remove(late)
        self.mix.tick(self.table, timeout_s)
        self.drawn += 1
        for late in self._late:
            late.ticks -= 1

    def count_delivered(self) -> None:
        """Count the next batch as handed to the consumer."""
        size = self.table.batch_size
        self.mix.take(self.table.delivered * size, size)
        self.table.delivered += 1
        self.delivered += 1

    def take_back(self) -> bool:
        """Count batches as not delivered that a `DeviceFeed` took ahead and will not hand over any more.

        Returns:
            Whether there were any: they are to be made again.
        """
        ahead, self.table.taken_ahead = self.table.taken_ahead, 0
        self.table.delivered -= ahead
        self.delivered -= ahead
        self.mix.take(self.table.delivered * self.table.batch_size, ahead * self.table.batch_size, sign=-1)
        return ahead > 0

    def update_late(self, fetch: Callable[[], Update]) -> None:
        """Give samples new priorities two ticks from now: a fixed time, so that the device's speed changes nothing.

        Args:
            fetch: Waits for what is to be updated, and gives it.
        """
        self._late.append(_Late(LATE_TICKS, fetch))

    def state_dict(self) -> dict[str, Any]:
        """Give the draws under way, and the priorities that wait for their tick.

        Returns:
            The state.
        """
        state, late = self.table.state_dict(), []
        for one in self._late:
            ids, source, values = update = one.fetch()
            one.fetch = lambda update=update: update
            late.append({"ticks": one.ticks, "ids": ids, "source": source, "values": values})
        return state | ({"late": late} if late else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another batch; what is under way is discarded.

        Args:
            state: From `state_dict`.

        Raises:
            CheckpointError: If it is of other draws.
        """
        table, size = self.table, self.table.batch_size
        delivered, ahead = table.delivered, table.taken_ahead
        in_flight = table.drawn - delivered + ahead
        table.load_state_dict(state)
        self.delivered -= ahead  # a `DeviceFeed` has them, and nobody else ever will
        self.mix.take((delivered - ahead) * size, ahead * size, sign=-1)
        self.discarded += in_flight
        self.drawn += self.table.drawn - self.table.delivered
        self._late = [
            _Late(int(one["ticks"]), lambda one=one: (one["ids"], one["source"], one["values"]))
            for one in state.get("late", ())
        ]
