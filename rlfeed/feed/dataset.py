"""The replay as an infinite `IterableDataset`, readable by torch's own `DataLoader` in the plainest way.

Draws are numbered by sample: batch b holds draws bB .. bB+B-1. Worker w of W makes batches w, w+W, ..., which is the
order in which torch asks for them, so the batches do not depend on the number of workers while the buffer rests. Each
new iterator has draws of its own.

Without a batch size the dataset yields *handles*: promises of one draw that cost 0.2 us. `pad_collate` sees B of them,
knows from their numbers which batch they are, and gathers that batch once, instead of B times one row.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from rlfeed.errors import (
    ConfigError,
    FeedTimeoutError,
    FieldError,
    NotEnoughDataError,
    UnsupportedError,
    WorkerError,
)
from rlfeed.feed.turns import Turns
from rlfeed.nest import Nest, map_nest
from rlfeed.replay.buffer import ReplayBuffer
from rlfeed.replay.limiter import Limiter
from rlfeed.replay.readers import allocate_private
from rlfeed.replay.samplers import stream_key
from rlfeed.replay.units import Unit
from rlfeed.types import Batch

WAIT_S = 60.0
Transform = Callable[[Batch], Batch]


class ReplayDataset(IterableDataset[Any]):
    """Draw from a live buffer for ever.

    Args:
        buffer: What to draw from; workers see what is added after they started.
        unit: What a draw becomes: Transition, Sequence or Episode.
        batch_size: B: yield whole batches, for ``DataLoader(..., batch_size=None)``. None: yield single samples, for
            ``DataLoader(..., batch_size=B, collate_fn=pad_collate)``. A collate function that is not ours gets mappings
            of arrays, one by one, and with several workers in another order of draws.
        transform: Applied to each `Batch`, in the worker where there is one.
        limiter: Bounds samples per inserted step; counts draws, for torch shows nobody a delivery.
        seed: Of the draws, >= 0.

    Raises:
        ConfigError: If the batch size or the seed is wrong, or a lane is shorter than a sample.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        unit: Unit,
        *,
        batch_size: int | None = None,
        transform: Transform | None = None,
        limiter: Limiter | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(buffer, ReplayBuffer):
            raise ConfigError(f"ReplayDataset: buffer is a {type(buffer).__name__}; expected a ReplayBuffer.")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"ReplayDataset: batch_size is {batch_size}; expected at least 1, or None.")
        if seed < 0:
            raise ConfigError(f"ReplayDataset: seed is {seed}; expected at least 0.")
        self._turns = Turns()
        buffer.unit_sampler(unit)  # refuses a unit that does not fit, now rather than in a worker
        self.buffer, self.unit, self.batch_size, self.transform, self.seed = buffer, unit, batch_size, transform, seed
        if limiter is not None:
            buffer.gate.limit(limiter, WAIT_S)

    def __iter__(self) -> Iterator[Any]:
        return _Stream(self)

    def state_dict(self) -> dict[str, int]:
        """Give where the next iterator begins.

        Returns:
            ``{"turn": i, "draw": n}``: how many iterators came before it, and its first draw. torch shows nobody a
            delivery: to go on within a turn, set ``draw`` to batches received x batch size.
        """
        turn, draw = self._turns.upcoming()
        return {"turn": turn, "draw": draw}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Begin the next iterator elsewhere.

        Args:
            state: ``{"draw": n}``, n a multiple of the batch size, and perhaps ``"turn"`` (else 0).
        """
        self._turns.restart(int(state.get("turn", 0)), int(state["draw"]))


class _Stream:
    """One worker's share of the draws: an iterator of handles, or of batches."""

    def __init__(self, dataset: ReplayDataset) -> None:
        worker = get_worker_info()
        self.dataset = dataset
        self.worker, self.num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self.in_worker = worker is not None
        if self.in_worker and dataset.buffer.storage_kind in ("private", "cuda"):
            raise UnsupportedError(
                f"ReplayDataset: the buffer has storage={dataset.buffer.storage_kind!r} and the DataLoader has "
                "workers; expected storage that workers see grow. Use storage='shared', or num_workers=0."
            )
        turn, self.first_draw = dataset._turns.begin()
        self.key = stream_key(dataset.seed, "loader", turn=turn)
        self.sampler = dataset.buffer.unit_sampler(dataset.unit)
        self._next = 0

    def __iter__(self) -> "_Stream":
        return self

    def __next__(self) -> Any:
        index = self._next
        self._next += 1
        if self.dataset.batch_size is None:
            return Handle(self, index)
        return self.batch(index, self.dataset.batch_size)

    def batch(self, index: int, size: int) -> Batch:
        """Draw and gather this worker's batch ``index`` of ``size`` samples, waiting for data if it may."""
        number = self.first_draw + (index * self.num_workers + self.worker) * size
        return self._transformed(self._read(number, size))

    def single(self, index: int) -> Batch:
        """Draw and gather one sample by itself, for a collate function that is not ours."""
        return self._transformed(self._read(self.first_draw + index * self.num_workers + self.worker, 1))

    def _transformed(self, batch: Batch) -> Batch:
        if self.dataset.transform is None:
            return batch
        try:
            return self.dataset.transform(batch)
        except StopIteration as error:  # torch would take it for the end of this worker's share, and say nothing
            raise WorkerError(
                f"ReplayDataset: the transform raised StopIteration in worker {self.worker}; expected a Batch. "
                "Where it calls next(), give it a default."
            ) from error

    def _read(self, number: int, size: int) -> Batch:
        # A block born in shared memory travels to the learner without another copy.
        allocate = allocate_shared if self.in_worker else allocate_private
        buffer, counter = self.dataset.buffer, self.worker + 1 if self.in_worker else 0
        others_write = self.in_worker or buffer.has_writers
        deadline, parent = time.monotonic() + WAIT_S, os.getppid()
        while True:
            try:
                buffer.gate.wait_to_take(size, WAIT_S, others_write)
                draws = self.sampler.draw(self.key, number, size, tick=not self.in_worker)
                batch = self.sampler.gather(draws, allocate)
                buffer.gate.take(size, counter)
                buffer.count_drawn(draws, counter)
                return batch
            except NotEnoughDataError as error:
                if not others_write:  # the caller is the only writer: waiting for itself would never end
                    raise
                if time.monotonic() > deadline:
                    raise FeedTimeoutError(f"worker {self.worker} waited {WAIT_S:g} s for data. {error}") from error
                if os.getppid() != parent:
                    raise SystemExit(0) from error  # the learner is gone
                time.sleep(0.002)


