"""`make_loader`: a `DataLoader` over a live buffer whose draws are made in the learner, counted, and can be resumed."""

import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rlfeed.errors import ConfigError, FieldError
from rlfeed.feed.clock import Clock, Update
from rlfeed.feed.gatherers import Source, Transform
from rlfeed.feed.making import Making, Register
from rlfeed.feed.mix import Mix
from rlfeed.feed.workers import OnDeath
from rlfeed.memory import readable_bytes
from rlfeed.processes import context_of
from rlfeed.replay.buffer import ReplayBuffer
from rlfeed.replay.limiter import Limiter
from rlfeed.replay.samplers import sequence_priorities, stream_key
from rlfeed.replay.table import DrawTable
from rlfeed.replay.units import Unit
from rlfeed.types import Batch

Buffers = ReplayBuffer | Sequence[tuple[ReplayBuffer, float]]


@dataclass(frozen=True, slots=True)
class LoaderStats:
    """Count a loader's samples: drawn = delivered + in_flight + discarded.

    Args:
        drawn: Samples drawn.
        delivered: Samples handed to the consumer.
        in_flight: Samples drawn and not delivered yet.
        discarded: Samples drawn and never to be delivered: those under way when a state was loaded.
        copies: Batches that were copied for the consumer because it held too many.
        parcels: Batches that came by pipe because they fit no slot.
        restarts: Workers that died and were started again.
        slots: Slots of the ring, over all workers; 0 without workers.
        ring_bytes: Bytes of those slots, shared by all processes.
    """

    drawn: int
    delivered: int
    in_flight: int
    discarded: int = 0
    copies: int = 0
    parcels: int = 0
    restarts: int = 0
    slots: int = 0
    ring_bytes: int = 0


class _Live(IterableDataset[Any]):
    """What torch's loader is told that it loads."""

    def __init__(self, loader: "ReplayLoader") -> None:
        self._loader = weakref.ref(loader)  # strong, it would keep the workers until the next collection of cycles

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader()
        return iter(()) if loader is None else iter(loader)


class _Batches:
    """Iterate over a loader: not a generator, which an error would end for good."""

    def __init__(self, loader: "ReplayLoader", turn: int) -> None:
        self._loader, self._turn = loader, turn

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> Any:
        return self._loader.deliver(self._turn)


