"""Worker processes that gather batches into a ring, and the learner's side that watches over them.

A worker gathers every W-th batch, as its draws become known. What crosses is a word in shared memory; the pipe of each
worker carries a byte when a side sleeps, and what is rare: layouts, errors, batches that fit no slot. There are no
queues, no locks and no feeding threads, so a worker may be killed at any instant: its pipe ends, and another process
goes on with the same draws.
"""

import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
import weakref
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlfeed.errors import ConfigError, FeedTimeoutError, RlfeedError, WorkerError
from rlfeed.feed.gatherers import Source
from rlfeed.feed.ring import NOT_HERE, Ring, Slots
from rlfeed.layout import Layout
from rlfeed.messages import Inbox
from rlfeed.processes import how_it_ended, ignore_interrupts, is_alive, undecided, uninterrupted
from rlfeed.replay import kernels as k
from rlfeed.replay.readers import allocate_private
from rlfeed.types import Batch

OnDeath = Literal["raise", "restart"]
_DEATHS = 3  # of workers in a row with the same batch: then it is the batch, and another one would die as well
_WAKE = b""
_GRACE_S = 0.2  # for workers to end by themselves; they hold no lock, so they can be killed
_GLANCE_S = 0.01  # between glances at the pipes where batches are there
_LOOK_S = 0.5  # between looks at what tells nobody that it changed


@dataclass(frozen=True)
class _Job:
    """What a worker is told at its start."""

    worker: int
    first: int
    source: Source
    ring: Ring
    learner: int
    dies_with_parent: bool
    layouts: int  # the number of its first layout: those of a worker before it in its place are still in use


# ---------------------------------------------------------------------------------------------------- in the worker


def _work(job: _Job, pipe: Connection) -> None:
    ignore_interrupts()  # Ctrl-C reaches workers too, but the learner decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    _watch(job)
    maker, number = _Maker(job, pipe), job.first
    try:
        while maker.wait_for(number):
            maker.make(number)
            number += job.ring.workers
    except (BrokenPipeError, ConnectionResetError, EOFError):
        pass  # the learner has closed the pipe, or is gone
    except BaseException as error:
        _report(pipe, number, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing of the learner's that was inherited shall run at exit


class _Maker:
    """A worker at work."""

    def __init__(self, job: _Job, pipe: Connection) -> None:
        self._job, self._ring, self._source, self._pipe, self._worker = job, job.ring, job.source, pipe, job.worker
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLIN)
        self._layouts: dict[Any, int] = {}

    def wait_for(self, number: int) -> bool:
        """Wait until a batch has been drawn; False where it is time to end."""
        ring = self._ring
        ring.act(self._worker, 1, number, time.monotonic_ns())
        while not ring.is_drawn(number, spin=True):
            ring.worker_sleeps(self._worker, True)
            if not ring.is_drawn(number) and not ring.is_stopped and self._poll.poll(_LOOK_S * 1e3):
                self._pipe.recv_bytes()
            ring.worker_sleeps(self._worker, False)
            if ring.is_stopped:
                return False
        return not ring.is_stopped

    def make(self, number: int) -> None:
        """Make a batch and deliver it."""
        ring, source, slot = self._ring, self._source, self._ring.slot_for(number)
        ring.act(self._worker, 2, number, time.monotonic_ns())
        address, room = ring.address + slot * ring.slot_bytes, ring.slot_bytes

        def allocate(nbytes: int) -> Tensor:
            return torch.from_numpy(ring.memory_of(slot, nbytes)) if 0 < nbytes <= room else allocate_private(nbytes)

        if source.transform is None:
            made = source.gather(number, allocate)
        else:
            batch = source.gather(number, allocate_private)
            ring.act(self._worker, 3, number, time.monotonic_ns())
            made = source.finish(batch, number)
        if isinstance(made, Batch):
            whole = made.block_and_layout()
            if whole is None or whole[0].data_ptr() != address:
                whole = made.in_block(allocate).block_and_layout()
            if whole is not None and whole[0].data_ptr() == address:
                self._deliver(number, slot, whole[1].nbytes, self._number_of(whole[1]))
                return
        self._send("batch", (number, made))
        self._deliver(number, slot, NOT_HERE, 0)

    def _deliver(self, number: int, slot: int, nbytes: int, layout: int) -> None:
        if self._ring.deliver(number, slot, nbytes, layout):
            self._pipe.send_bytes(_WAKE)

    def _number_of(self, layout: Layout) -> int:
        """Give the number of a layout, which the learner is told once."""
        known = self._layouts.get(layout.slots)
        if known is None:
            known = self._layouts[layout.slots] = self._job.layouts + len(self._layouts)
            self._send("layout", (known, layout))
        return known

    def _send(self, kind: str, content: tuple[Any, ...]) -> None:
        try:
            message = pickle.dumps((kind, *content))
        except Exception as error:
            raise WorkerError(
                f"the transform gave a {type(content[-1]).__name__} that cannot be sent to the learner: {error}; "
                "expected a Batch, or something that can be pickled."
            ) from error
        self._pipe.send_bytes(message)


