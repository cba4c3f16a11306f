"""A ring of batch slots in memory that workers and the learner share: batches cross without being copied or pickled.

    words of the learner | words of each worker | which slot each batch goes to | words of each slot | slots

Each word has one writer, so there are no locks, and a process that is killed leaves none behind. A slot belongs to one
worker: the learner says which batch goes into it, the worker fills it and says so, and it is the learner's until every
tensor on it has been collected. Who has nothing to do says that it sleeps and waits for a byte in a pipe; nobody else
ever writes one.
"""

import math
import mmap
import os
import warnings
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfeed.errors import CapacityError
from rlfeed.memory import Memory, available_bytes, readable_bytes
from rlfeed.processes import processors
from rlfeed.replay import kernels as k

_LINE = 16  # words of a line: 128 bytes, so that two writers never share a line of a cache
# Words of the learner: batches that have been drawn and have a slot, whether to stop, whether it sleeps.
_DRAWN, _STOP, _LEARNER_SLEEPS = range(3)
# Words of a worker: whether it sleeps, what it does and with which batch, and since when (ns of the monotonic clock).
_SLEEPS, _DOING, _WITH, _SINCE = range(4)
# Words of a slot: the number of the batch in it plus 1, its length in bytes, its layout; NOT_HERE: it comes by pipe.
_READY, _NBYTES, _LAYOUT = range(3)
NOT_HERE = -1
ACTS = ("starting", "waiting for work", "gathering", "transforming")
# How often to look before falling asleep. Being woken costs 20 to 50 us and a system call of the other side, so the
# learner looks for about 10 us, and a worker for about 70 where there is a processor for each of them and the learner.
_SPINS, _WORKER_SPINS = 30_000, 200_000