def allocate_shared(nbytes: int) -> Tensor:
    """Allocate a block in memory that travels to another process without a copy.

    Args:
        nbytes: Its length.

    Returns:
        uint8, not initialised.
    """
    storage = torch.UntypedStorage._new_shared(nbytes)  # what torch's own collate does in a worker
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class Handle(Mapping[str, Any]):
    """Promise one draw; become a mapping of arrays when touched, pickled or copied.

    Args:
        stream: The worker's share of the draws.
        index: Its place in that share.
    """

    __slots__ = ("index", "sample", "stream")

    def __init__(self, stream: _Stream, index: int) -> None:
        self.stream, self.index = stream, index
        self.sample: dict[str, Nest] | None = None

    def _gathered(self) -> dict[str, Nest]:
        if self.sample is None:
            self.sample = unbatch(self.stream.single(self.index))
        return self.sample

    def __getitem__(self, key: str) -> Any:
        return self._gathered()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._gathered())

    def __len__(self) -> int:
        return len(self._gathered())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._gathered(),)


def unbatch(batch: Batch) -> dict[str, Nest]:
    """Turn a batch of one into a sample.

    Args:
        batch: B = 1.

    Returns:
        Its fields by name, without the batch axis; fields that the unit does not have are left out.

    Raises:
        FieldError: If it has more rows than one.
    """
    if len(batch) != 1:
        raise FieldError(f"pad_collate: got a batch of {len(batch)} rows as a sample; expected batches of one.")
    values = {f.name: getattr(batch, f.name) for f in fields(batch) if f.init}
    return {name: map_nest(lambda t: t[0], value) for name, value in values.items() if not _is_absent(value)}


def _is_absent(value: Nest | None) -> bool:
    return value is None or (isinstance(value, dict | tuple) and not value)