def _report(pipe: Connection, number: int, error: BaseException) -> None:
    text = "".join(traceback.format_exception(error))
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)  # some can be packed and not unpacked: they take other arguments than they keep
    except Exception:
        packed = b""
    with suppress(OSError):  # nobody listens any more
        pipe.send_bytes(pickle.dumps(("failure", number, f"{type(error).__name__}: {error}", text, packed)))


def _watch(job: _Job) -> None:
    """End with the learner, however it ends: nobody else would tell a worker that computes, or that sleeps."""
    if job.dies_with_parent:
        _die_with_parent()
    try:
        handle = os.pidfd_open(job.learner)
    except (AttributeError, OSError):  # not Linux, or it is gone already
        threading.Thread(target=_outlive, args=(job.learner,), name="rlfeed-watch", daemon=True).start()
        return
    pollfd, waits = np.array([(handle, select.POLLIN, 0)], "i4,i2,i2"), np.zeros(1, np.int64)
    threading.Thread(target=_exit_after, args=(pollfd, waits), name="rlfeed-watch", daemon=True).start()
    while not waits[0]:  # the user's code may take the GIL and keep it
        time.sleep(1e-4)


def _exit_after(pollfd: np.ndarray, waits: np.ndarray) -> None:
    k.exit_after(pollfd.ctypes.data, waits.ctypes.data)


def _outlive(learner: int) -> None:
    while is_alive(learner):
        time.sleep(_LOOK_S)
    os._exit(0)


def _die_with_parent() -> None:
    """Have the kernel kill this process with the thread that started it: also one that was stopped."""
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ---------------------------------------------------------------------------------------------------- in the learner


