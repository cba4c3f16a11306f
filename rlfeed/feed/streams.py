"""Streams beside the infinite one: a finite loader that goes on for ever, one exact pass, a user's own generator."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rlfeed.errors import ConfigError, UnsupportedError
from rlfeed.replay.buffer import ReplayBuffer
from rlfeed.replay.units import Unit
from rlfeed.types import Batch


def cycle(loader: Iterable[Any]) -> Iterator[Any]:
    """Go through a finite loader again and again; each pass is a new iterator of it.

    Args:
        loader: Anything that can be iterated over more than once, and gives at least one batch.

    Yields:
        Its batches, for ever.

    Raises:
        ConfigError: If a pass gives nothing: it would turn in circles for ever.
    """
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ConfigError(
                f"cycle: a pass over the {type(loader).__name__} gave nothing; expected at least one batch. An "
                "iterator can be gone through only once: give the loader itself."
            )


def epoch(
    buffer: ReplayBuffer,
    unit: Unit,
    batch_size: int,
    *,
    shuffle: bool = True,
    drop_last: bool = False,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Go through what a buffer holds once: each stored step exactly once.

    Args:
        buffer: What to go through.
        unit: What a start becomes.
        batch_size: B >= 1.
        shuffle: In random order.
        drop_last: Leave out a last batch that is not full.
        num_workers: Processes that gather.

    Returns:
        The batches of one pass.

    Raises:
        UnsupportedError: In this version.
    """
    asked = f"{buffer!r}, {unit}, {batch_size}, shuffle={shuffle}, drop_last={drop_last}, num_workers={num_workers}"
    raise UnsupportedError(f"epoch({asked}): is not served by this version. Draw with ReplayDataset.")


def stream(factory: Callable[..., Iterator[Any]]) -> Any:
    """Make an `IterableDataset` of a generator function, called once in each worker.

    Args:
        factory: Called with the worker's id, the number of workers and a seed.

    Returns:
        The dataset.

    Raises:
        UnsupportedError: In this version.
    """
    raise UnsupportedError(f"stream({factory!r}): is not served by this version. Write an IterableDataset of your own.")
