"""What makes a loader's batches: started when the first is asked for, of the right kind and size, and ended with it."""

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from rlfeed.errors import ConfigError
from rlfeed.feed.calibration import choose_workers, slot_bytes_for
from rlfeed.feed.gatherers import AtOnce, Gatherer, InThread, Source
from rlfeed.feed.mix import Mix
from rlfeed.feed.ring import Ring, Slots, check_ring, slots_for
from rlfeed.feed.workers import OnDeath, Workers
from rlfeed.processes import choose_context
from rlfeed.replay.table import KEPT, DrawTable

Register = Callable[[int, int], Callable[[], None] | None]


class Making:
    """Have batches made that a table has drawn: here at once, in a thread, or by worker processes.

    Args:
        source: What is made.
        mix: Of what.
        table: The draws.
        num_workers: Worker processes, or ``"auto"``.
        timeout_s: Seconds to wait for a batch.
        on_worker_death: What to do when a worker dies.
    """

    def __init__(
        self,
        source: Source,
        mix: Mix,
        table: DrawTable,
        num_workers: int | Literal["auto"],
        timeout_s: float,
        on_worker_death: OnDeath,
    ) -> None:
        self._source, self._mix, self._table, self._timeout_s = source, mix, table, timeout_s
        self._on_worker_death: OnDeath = on_worker_death
        self._auto, self.num_workers = num_workers == "auto", 0 if num_workers == "auto" else int(num_workers)
        self.choice = "as asked for"
        self._depth, self._register, self._unregister = 0, None, None
        self._counts = np.zeros(3, np.int64)  # copies, parcels and restarts of gatherers that were ended
        self._owner, self._holds, self._lock = os.getpid(), False, threading.RLock()
        self.context: Any = None
        self.gatherer: Gatherer | None = None
        if self.num_workers:
            self._check_size()

    def _check_size(self) -> None:
        slots, _ = slots_for(self.num_workers, self._table.lookahead, self._depth)
        check_ring(self.num_workers * slots, self._most_bytes())

    def _most_bytes(self) -> int:
        return self._mix.most_bytes(self._table.batch_size)

    def attach(self, depth: int, register: Register | None) -> None:
        """Take what a `DeviceFeed` tells; see `ReplayLoader.attach`.

        Args:
            depth: Batches that it copies ahead.
            register: Locks the ring's memory for transfers.

        Raises:
            ConfigError: If their draws would not be kept until they are with the consumer, and no state could be given.
            CapacityError: If the ring does not fit then.
        """
        if depth > KEPT - 2:
            raise ConfigError(f"DeviceFeed: depth is {depth}; expected at most {KEPT - 2} over a ReplayLoader.")
        if (depth, register) != (self._depth, self._register):
            if isinstance(self.gatherer, Workers):  # nothing else has a ring
                self.end()
            self._depth, self._register = depth, register
            if self.num_workers:
                self._check_size()

    def begin(self) -> Gatherer:
        """Have everything made that has been drawn.

        Returns:
            What makes it.
        """
        with self._lock:  # a thread that writes may be the first to need it
            gatherer, table = self.gatherer, self._table
            if gatherer is None:
                gatherer = self.gatherer = self._start()
            while table.begun < table.drawn:
                gatherer.begin(table.begun)
                table.begun += 1
        return gatherer

    def _start(self) -> Gatherer:
        """Start what makes batches; the draws of the next one are known."""
        source, first = self._source, self._table.delivered
        self._table.begun = first
        if self._auto:
            shared = all(buffer.storage_kind not in ("private", "cuda") for buffer in self._mix.buffers)
            self.num_workers, self.choice = choose_workers(source, first, self._table.lookahead, shared=shared)
            self._auto = False
        in_thread = not self.num_workers and self.choice.startswith("auto")
        if self.num_workers and multiprocessing.current_process().daemon:
            self.num_workers, in_thread = 0, True
            self.choice = "auto: this process is a daemon, which may not start processes, so a thread gathers"
            warnings.warn(f"make_loader: {self.choice.removeprefix('auto: ')}.", RuntimeWarning, stacklevel=5)
        if not in_thread and not self.num_workers:
            return AtOnce(source)
        for buffer in self._mix.buffers:
            buffer.unread.protect(self.settle)
        return InThread(source, self._timeout_s) if in_thread else self._start_workers(first)

    def _start_workers(self, first: int) -> Workers:
        table, source = self._table, self._source
        more = table.drawn - first - table.lookahead - 1  # a state may hold more than one learner draws ahead
        slots, owed = slots_for(self.num_workers, table.lookahead, max(self._depth, more))
        ring = Ring(self.num_workers, slots, slot_bytes_for(source, self._most_bytes(), first), table.lookahead + KEPT)
        context = choose_context(self.context)
        workers = Workers(source, ring, Slots(ring, owed), first, context, self._timeout_s, self._on_worker_death)
        if self._register is not None:
            try:
                self._unregister = self._register(ring.address, ring.nbytes)
            except BaseException:
                workers.close()
                raise
        return workers

    def hold(self) -> None:
        """See to it that what a state has drawn is gathered before writers of this process overwrite it."""
        self._holds = self._table.drawn > self._table.delivered
        if self._holds and (self.num_workers or self._auto):
            for buffer in self._mix.buffers:
                buffer.unread.protect(self.settle)
        elif self._holds:
            self.begin()

    def settle(self) -> None:
        """Wait until what was drawn has been gathered: a writer of this process is about to overwrite it.

        Raises:
            FeedTimeoutError: If a worker does not answer in time.
        """
        if os.getpid() == self._owner and (self.gatherer is not None or self._holds):
            self.begin().settle()

    def end(self) -> None:
        """End what makes batches; what it had under way is made anew by the next."""
        with self._lock:
            if self.gatherer is not None:
                self._counts += self._counted()
                self.gatherer.close()
            if self._unregister is not None:
                self._unregister()
            self.gatherer = self._unregister = None

    def close(self) -> None:
        """End what makes batches, and let writers overwrite what a state has drawn."""
        self._holds = False
        self.end()

    def _counted(self) -> tuple[int, int, int]:
        made = self.gatherer
        return (made.slots.copies, made.slots.parcels, made.restarts) if isinstance(made, Workers) else (0, 0, 0)

    def counts(self) -> tuple[int, int, int, int, int]:
        """Count what happened beside the batches.

        Returns:
            Copies, parcels, restarts, slots of the ring and their bytes; see `LoaderStats`.
        """
        ring = self.gatherer.ring if isinstance(self.gatherer, Workers) else None
        copies, parcels, restarts = (int(count) for count in self._counts + self._counted())
        return copies, parcels, restarts, ring.workers * ring.slots if ring else 0, ring.nbytes if ring else 0