class Workers:
    """Start worker processes, hand them batches to make, and take what they made.

    Args:
        source: What they make.
        ring: Where to.
        slots: The book of its slots.
        first: The first batch that is under way, or will be.
        context: How processes are started.
        timeout_s: Seconds to wait for a batch.
        on_death: What to do when one dies: raise, or start another that goes on with the same draws.
    """

    def __init__(
        self, source: Source, ring: Ring, slots: Slots, first: int, context: Any, timeout_s: float, on_death: OnDeath
    ) -> None:
        self._source, self.ring, self.slots, self._context = source, ring, slots, context
        self._timeout_s, self._on_death = timeout_s, on_death
        self._pipes: list[Connection | None] = [None] * ring.workers
        self._inboxes: list[Inbox | None] = [None] * ring.workers
        self._processes: list[Any] = [None] * ring.workers
        self._poll, self._owner = select.poll(), {}
        self._layouts: list[dict[int, Layout]] = [{} for _ in range(ring.workers)]
        self._parcels: dict[int, Any] = {}
        self._failures: dict[int, Exception] = {}
        self._deaths: list[tuple[int, int]] = [(-1, 0)] * ring.workers  # the batch it died with, how often in a row
        self._drawn = self._taken = first
        self._asked, self._wake_at = [0] * ring.workers, 1 + (slots.most_owed > 2)
        self.restarts, self._look_at = 0, 0.0
        self._lock = threading.RLock()  # of threads of the learner: one that draws, others that write
        self._end = weakref.finalize(self, _end, os.getpid(), ring, self._processes, self._pipes)
        for worker in range(ring.workers):
            self._start(worker)

    def _start(self, worker: int) -> None:
        """Start a worker at the first batch that it owes."""
        ring, first = self.ring, self._first_owed(worker)
        mine, theirs = self._context.Pipe(duplex=True)
        # The kernel takes the starting thread for the parent: a thread that ends would take its workers along.
        lives = threading.current_thread() is threading.main_thread()
        lives = lives and self._context.get_start_method() != "forkserver"
        job = _Job(worker, first, self._source, ring, os.getpid(), lives, max(self._layouts[worker], default=-1) + 1)
        process = self._context.Process(target=_work, args=(job, theirs), name=f"rlfeed-worker-{worker}", daemon=True)
        try:
            with uninterrupted(), undecided():
                process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            mine.close()
            raise ConfigError(
                f"make_loader: worker {worker} could not be started: {error}; expected a transform and buffers that "
                "can be pickled. Move the transform to the top level of a module, or set "
                "loader.multiprocessing_context = 'fork'."
            ) from error
        finally:
            theirs.close()
        self._pipes[worker], self._inboxes[worker], self._processes[worker] = mine, Inbox(mine), process
        for handle in (mine.fileno(), process.sentinel):
            self._poll.register(handle, select.POLLIN)
            self._owner[handle] = worker

    def _first_owed(self, worker: int) -> int:
        batch = next(n for n in range(self._taken, self._taken + self.ring.workers) if self.ring.worker_of(n) == worker)
        while batch < self._drawn and self.ring.is_ready(batch, self.slots.slot_of(batch)):
            batch += self.ring.workers
        return batch

    def begin(self, batch: int) -> None:
        """Have a batch made whose draws are known.

        Args:
            batch: The next one.
        """
        worker = self.ring.worker_of(batch)
        with self._lock:
            self._drawn = batch + 1
            sleeps = self.ring.publish(batch, self.slots.promise(batch))
            self._asked[worker] += 1
            if sleeps and self._asked[worker] >= self._wake_at:
                self._wake(worker)

    def _wake(self, worker: int) -> None:
        """Wake a worker: for two batches rather than one where it owes several, for that is what costs."""
        pipe, self._asked[worker] = self._pipes[worker], 0
        if pipe is not None:
            with suppress(OSError):  # it is dead: whoever looks next will see
                pipe.send_bytes(_WAKE)

    def take(self, batch: int) -> Any:
        """Wait for a batch and take it.

        Args:
            batch: The next one to be delivered.

        Returns:
            A `Batch`, or what the transform made of it.

        Raises:
            WorkerError: If its worker raised or died.
            FeedTimeoutError: If it does not come in time.
        """
        with self._lock:
            if (now := time.monotonic()) > self._look_at:
                self._look_at = now + _GLANCE_S
                self._watch(0)
            self._wait(batch)
            nbytes, number = self.ring.filled(self.slots.slot_of(batch))
            if nbytes == NOT_HERE:
                while batch not in self._parcels:  # it was sent before the word was given
                    self._watch(_LOOK_S)
                self.slots.drop(batch)
                made = self._parcels.pop(batch)
            else:
                layout = self._layout(self.ring.worker_of(batch), number)
                made = Batch.carve(self.slots.lease(batch, nbytes), layout, plain=True)
            self._taken = batch + 1
        return made

    def settle(self) -> None:
        """Wait until every batch that was begun has been made: its rows may be overwritten then.

        Errors are for whoever takes the batch: it is gathered anew after them.

        Raises:
            FeedTimeoutError: If one is not made in time.
        """
        with self._lock:
            for batch in range(self._taken, self._drawn):
                try:
                    self._wait(batch)
                except FeedTimeoutError:
                    raise
                except Exception as error:
                    self._failures[self.ring.worker_of(batch)] = error

    def _layout(self, worker: int, number: int) -> Layout:
        while number not in self._layouts[worker]:  # it was sent before the batch
            self._watch(_LOOK_S)
        return self._layouts[worker][number]

    def _wait(self, batch: int) -> None:
        """Wait until a batch is there; see `take`."""
        ring, slot = self.ring, self.slots.slot_of(batch)
        worker, begin = ring.worker_of(batch), time.monotonic()
        if ring.is_ready(batch, slot):
            return
        if self._asked[worker] and ring.is_asleep(worker):  # else nobody reads the byte: the pipe would fill up
            self._wake(worker)
        while not ring.is_ready(batch, slot, spin=True):
            if (failure := self._failures.pop(worker, None)) is not None:
                raise failure
            if self._pipes[worker] is None:
                self._start(worker)
            if time.monotonic() > begin + self._timeout_s:
                raise self._late(worker, batch)
            ring.learner_sleeps(True)
            if not ring.is_ready(batch, slot):
                self._watch(min(_LOOK_S, self._timeout_s))
            ring.learner_sleeps(False)

    def _late(self, worker: int, batch: int) -> FeedTimeoutError:
        act, number, since_s = self.ring.act_of(worker, time.monotonic_ns())
        return FeedTimeoutError(
            f"make_loader: waited {self._timeout_s:g} s for worker {worker} to make batch {batch} "
            f"({self._source.draws_of(batch)}); it has been {act} (batch {number}) for {since_s:.1f} s. See what the "
            "transform waits for, or raise timeout_s."
        )

    def _watch(self, wait_s: float) -> None:
        """Read what workers sent, and see who died."""
        for handle, _ in self._poll.poll(wait_s * 1e3):
            worker = self._owner.get(handle)
            inbox = None if worker is None else self._inboxes[worker]
            if worker is None or inbox is None:
                continue
            try:
                messages = inbox.read()
            except (EOFError, OSError):
                if self.ring.is_stopped:
                    raise ConfigError("ReplayLoader: was closed while this thread waited for a batch.") from None
                self._bury(worker)
                continue
            for message in messages or ():
                self._receive(worker, message)
            if messages is None and handle == self._processes[worker].sentinel:
                self._bury(worker)

    def _receive(self, worker: int, message: bytes) -> None:
        if not message:
            return
        kind, *content = pickle.loads(message)
        if kind == "layout":
            self._layouts[worker][content[0]] = content[1]
        elif kind == "batch":
            self._parcels[content[0]] = content[1]
        else:
            self._failures[worker] = self._failure(worker, *content)
            self._part(worker)

    def _failure(self, worker: int, batch: int, what: str, text: str, packed: bytes) -> Exception:
        cause = pickle.loads(packed) if packed else None
        where = f"worker {worker}, batch {batch} ({self._source.draws_of(batch)})"
        if isinstance(cause, RlfeedError) and not isinstance(cause, WorkerError):
            cause.add_note(f"In {where}:\n{text}")
            return cause
        error = WorkerError(f"{where}: {what}\n\n{text}")
        error.__cause__ = cause
        return error

    def _bury(self, worker: int) -> None:
        """See to a worker that died without a word."""
        process = self._processes[worker]
        self._part(worker)
        process.join(1.0)
        if process.is_alive():  # it has closed its pipe: nobody will hear from it again
            process.kill()
        batch = self._first_owed(worker)
        before, deaths = self._deaths[worker]
        deaths = deaths + 1 if before == batch else 1
        self._deaths[worker] = batch, deaths
        if self._on_death == "restart" and deaths < _DEATHS:
            self.restarts += 1
            self._start(worker)
            return
        self._failures[worker] = WorkerError(
            f"worker {worker} {how_it_ended(process.exitcode)} before batch {batch} ({self._source.draws_of(batch)}) "
            f"was made{f', {deaths} times in a row' if deaths > 1 else ''}; expected it to live as long as the loader. "
            + _advice(process.exitcode, self.ring.act_of(worker, 0)[0])
        )

    def _part(self, worker: int) -> None:
        pipe, process = self._pipes[worker], self._processes[worker]
        if pipe is not None:
            for handle in (pipe.fileno(), process.sentinel):
                self._poll.unregister(handle)
                self._owner.pop(handle, None)
            pipe.close()
            self._pipes[worker] = self._inboxes[worker] = None

    def close(self) -> None:
        """End all workers, whatever they do."""
        self._end()


def _end(owner: int, ring: Ring, processes: list[Any], pipes: list[Connection | None]) -> None:
    if owner != os.getpid():  # a forked child: they are not its workers
        return
    ring.stop()
    for pipe in pipes:
        if pipe is not None:
            with suppress(OSError):  # a worker that was forked holds our end too: closing ours does not wake it
                pipe.send_bytes(_WAKE)
            pipe.close()
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        if process is not None:
            process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process is not None and process.is_alive():
            process.kill()
    for process in processes:
        if process is not None:
            process.join(_GRACE_S)


def _advice(code: int | None, act: str) -> str:
    if code == -signal.SIGKILL:
        return "Perhaps memory ran out: see the system's log. on_worker_death='restart' goes on with the same draws."
    if act == "starting":
        return (
            "It had not begun to work: a script that starts processes needs `if __name__ == '__main__':` around what "
            "it does, and a script that is read from standard input has no file that they could import. Its own output "
            "says more."
        )
    return "on_worker_death='restart' goes on with the same draws."
