"""One exact finite pass: each stored step once."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from rlfeed.errors import ConfigError, UnsupportedError
from rlfeed.feed.dataset import Transform
from rlfeed.feed.rollouts import Pieces
from rlfeed.replay.buffer import ReplayBuffer
from rlfeed.replay.samplers import stream_key
from rlfeed.replay.units import Unit
from rlfeed.types import Batch


class Samples(Protocol):
    """Give samples that hold each step once, by number."""

    lengths: np.ndarray  # [N] int64, steps in each

    def take(self, picked: np.ndarray) -> Batch:
        """Gather samples.

        Args:
            picked: ``[B]`` int64, which ones.

        Returns:
            The batch.
        """
        ...


class Epoch(Iterator[Batch]):
    """Give samples once, in batches; made by `epoch`.

    Args:
        samples: What to give.
        order: Their numbers, in the order in which they are given.
        batch_size: B.
        count: How many batches.
        transform: Applied to each batch.
    """

    def __init__(
        self, samples: Samples, order: np.ndarray, batch_size: int, count: int, transform: Transform | None
    ) -> None:
        self._samples, self._order, self._batch_size, self._count = samples, order, batch_size, count
        self._transform, self._next = transform, 0

    def __len__(self) -> int:
        """Count the batches of the pass.

        Returns:
            Those already given included.
        """
        return self._count

    def __next__(self) -> Batch:
        if self._next == self._count:
            raise StopIteration
        begin = self._next * self._batch_size
        batch = self._samples.take(self._order[begin : begin + self._batch_size])
        if self._transform is not None:
            batch = self._transform(batch)
        self._next += 1  # only now: a batch that could not be given stays the next one
        return batch


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
        transform: Applied to each `Batch`.
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
    if num_workers:
        raise UnsupportedError(f"epoch: num_workers is {num_workers}; expected 0 in this version.")
    samples = Pieces(buffer, unit) if isinstance(buffer, Batch) else buffer.snapshot(unit)
    order = arrange(samples.lengths, batch_size, shuffle=shuffle, bucket=bucket, key=stream_key(seed, "epoch"))
    count = len(order) // batch_size if drop_last else -(-len(order) // batch_size)
    return Epoch(samples, order, batch_size, count, transform)


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
