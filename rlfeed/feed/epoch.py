"""One exact finite pass: each stored step once."""

import multiprocessing
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlfeed.errors import ConfigError, UnsupportedError
from rlfeed.feed.calibration import slot_bytes_for
from rlfeed.feed.dataset import WAIT_S
from rlfeed.feed.gatherers import AtOnce, Gatherer, Source, Transform
from rlfeed.feed.ring import Ring, Slots, slots_for
from rlfeed.feed.rollouts import Pieces
from rlfeed.feed.workers import Workers
from rlfeed.processes import choose_context
from rlfeed.replay.buffer import ReplayBuffer
from rlfeed.replay.samplers import stream_key
from rlfeed.replay.units import Unit
from rlfeed.types import Batch

_AHEAD = 4  # batches that workers make before they are asked for, at least


class Order:
    """Say which samples each batch of a pass holds: a draw table that is known from the beginning.

    Args:
        numbers: ``[N]`` int64, the samples' numbers in the order of the pass.
        batch_size: B.
        key: Of the pass.
    """

    def __init__(self, numbers: np.ndarray, batch_size: int, key: int) -> None:
        self._numbers, self.batch_size, self.key = numbers, batch_size, key

    def entry(self, batch: int) -> np.ndarray:
        """Give the samples of a batch.

        Args:
            batch: Its number.

        Returns:
            ``[B]`` int64; fewer in a last short batch.
        """
        return self._numbers[batch * self.batch_size : (batch + 1) * self.batch_size]


class _Slots(Slots):
    """Slots of a pass, whose batches may well be kept, all of them: copies are no mistake then."""

    def _warn(self, what: str, message: str) -> None:
        if what != "copies":
            super()._warn(what, message)


class Epoch(Iterator[Any]):
    """Give the batches of one pass; made by `epoch`.

    Args:
        source: What makes them, by their numbers.
        count: How many there are.
        num_workers: Worker processes; 0 makes each when it is asked for.
        most_bytes: Of the largest one before it is transformed; for workers.
    """

    def __init__(self, source: Source, count: int, num_workers: int, most_bytes: int) -> None:
        self._source, self._count, self._num_workers, self._most_bytes = source, count, num_workers, most_bytes
        self._ahead = max(_AHEAD, num_workers) if num_workers else 0
        self._begun = self._given = 0
        self._gatherer: Gatherer | None = None

    def __len__(self) -> int:
        """Count the batches of the pass.

        Returns:
            Those already given included.
        """
        return self._count

    def __next__(self) -> Any:
        if self._given == self._count:
            self.close()
            raise StopIteration
        if self._gatherer is None:
            self._gatherer = self._start()
        while self._begun < min(self._count, self._given + self._ahead + 1):
            self._gatherer.begin(self._begun)
            self._begun += 1
        batch = self._gatherer.take(self._given)
        self._given += 1  # only now: a batch that could not be given stays the next one
        return batch

    def _start(self) -> Gatherer:
        if self._num_workers and multiprocessing.current_process().daemon:
            message = "epoch: this process is a daemon, which may not start processes: it gathers itself instead."
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            self._num_workers = self._ahead = 0
        if not self._num_workers:
            return AtOnce(self._source)
        slots, owed = slots_for(self._num_workers, self._ahead, 0)
        ring = Ring(self._num_workers, slots, slot_bytes_for(self._source, self._most_bytes, 0), self._ahead + 1)
        return Workers(self._source, ring, _Slots(ring, owed), 0, choose_context(None), WAIT_S, "raise")

    def close(self) -> None:
        """Let the workers go, and end the pass."""
        if self._gatherer is not None:
            self._gatherer.close()
        self._given, self._gatherer = self._count, None


