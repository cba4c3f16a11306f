"""How batches are made whose draws are known: in this thread, in one beside it, or (`Workers`) in processes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Protocol

from rlfeed.errors import FeedTimeoutError, WorkerError
from rlfeed.feed.seeding import seeded
from rlfeed.replay.readers import Allocate, allocate_private
from rlfeed.types import Batch

Transform = Callable[[Batch], Any]


class Entries(Protocol):
    """Say what each batch holds: the draw table of a loader, the order of a pass."""

    key: int
    batch_size: int

    def entry(self, batch: int) -> Any:
        """Give what a batch holds.

        Args:
            batch: Its number.

        Returns:
            What `Samples.gather` takes.
        """
        ...


class Samples(Protocol):
    """Gather what an entry names: a mix of buffers, a snapshot of one."""

    def gather(self, entry: Any, allocate: Allocate = allocate_private, /) -> Batch:
        """Gather one batch.

        Args:
            entry: What it holds.
            allocate: Where its block comes from.

        Returns:
            The batch.
        """
        ...


class Source:
    """Make batches by their numbers, in whatever process: gather what an entry names, then transform it.

    Args:
        samples: What is gathered.
        entries: What each batch holds.
        transform: The user's code, or None.
    """

    def __init__(self, samples: Samples, entries: Entries, transform: Transform | None) -> None:
        self.samples, self.entries, self.transform = samples, entries, transform

    def gather(self, batch: int, allocate: Allocate = allocate_private) -> Batch:
        """Gather a batch whose draws are known.

        Args:
            batch: Its number.
            allocate: Where its block comes from.

        Returns:
            The batch.
        """
        return self.samples.gather(self.entries.entry(batch), allocate)

    def finish(self, gathered: Batch, batch: int) -> Any:
        """Transform a batch, under random generators that are seeded by its number.

        Args:
            gathered: The batch.
            batch: Its number.

        Returns:
            What the user's code makes of it.

        Raises:
            WorkerError: If that raises StopIteration, which would end a loop over the loader without a word.
        """
        if self.transform is None:
            return gathered
        with seeded(self.entries.key, batch):
            try:
                return self.transform(gathered)
            except StopIteration as error:
                raise WorkerError(
                    f"the transform raised StopIteration in batch {batch}; expected a Batch. Where it calls next(), "
                    "give it a default."
                ) from error

    def draws_of(self, batch: int) -> str:
        """Name the draws of a batch.

        Args:
            batch: Its number.

        Returns:
            Words for a message.
        """
        size = self.entries.batch_size
        return f"draws {batch * size} .. {(batch + 1) * size - 1}"


class Gatherer(Protocol):
    """Make batches whose draws are known."""

    def begin(self, batch: int) -> None:
        """Have a batch made.

        Args:
            batch: The next one.
        """
        ...

    def take(self, batch: int) -> Any:
        """Wait for a batch.

        Args:
            batch: The next one to be delivered.

        Returns:
            It.
        """
        ...

    def settle(self) -> None:
        """Wait until what was begun has been gathered: its rows may be overwritten then."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class AtOnce:
    """Gather when the draws are made.

    Args:
        source: What is made.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._gathered: dict[int, Batch] = {}

    def begin(self, batch: int) -> None:
        """Gather a batch; see `Gatherer.begin`."""
        self._gathered[batch] = self._source.gather(batch)

    def take(self, batch: int) -> Any:
        """Transform a batch; see `Gatherer.take`."""
        gathered = self._gathered[batch]
        try:
            made = self._source.finish(gathered, batch)
        except BaseException:  # it may be asked for again, and may have been changed in place
            self._gathered[batch] = self._source.gather(batch)
            raise
        del self._gathered[batch]
        return made

    def settle(self) -> None:
        """Do nothing: it has been gathered."""

    def close(self) -> None:
        """Do nothing: nothing was started."""


class InThread:
    """Gather in a thread beside this one; compiled gathers hold no GIL.

    Args:
        source: What is made.
        timeout_s: Seconds to wait for a batch.
    """

    def __init__(self, source: Source, timeout_s: float) -> None:
        self._source, self._timeout_s = source, timeout_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rlfeed-gather")
        self._begun: dict[int, Future[Batch]] = {}

    def begin(self, batch: int) -> None:
        """Have the thread gather a batch; see `Gatherer.begin`."""
        self._begun[batch] = self._pool.submit(self._source.gather, batch)

    def take(self, batch: int) -> Any:
        """Wait for the thread, and transform what it gathered; see `Gatherer.take`."""
        try:
            gathered = self._begun[batch].result(self._timeout_s)
        except FutureTimeoutError as error:
            raise self._late(batch) from error
        except Exception:
            self.begin(batch)  # it may be asked for again
            raise
        made = self._source.finish(gathered, batch)
        del self._begun[batch]
        return made

    def settle(self) -> None:
        """Wait for the thread; see `Gatherer.settle`. Errors are for whoever takes the batch."""
        begun = dict(self._begun)  # a copy: the learner's thread takes batches meanwhile
        if wait(begun.values(), self._timeout_s).not_done:
            raise self._late(min(begun))

    def _late(self, batch: int) -> FeedTimeoutError:
        return FeedTimeoutError(
            f"make_loader: waited {self._timeout_s:g} s for the thread that gathers batch {batch} "
            f"({self._source.draws_of(batch)}). Raise timeout_s, or lower batch_size."
        )

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