class ReplayLoader(DataLoader[Any]):
    """Load whole batches from a live buffer; made by `make_loader`.

    It is a `DataLoader` with an iterator of its own: batches of workers come through slots of shared memory, and such a
    batch is a lease of its slot, which ends when its tensors are collected. Hold as many as you like: where slots run
    short you are handed copies.

    Args:
        mix: What is drawn from.
        table: The draws.
        transform: Applied to each batch.
        num_workers: Worker processes; 0 gathers in this one, when the draws are made.
        timeout_s: Seconds to wait for a worker, or for the limiter.
        limiter: Bounds samples per inserted step.
        on_worker_death: What to do when a worker dies.
    """

    def __init__(
        self,
        mix: Mix,
        table: DrawTable,
        transform: Transform | None,
        num_workers: int | Literal["auto"],
        timeout_s: float,
        limiter: Limiter | None,
        on_worker_death: OnDeath,
    ) -> None:
        self._mix, self._table = mix, table
        self._clock, self._timeout_s = Clock(self._mix, self._table), timeout_s
        self._making = Making(Source(mix, table, transform), mix, table, num_workers, timeout_s, on_worker_death)
        self._turn, self._limiter, self._limits = 0, limiter, False
        self._owner, self._delivering = os.getpid(), threading.Lock()
        super().__init__(_Live(self), batch_size=None, num_workers=self._making.num_workers)
        self._limit()
        name = f"draws of {self._mix.unit}, {self._table.batch_size} a batch, key {self._table.key}"
        self._mix.buffers[0].keep(name, self._clock)
        self._making.hold()

    def check_worker_number_rationality(self) -> None:
        """Leave torch's warning out: workers here wait asleep, and more of them than processors are sometimes meant."""

    def __len__(self) -> NoReturn:
        raise TypeError("ReplayLoader: has no length: it goes on for ever. Bound it: itertools.islice(loader, n).")

    def __repr__(self) -> str:
        stats = self.stats()
        ring = f", {stats.slots} slots of {readable_bytes(stats.ring_bytes / stats.slots)}" if stats.slots else ""
        workers = f"{self._making.num_workers} workers ({self.choice}){ring}"
        return f"ReplayLoader({self._mix.unit}, {self._table.batch_size} a batch, {workers})"

    @property
    def choice(self) -> str:
        """Tell why batches are made where they are.

        Returns:
            Words: what ``num_workers="auto"`` measured and chose, once it has.
        """
        return self._making.choice

    @property
    def num_workers(self) -> int:
        """Count the worker processes.

        Returns:
            How many; 0 until ``"auto"`` has chosen.
        """
        return self._making.num_workers

    @num_workers.setter
    def num_workers(self, workers: int) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        pass  # by torch's constructor, where it is an attribute, and which was told what we have

    @property
    def multiprocessing_context(self) -> Any:
        """Give how workers are started.

        Returns:
            A context of `multiprocessing`; None where nobody has chosen one.
        """
        return self._making.context

    @multiprocessing_context.setter
    def multiprocessing_context(self, multiprocessing_context: Any) -> None:
        self._making.context = context_of(multiprocessing_context)

    def attach(self, *, depth: int, register: Register | None = None) -> None:
        """Tell how a `DeviceFeed` will take batches; the ring is made of the right size for it.

        Args:
            depth: Batches that it copies ahead.
            register: Locks the ring's memory (address, bytes) for transfers; gives what unlocks it, or None.

        Raises:
            ConfigError: If their draws would not be kept until they are with the consumer, and no state could be given.
            CapacityError: If the ring does not fit then.
        """
        self._making.attach(depth, register)

    # ----------------------------------------------------------------------------------------------------- iterating

    @property
    def batches_ahead(self) -> int:
        """Tell how many batches a `DeviceFeed` has taken and not handed to the consumer yet.

        Returns:
            Batches.
        """
        return self._table.taken_ahead

    @batches_ahead.setter
    def batches_ahead(self, batches: int) -> None:
        self._table.taken_ahead = batches

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begin another iterator where the one before stopped; that one ends.

        What a `DeviceFeed` took from it and has not handed over comes again.
        """
        if self._clock.take_back():
            self._making.end()
        self._limit()
        self._turn += 1
        return _Batches(self, self._turn)

    def deliver(self, turn: int) -> Any:
        """Hand out the next batch; after an error the same one may be asked for again.

        Args:
            turn: Which iterator asks.

        Returns:
            The batch; what the transform made of it.

        Raises:
            ConfigError: If another iterator has begun since, the loader was closed or loaded, or this process is a
                fork of the one that made it.
            NotEnoughDataError: If there is nothing to draw, or the limiter waits, and nobody else writes.
            FeedTimeoutError: If writers or workers do not come in time.
            WorkerError: If a worker raised or died.
        """
        with self._delivering:  # threads have a batch each
            self._check_turn(turn)
            try:
                return self._deliver()
            except Exception:
                raise
            except BaseException:  # Ctrl-C, anywhere: what is under way is made anew
                self._making.end()
                raise

    def _deliver(self) -> Any:
        table, making = self._table, self._making
        while table.drawn <= table.delivered + table.lookahead:
            self._clock.tick(self._timeout_s)
            making.begin()
        gatherer = making.begin()
        self._mix.wait_to_take(table.batch_size, self._timeout_s)
        batch = gatherer.take(table.delivered)
        self._clock.count_delivered()
        return batch

    def _check_turn(self, turn: int) -> None:
        if os.getpid() != self._owner:
            raise ConfigError(
                "ReplayLoader: this process is a fork of the one that made the loader; expected the one whose workers "
                "they are. Make a loader here."
            )
        if turn != self._turn:
            raise ConfigError(
                "ReplayLoader: this iterator has ended: another one began, or the loader was closed or took a state; "
                "expected one at a time. Call iter(loader) again."
            )

    # ------------------------------------------------------------------------------------------------- and back again

    def set_limiter(self, limiter: Limiter | None) -> None:
        """Bound the samples delivered per inserted step, from now on.

        Args:
            limiter: The bound; None lets everybody pass.
        """
        self._limiter = limiter
        self._mix.limit(limiter, self._timeout_s)
        self._limits = limiter is not None

    def _limit(self) -> None:
        """Set the limiter where `close`, or nobody yet, has."""
        if self._limiter is not None and not self._limits:
            self.set_limiter(self._limiter)

    def update_priorities(self, batch: Batch, values: Tensor | np.ndarray) -> int:
        """Give the samples of a batch new priorities, from the next draws on.

        Args:
            batch: From this loader.
            values: ``[B]``, finite, >= 0; or ``[B, T]`` of a sequence's steps, which become eta max + (1 - eta) mean
                over `Batch.loss_mask`.

        Returns:
            How many were applied.

        Raises:
            UnsupportedError: If the buffer's sampler keeps no priorities.
            FieldError: If a value is no priority, or the shapes differ.
        """
        given = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        return self._mix.update_priorities(*self._update_of(batch, given))

    def update_late(self, batch: Batch, fetch: Callable[[], np.ndarray]) -> None:
        """Give the samples of a batch new priorities two ticks from now; see `DeviceFeed.update_priorities`.

        Args:
            batch: From this loader: its ids, source and loss mask, of which all but the ids may still be on their way.
            fetch: Waits for them and for the values, ``[B]`` or ``[B, T]``, and gives the values.
        """

        def fetch_all() -> Update:
            given = fetch()
            return self._update_of(batch, given)

        self._clock.update_late(fetch_all)

    def _update_of(self, batch: Batch, given: np.ndarray) -> Update:
        if batch.ids is None:
            raise FieldError("update_priorities: the batch has no ids; expected one of this loader.")
        if given.ndim == 2 and batch.loss_mask is not None:
            given = sequence_priorities(given, batch.loss_mask.cpu().numpy(), self._mix.eta)
        source = None if batch.source is None else batch.source.cpu().numpy()
        return batch.ids.cpu().numpy(), source, given

    # ------------------------------------------------------------------------------------------- accounting and state

    def stats(self) -> LoaderStats:
        """Count the samples of this loader.

        Returns:
            The counters so far.
        """
        table, size = self._table, self._table.batch_size
        return LoaderStats(
            self._clock.drawn * size,
            (self._clock.delivered - table.taken_ahead) * size,
            (table.drawn - table.delivered + table.taken_ahead) * size,
            self._clock.discarded * size,
            *self._making.counts(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Give the number of the next batch to deliver, and what the draws made ahead were made on.

        `ReplayBuffer.save` saves it with the buffer: a loader made alike over the loaded one goes on by itself.

        Returns:
            The state: a few words for each lane; with priorities the ids of the batches in flight.
        """
        return self._clock.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another batch, with the next iterator and any number of workers.

        Args:
            state: From `state_dict`.

        Raises:
            CheckpointError: If it is of other draws.
        """
        self._making.end()
        self._turn += 1
        self._clock.load_state_dict(state)
        self._making.hold()

    def close(self) -> None:
        """Let the workers go, and the writers that a limiter of this loader holds back, until the next iterator."""
        self._turn += 1
        self._making.close()
        if self._limits:
            self._mix.limit(None, self._timeout_s)
            self._limits = False

    def __enter__(self) -> "ReplayLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def make_loader(
    buffer: Buffers,
    unit: Unit,
    *,
    batch_size: int,
    num_workers: int | Literal["auto"] = 0,
    lookahead: int = 4,
    limiter: Limiter | None = None,
    transform: Transform | None = None,
    on_worker_death: OnDeath = "raise",
    timeout_s: float = 60.0,
    seed: int = 0,
    rank: int = 0,
) -> ReplayLoader:
    """Make a loader of whole batches.

    Workers are started as ``multiprocessing.set_start_method`` said for this process, else by a fork server, else by
    spawning; set ``loader.multiprocessing_context`` before the first batch, as with any `DataLoader`, to choose.

    Args:
        buffer: What to draw from; or several with their fractions, mixed exactly, with `Batch.source`.
        unit: What a draw becomes.
        batch_size: B >= 1.
        num_workers: Worker processes, at most ``lookahead``; 0 gathers in this one. ``"auto"`` measures a batch and
            chooses a thread of this process or workers; `ReplayLoader.choice` says why.
        lookahead: Batches drawn ahead of delivery, for any number of workers.
        limiter: Bounds samples per inserted step; of several buffers the first one's.
        transform: Applied to each `Batch`, in the worker where there is one, with torch's, NumPy's and Python's global
            generators seeded by the batch's number. What it gives is what is delivered; a `Batch` travels fastest.
            With workers it is called once more in this process, to learn how large its results are.
        on_worker_death: ``"raise"``, or ``"restart"``: another worker goes on with the same draws.
        timeout_s: Seconds to wait for a batch, > 0.
        seed: Of the draws, >= 0.
        rank: Which of several learners, >= 0: each has draws of its own.

    Returns:
        The loader.

    Raises:
        ConfigError: If an argument is wrong; all findings at once.
        UnsupportedError: If other processes cannot see the buffer.
        CapacityError: If the batches under way do not fit in memory, with the numbers.
    """
    least = {"batch_size": (batch_size, 1), "lookahead": (lookahead, 0), "seed": (seed, 0), "rank": (rank, 0)}
    wrong = [
        f"{name} is {value!r}; expected an int of at least {low}"
        for name, (value, low) in least.items()
        if not _is_int(value) or value < low
    ]
    if not _is_int(num_workers) and num_workers != "auto":
        wrong.append(f"num_workers is {num_workers!r}; expected 0 .. lookahead, or 'auto'")
    elif _is_int(num_workers) and _is_int(lookahead) and not 0 <= int(num_workers) <= max(lookahead, 0):
        wrong.append(f"num_workers is {num_workers}; expected 0 .. lookahead, which is {lookahead}")
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        wrong.append(f"timeout_s is {timeout_s!r}; expected seconds above 0")
    if limiter is not None and not isinstance(limiter, Limiter):
        wrong.append(f"limiter is {limiter!r}; expected a Limiter, or None")
    if not isinstance(buffer, ReplayBuffer) and not _is_mixture(buffer):
        wrong.append(f"buffer is {buffer!r}; expected a ReplayBuffer, or a list of (buffer, fraction)")
    if on_worker_death not in get_args(OnDeath):
        wrong.append(f"on_worker_death is {on_worker_death!r}; expected one of {get_args(OnDeath)}")
    if transform is not None and not callable(transform):
        wrong.append(f"transform is {transform!r}; expected a function of a Batch")
    if wrong:
        raise ConfigError(f"make_loader: {'; '.join(wrong)}.")
    shared = num_workers != 0
    parts = [(buffer, 1.0)] if isinstance(buffer, ReplayBuffer) else list(buffer)
    mix = Mix(parts, unit, with_workers=shared and num_workers != "auto")
    table = DrawTable(mix.fill, stream_key(seed, "loader", rank=rank), batch_size, lookahead, shared=shared, past=mix)
    workers = num_workers if num_workers == "auto" else int(num_workers)
    return ReplayLoader(mix, table, transform, workers, timeout_s, limiter, on_worker_death)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_mixture(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(part, tuple | list) and len(part) == 2 for part in value)