def epoch(
    buffer: ReplayBuffer | Batch,
    unit: Unit,
    batch_size: int,
    *,
    shuffle: bool = True,
    drop_last: bool = False,
    num_workers: int = 0,
    seed: int = 0,
    transform: Transform | None = None,
    bucket: int = 1,
) -> Epoch:
    """Go through what is stored now once: each step in exactly one sample.

    What is added later is not seen; where it overwrites a step that was not given yet, the pass ends with an error. How
    a unit holds each step once, `Snapshot` says for a buffer, and `Pieces` for a rollout's batch.

    Args:
        buffer: What to go through; or a batch of steps, such as a block of a rollout.
        unit: What the samples are.
        batch_size: B >= 1.
        shuffle: Whether in random order; another seed gives another one.
        drop_last: Leave out a last batch that is not full.
        num_workers: Processes that gather; the batches do not depend on it.
        seed: Of the order, >= 0.
        transform: Applied to each `Batch`, in the worker where there is one; see `make_loader`.
        bucket: Above 1, samples of similar length come together, which saves padding: of every ``bucket`` batches the
            samples are sorted by length before they are cut into batches again, and batches come in random order.

    Returns:
        An iterator over the batches of one pass, which knows its `len`.

    Raises:
        ConfigError: If an argument is wrong; all findings at once.
        NotEnoughDataError: If no step is stored.
        StaleReadError: While iterating, if a step was overwritten before it was given.
        UnsupportedError: If the unit's samples cannot hold each step once.
    """
    least = {"batch_size": (batch_size, 1), "num_workers": (num_workers, 0), "seed": (seed, 0), "bucket": (bucket, 1)}
    wrong = [
        f"{name} is {value!r}; expected an int >= {low}"
        for name, (value, low) in least.items()
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low
    ]
    if not isinstance(buffer, ReplayBuffer | Batch):
        wrong.append(f"buffer is a {type(buffer).__name__}; expected a ReplayBuffer, or a Batch of steps")
    if wrong:
        raise ConfigError(f"epoch: {'; '.join(wrong)}.")
    if num_workers and (isinstance(buffer, Batch) or buffer.storage_kind in ("private", "cuda")):
        kind = "a Batch" if isinstance(buffer, Batch) else f"storage={buffer.storage_kind!r}"
        raise UnsupportedError(
            f"epoch: num_workers is {num_workers} and the steps lie in {kind}; expected storage that other processes "
            "see. Use num_workers=0, or a buffer with storage='shared'."
        )
    samples = Pieces(buffer, unit) if isinstance(buffer, Batch) else buffer.snapshot(unit)
    key = stream_key(seed, "epoch")
    order = Order(arrange(samples.lengths, batch_size, shuffle=shuffle, bucket=bucket, key=key), batch_size, key)
    count = len(samples.lengths) // batch_size if drop_last else -(-len(samples.lengths) // batch_size)
    most_bytes = 0 if isinstance(samples, Pieces) else samples.most_bytes(batch_size)
    return Epoch(Source(samples, order, transform), count, int(num_workers), most_bytes)


def arrange(lengths: np.ndarray, batch_size: int, *, shuffle: bool, bucket: int, key: int) -> np.ndarray:
    """Put samples in the order of a pass.

    Args:
        lengths: ``[N]``, steps in each sample.
        batch_size: B.
        shuffle: Whether in random order.
        bucket: Batches among which samples are sorted by length.
        key: Of the random order.

    Returns:
        ``[N]`` int64: batch b has the samples ``bB .. bB + B - 1`` of it.
    """
    generator = np.random.Generator(np.random.Philox(key=key & (1 << 64) - 1))
    order = generator.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if bucket == 1:
        return order
    full, last = np.split(order, [len(order) // batch_size * batch_size])  # a last short batch is of any lengths
    pool = bucket * batch_size
    for begin in range(0, len(full), pool):
        part = full[begin : begin + pool]
        full[begin : begin + pool] = part[np.argsort(lengths[part], kind="stable")]
    batches = full.reshape(-1, batch_size)
    if shuffle:
        batches = batches[generator.permutation(len(batches))]
    return np.concatenate([batches.ravel(), last])