class Ring:
    """Hold the shared memory and say who may do what with it.

    Args:
        workers: W.
        slots: Of each worker.
        slot_bytes: Of each slot, what the largest batch takes.
        entries: Batches that may be under way at a time.

    Raises:
        CapacityError: If it does not fit, with the numbers.
    """

    def __init__(self, workers: int, slots: int, slot_bytes: int, entries: int) -> None:
        self.workers, self.slots, self.entries = workers, slots, entries
        self.slot_bytes = -(-max(slot_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        nbytes = check_ring(workers * slots, self.slot_bytes) + self._offset
        try:
            self._memory = Memory("shared", nbytes)
        except CapacityError as error:
            raise CapacityError(
                f"make_loader: {readable_bytes(nbytes)} for batches under way could not be reserved; expected room for "
                "all of it. Lower batch_size, lookahead or num_workers."
            ) from error
        self._bind()

    @property
    def _offset(self) -> int:
        words = _LINE * (1 + self.workers + self.workers * self.slots) + self.entries
        return -(-words * 8 // mmap.PAGESIZE) * mmap.PAGESIZE

    def _bind(self) -> None:
        self._words = self._memory.bytes[: self._offset].view(np.int64)
        self._address = self._memory.address
        self._spins = _WORKER_SPINS if processors() > self.workers else _SPINS
        self._targets = _LINE * (1 + self.workers + self.workers * self.slots)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_words", "_address", "_spins")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    @property
    def nbytes(self) -> int:
        """Count the bytes of all slots: what is registered with an accelerator."""
        return self.workers * self.slots * self.slot_bytes

    @property
    def address(self) -> int:
        """Give the address of the first slot in this process."""
        return self._address + self._offset

    def worker_of(self, batch: int) -> int:
        """Say which worker makes a batch.

        Args:
            batch: Its number.

        Returns:
            0 .. W-1.
        """
        return batch % self.workers

    def memory_of(self, slot: int, nbytes: int) -> np.ndarray:
        """View the front of a slot; nothing but this view tells whether the slot is in use.

        Args:
            slot: Which.
            nbytes: How much of it.

        Returns:
            uint8.
        """
        return np.frombuffer(self._memory.mapping, np.uint8, nbytes, self._offset + slot * self.slot_bytes)

    # ---------------------------------------------------------------- the learner's

    def publish(self, batch: int, slot: int) -> bool:
        """Tell the workers that the next batch has been drawn.

        Args:
            batch: Its number.
            slot: Where it goes, one of its worker's.

        Returns:
            Whether that worker sleeps, and must be woken.
        """
        self._words[self._targets + batch % self.entries] = slot
        k.post(self._address + _DRAWN * 8, batch + 1)
        return self.is_asleep(self.worker_of(batch))

    def is_asleep(self, worker: int) -> bool:
        """Tell whether a worker sleeps: where it does not, it sees what was published before.

        Args:
            worker: Which.

        Returns:
            True where it must be woken.
        """
        return bool(self._words[_LINE * (1 + worker) + _SLEEPS])

    def is_ready(self, batch: int, slot: int, *, spin: bool = False) -> bool:
        """Tell whether a batch is there.

        Args:
            batch: Its number.
            slot: Where.
            spin: Whether to look for a while.

        Returns:
            True where it is.
        """
        word = self._address + 8 * (_LINE * (1 + self.workers + slot) + _READY)
        return k.await_word(word, batch + 1, _SPINS if spin else 0) == batch + 1

    def filled(self, slot: int) -> tuple[int, int]:
        """Say what lies in a slot that is ready.

        Args:
            slot: Which.

        Returns:
            Its length in bytes, or NOT_HERE, and the number that its worker has given to its layout.
        """
        line = _LINE * (1 + self.workers + slot)
        return int(self._words[line + _NBYTES]), int(self._words[line + _LAYOUT])

    def learner_sleeps(self, sleeps: bool) -> None:
        """Say that the learner sleeps; it looks for what it waits for once more before it does.

        Args:
            sleeps: Or that it no longer does.
        """
        k.post(self._address + _LEARNER_SLEEPS * 8, int(sleeps))

    def stop(self) -> None:
        """Tell the workers to end."""
        k.post(self._address + _STOP * 8, 1)

    def act_of(self, worker: int, now_ns: int) -> tuple[str, int, float]:
        """Say what a worker does.

        Args:
            worker: Which.
            now_ns: The monotonic clock.

        Returns:
            One of ACTS, with which batch, and for how many seconds.
        """
        line = self._words[_LINE * (1 + worker) :][:_LINE]
        since = int(line[_SINCE])
        return ACTS[int(line[_DOING])], int(line[_WITH]), (now_ns - since) / 1e9 if since else 0.0

    # ---------------------------------------------------------------- a worker's

    def is_drawn(self, batch: int, *, spin: bool = False) -> bool:
        """Tell whether a batch has been drawn.

        Args:
            batch: Its number.
            spin: Whether to look for a while.

        Returns:
            True where it has.
        """
        return k.await_word(self._address + _DRAWN * 8, batch + 1, self._spins if spin else 0) > batch

    @property
    def is_stopped(self) -> bool:
        """Tell whether to end."""
        return k.peek(self._address + _STOP * 8) != 0

    def worker_sleeps(self, worker: int, sleeps: bool) -> None:
        """Say that this worker sleeps; it looks for work once more before it does.

        Args:
            worker: Which.
            sleeps: Or that it no longer does.
        """
        k.post(self._address + 8 * (_LINE * (1 + worker) + _SLEEPS), int(sleeps))

    def slot_for(self, batch: int) -> int:
        """Say where a batch that has been drawn goes.

        Args:
            batch: Its number.

        Returns:
            The slot.
        """
        return int(self._words[self._targets + batch % self.entries])

    def act(self, worker: int, act: int, batch: int, now_ns: int) -> None:
        """Say what this worker does, for whoever waits for it.

        Args:
            worker: Which.
            act: Index of ACTS.
            batch: With which.
            now_ns: The monotonic clock.
        """
        line = _LINE * (1 + worker)
        self._words[line + _DOING], self._words[line + _WITH], self._words[line + _SINCE] = act, batch, now_ns

    def deliver(self, batch: int, slot: int, nbytes: int, layout: int) -> bool:
        """Tell the learner that a batch is there.

        Args:
            batch: Its number.
            slot: Where.
            nbytes: Its length; NOT_HERE where it went by pipe.
            layout: The number of its layout.

        Returns:
            Whether the learner sleeps, and must be woken.
        """
        line = _LINE * (1 + self.workers + slot)
        self._words[line + _NBYTES], self._words[line + _LAYOUT] = nbytes, layout
        k.post(self._address + 8 * (line + _READY), batch + 1)
        return self._words[_LEARNER_SLEEPS] != 0


class Slots:
    """Keep the learner's book of slots: free, promised to a batch, or leased to whoever holds a batch.

    A lease ends when every tensor on the slot has been collected. Where that would leave a worker without a slot for
    what it owes, the consumer is handed a copy instead: nobody ever waits for a lease.

    Args:
        ring: Whose slots.
        most_owed: Batches that a worker owes at most.
    """

    def __init__(self, ring: Ring, most_owed: int) -> None:
        self._ring, self.most_owed, self._most_leased = ring, most_owed, ring.slots - most_owed
        self._free = [deque(range(w * ring.slots, (w + 1) * ring.slots)) for w in range(ring.workers)]
        self._promised: dict[int, int] = {}
        self._leased: list[dict[int, weakref.ref[np.ndarray]]] = [{} for _ in range(ring.workers)]
        self._returned: deque[int] = deque()  # by the garbage collector, at any time, in any thread
        self.copies = self.parcels = 0
        self._warned: set[str] = set()
        self._poison = os.environ.get("RLFEED_DEBUG", "0") not in ("", "0")

    def promise(self, batch: int) -> int:
        """Choose a free slot for a batch.

        Args:
            batch: Its number.

        Returns:
            The slot.
        """
        self._collect()
        slot = self._promised[batch] = self._free[self._ring.worker_of(batch)].popleft()
        return slot

    def slot_of(self, batch: int) -> int:
        """Say where a batch that is under way goes.

        Args:
            batch: Its number.

        Returns:
            The slot.
        """
        return self._promised[batch]

    def lease(self, batch: int, nbytes: int) -> Tensor:
        """Hand over the slot of a batch, or a copy where slots run short.

        Args:
            batch: Its number.
            nbytes: Its length.

        Returns:
            uint8 memory.
        """
        self._collect()
        slot, ring = self._promised[batch], self._ring
        memory, leased = ring.memory_of(slot, nbytes), self._leased[ring.worker_of(batch)]
        if len(leased) >= self._most_leased:
            self._warn(
                "copies",
                f"more than {self._most_leased} batches of a worker are still held, so the consumer is handed copies; "
                "expected it to let batches go, or to keep batch.clone(). Garbage that waits for its collection holds "
                "them too.",
            )
            block = torch.from_numpy(memory.copy())
            self._put_back(self._promised.pop(batch))
            self.copies += 1
            return block
        del self._promised[batch]
        # Only the book is touched when it is collected: in a forked child that is a book which nobody reads.
        leased[slot] = weakref.ref(memory, lambda _, slot=slot, returned=self._returned: returned.append(slot))
        return torch.from_numpy(memory)

    def drop(self, batch: int) -> None:
        """Free the slot of a batch that came by pipe, and count it.

        Args:
            batch: Its number.
        """
        self._warn(
            "parcels",
            f"a batch comes by pipe, which is slow: it is no Batch, or larger than the "
            f"{readable_bytes(self._ring.slot_bytes)} of a slot; expected batches of about the size of the first. "
            "Bound their size: Episode(max_length=...), or a transform whose results do not vary so much.",
        )
        self._put_back(self._promised.pop(batch))
        self.parcels += 1

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:  # first of all: a warning may be an error, after which all is as it was
            self._warned.add(what)
            warnings.warn(f"make_loader: {message}", RuntimeWarning, stacklevel=6)

    def _collect(self) -> None:
        while self._returned:
            slot = self._returned.popleft()
            del self._leased[slot // self._ring.slots][slot]
            self._put_back(slot)

    def _put_back(self, slot: int) -> None:
        if self._poison:  # what is read after its time shows: not a number, or -1
            self._ring.memory_of(slot, self._ring.slot_bytes)[:] = 0xFF
        self._free[slot // self._ring.slots].append(slot)


def slots_for(workers: int, lookahead: int, depth: int) -> tuple[int, int]:
    """Say how many slots each worker needs.

    A worker owes every W-th of the batches under way, lookahead + 1 at most. A consumer holds one batch while it is
    given the next, perhaps one more that it keeps aside, and a `DeviceFeed` as many more as it copies ahead.

    Args:
        workers: W.
        lookahead: Batches drawn ahead of delivery.
        depth: Batches that a `DeviceFeed` copies ahead; 0 without one.

    Returns:
        Slots of each worker, and how many of them it owes at most.
    """
    owed = math.ceil((lookahead + 1) / workers)
    return owed + math.ceil((depth + 3) / workers), owed


def check_ring(slots: int, slot_bytes: int) -> int:
    """Refuse a ring that does not fit.

    Args:
        slots: How many.
        slot_bytes: Of each.

    Returns:
        Their bytes.

    Raises:
        CapacityError: If they need more than 90 % of the memory that is free.
    """
    nbytes, free = slots * slot_bytes, available_bytes()
    if nbytes > 0.9 * free:
        raise CapacityError(
            f"make_loader: {slots} slots of {readable_bytes(slot_bytes)} for batches under way need "
            f"{readable_bytes(nbytes)}, but {readable_bytes(free)} are free in memory; expected at most 90 % of that. "
            "Lower batch_size, lookahead, num_workers or the length of a sample (Episode(max_length=...)), or use "
            "num_workers=0."
        )
    return nbytes
