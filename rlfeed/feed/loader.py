"""`make_loader`: a `DataLoader` over a live buffer whose draws are made in the learner, counted, and can be resumed."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rlfeed.errors import ConfigError, UnsupportedError
from rlfeed.feed.dataset import Transform, allocate_shared
from rlfeed.feed.mix import Mix
from rlfeed.replay.buffer import ReplayBuffer
from rlfeed.replay.limiter import Limiter
from rlfeed.replay.readers import allocate_private
from rlfeed.replay.samplers import sequence_priorities, stream_key
from rlfeed.replay.table import DrawTable
from rlfeed.replay.units import Unit
from rlfeed.types import Batch

Buffers = ReplayBuffer | Sequence[tuple[ReplayBuffer, float]]


@dataclass(frozen=True, slots=True)
class LoaderStats:
    """Count a loader's samples: drawn = delivered + in_flight.

    Args:
        drawn: Samples drawn.
        delivered: Samples handed to the consumer.
        in_flight: Samples drawn and not delivered yet.
    """

    drawn: int
    delivered: int
    in_flight: int


class _Gathered(Dataset[Batch]):
    """Gather a batch by its number, in whatever process."""

    def __init__(self, mix: Mix, table: DrawTable, transform: Transform | None) -> None:
        self._mix, self._table, self._transform, self._learner = mix, table, transform, os.getpid()
        self.ahead: dict[int, Batch] = {}  # gathered at the tick already

    def gather(self, number: int) -> Batch:
        # A block born in shared memory travels to the learner without another copy.
        allocate = allocate_private if os.getpid() == self._learner else allocate_shared
        return self._mix.gather(self._table.entry(number), allocate)

    def __getitem__(self, number: int) -> Batch:
        batch = self.ahead[number] if number in self.ahead else self.gather(number)
        batch = batch if self._transform is None else self._transform(batch)
        self.ahead.pop(number, None)
        return batch


class _Numbers(Sampler[int]):
    """Name the batches in turn, from the next one to deliver."""

    def __init__(self, table: DrawTable) -> None:
        self._table = table

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._table.delivered)


class _Batches:
    """Iterate over a loader: not a generator, which an error would end for good."""

    def __init__(self, loader: "ReplayLoader", turn: int) -> None:
        self._loader, self._turn = loader, turn

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> Batch:
        return self._loader.deliver(self._turn)


class ReplayLoader(DataLoader[Any]):
    """Load whole batches from a live buffer; made by `make_loader`.

    Args:
        mix: What to draw from.
        table: The draws.
        num_workers: Worker processes; 0 gathers in this one, when the draws are made.
        transform: Applied to each batch, in the worker where there is one.
        timeout_s: Seconds to wait for a worker, or for the limiter.
        limiter: Bounds samples per inserted step.
    """

    def __init__(
        self,
        mix: Mix,
        table: DrawTable,
        num_workers: int,
        transform: Transform | None,
        timeout_s: float,
        limiter: Limiter | None,
    ) -> None:
        self.table, self._mix, self._timeout_s = table, mix, timeout_s
        self._gathered = _Gathered(mix, table, transform)
        workers: dict[str, Any] = {}
        if num_workers:
            # torch asks for so many batches ahead; all of them are drawn by then.
            workers = {"timeout": timeout_s, "prefetch_factor": max(1, table.lookahead // num_workers)}
        self._turn, self._limits = 0, False
        self._batches: Iterator[Batch] | None = None
        super().__init__(self._gathered, batch_size=None, sampler=_Numbers(table), num_workers=num_workers, **workers)
        if limiter is not None:
            self.set_limiter(limiter)
        self._gather_ahead()

    def _gather_ahead(self) -> None:
        """Gather what a table that was loaded has drawn already, where no worker will."""
        ahead = range(self.table.delivered, self.table.drawn) if self.num_workers == 0 else ()
        self._gathered.ahead = {number: self._gathered.gather(number) for number in ahead}

    @property
    def batches_ahead(self) -> int:
        """Tell how many batches a `DeviceFeed` has taken and not handed to the consumer yet.

        Returns:
            Batches.
        """
        return self.table.taken_ahead

    @batches_ahead.setter
    def batches_ahead(self, batches: int) -> None:
        self.table.taken_ahead = batches

    def _tick(self) -> None:
        """Make every draw up to the one ``lookahead`` after the batch that is about to be delivered."""
        while self.table.drawn <= self.table.delivered + self.table.lookahead:
            drawn = self._mix.tick(self.table, self._timeout_s)
            if self.num_workers == 0:
                self._gathered.ahead[drawn] = self._gathered.gather(drawn)

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begin another iterator where the one before stopped; that one ends."""
        self._turn, self._batches = self._turn + 1, None
        return _Batches(self, self._turn)

    def deliver(self, turn: int) -> Batch:
        """Hand out the next batch; after an error the same one may be asked for again.

        Args:
            turn: Which iterator asks.

        Returns:
            The batch.

        Raises:
            ConfigError: If another iterator has begun since, or the loader was closed or loaded.
            NotEnoughDataError: If there is nothing to draw, or the limiter waits, and nobody else writes.
            FeedTimeoutError: If writers do not come in time.
        """
        if turn != self._turn:
            raise ConfigError(
                "ReplayLoader: this iterator has ended: another one began, or the loader was closed or took a state; "
                "expected one at a time. Call iter(loader) again."
            )
        self._tick()
        self._mix.wait_to_take(self.table.batch_size, self._timeout_s)
        if self._batches is None:
            self._batches = super().__iter__()
        batch = next(self._batches)
        self._mix.take(self.table.delivered * self.table.batch_size, self.table.batch_size)
        self.table.delivered += 1
        return batch

    def set_limiter(self, limiter: Limiter | None) -> None:
        """Bound the samples delivered per inserted step, from now on.

        Args:
            limiter: The bound; None lets everybody pass.
        """
        self._mix.limit(limiter, self._timeout_s)
        self._limits = limiter is not None

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
        if given.ndim == 2 and batch.loss_mask is not None:
            given = sequence_priorities(given, batch.loss_mask.cpu().numpy(), self._mix.eta)
        return self._mix.update_priorities(batch, given)

    def stats(self) -> LoaderStats:
        """Count the samples of this loader.

        Returns:
            The counters so far.
        """
        size, delivered = self.table.batch_size, self.table.delivered - self.table.taken_ahead
        drawn = self.table.drawn * size
        return LoaderStats(drawn=drawn, delivered=delivered * size, in_flight=drawn - delivered * size)

    def state_dict(self) -> dict[str, Any]:
        """Give the number of the next batch to deliver, and the draws that were made ahead.

        `ReplayBuffer.save` saves it with the buffer: a loader made alike over the loaded one goes on by itself.

        Returns:
            The state.
        """
        return self.table.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another batch, with the next iterator.

        Args:
            state: From `state_dict`.
        """
        self.table.load_state_dict(state)
        self._turn, self._batches = self._turn + 1, None
        self._gather_ahead()

    def close(self) -> None:
        """Let the workers go, and the writers that a limiter of this loader holds back."""
        self._turn, self._batches = self._turn + 1, None
        if self._limits:
            self.set_limiter(None)


def make_loader(
    buffer: Buffers,
    unit: Unit,
    *,
    batch_size: int,
    num_workers: int | Literal["auto"] = 0,
    lookahead: int = 4,
    limiter: Limiter | None = None,
    transform: Transform | None = None,
    on_worker_death: Literal["raise", "restart"] = "raise",
    timeout_s: float = 60.0,
    seed: int = 0,
    rank: int = 0,
) -> ReplayLoader:
    """Make a loader of whole batches.

    Args:
        buffer: What to draw from; or several with their fractions, mixed exactly, with `Batch.source`.
        unit: What a draw becomes.
        batch_size: B >= 1.
        num_workers: Worker processes, at most ``lookahead``; 0 gathers in this one.
        lookahead: Batches drawn ahead of delivery, for any number of workers.
        limiter: Bounds samples per inserted step; of several buffers the first one's.
        transform: Applied to each `Batch`.
        on_worker_death: What to do when a worker dies.
        timeout_s: Seconds to wait for a batch, > 0.
        seed: Of the draws, >= 0.
        rank: Which of several learners, >= 0: each has draws of its own.

    Returns:
        The loader.

    Raises:
        ConfigError: If an argument is wrong; all findings at once.
        UnsupportedError: If this version does not serve it.
    """
    least = {"batch_size": (batch_size, 1), "lookahead": (lookahead, 0), "seed": (seed, 0), "rank": (rank, 0)}
    wrong = [f"{name} is {value}; expected at least {low}" for name, (value, low) in least.items() if value < low]
    if isinstance(num_workers, int | np.integer) and not 0 <= num_workers <= lookahead:
        wrong.append(f"num_workers is {num_workers}; expected 0 .. lookahead, which is {lookahead}")
    if timeout_s <= 0:
        wrong.append(f"timeout_s is {timeout_s}; expected more than 0")
    if wrong:
        raise ConfigError(f"make_loader: {'; '.join(wrong)}.")
    if not isinstance(num_workers, int | np.integer) or on_worker_death != "raise":
        raise UnsupportedError(
            f"make_loader: num_workers is {num_workers!r} and on_worker_death {on_worker_death!r}; expected an int and "
            "'raise' in this version."
        )
    mix = Mix([(buffer, 1.0)] if isinstance(buffer, ReplayBuffer) else list(buffer), unit, with_workers=num_workers > 0)
    key = stream_key(seed, "loader", rank=rank)
    table = DrawTable(mix.draw, key, batch_size, lookahead, shared=num_workers > 0)
    mix.buffers[0].keep(f"draws of {unit}, {batch_size} a batch, {lookahead} ahead, seed {seed}, rank {rank}", table)
    return ReplayLoader(mix, table, int(num_workers), transform, timeout_s, limiter)
