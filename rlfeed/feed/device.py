"""The last leg: batches on the learner's device, with the next copies under way while the learner computes."""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rlfeed.errors import ConfigError, DeviceError, FeedTimeoutError, FieldError, NotEnoughDataError, UnsupportedError
from rlfeed.feed.engines import engine_for
from rlfeed.feed.transfers import Transfers
from rlfeed.types import Batch

_NOTHING = object()


@dataclass(frozen=True, slots=True)
class FeedStats:
    """Count what a feed delivered, how long its consumer waited, and what crossed to the device.

    Args:
        delivered: Batches handed to the consumer.
        in_flight: Batches taken from the loader and not handed over yet.
        wait_s: Seconds the consumer spent waiting, in all.
        transfers: Copies to the device.
        copied_bytes: What they copied, bytes.
    """

    delivered: int
    in_flight: int
    wait_s: float
    transfers: int
    copied_bytes: int

    @property
    def bytes_per_transfer(self) -> float:
        """Tell how large a transfer was.

        Returns:
            Bytes, on average; 0 where there was none.
        """
        return self.copied_bytes / max(self.transfers, 1)


def choose_device(name: str = "auto") -> tuple[torch.device, str]:
    """Choose the learner's device.

    Args:
        name: ``"auto"``, or a torch device such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Returns:
        The device, and why it was chosen.

    Raises:
        DeviceError: If it is not there.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        if accelerator is None:
            return torch.device("cpu"), "auto: torch finds no accelerator here"
        return torch.device(accelerator.type), f"auto: torch finds {accelerator.type}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device: is {name!r}; expected 'auto', 'cpu', 'cuda', 'cuda:0', 'mps', ...") from error
    if device.type != "cpu":
        have = accelerator.type if accelerator is not None else "cpu only"
        if accelerator is None or accelerator.type != device.type:
            built = "" if device.type != "cuda" or torch.version.cuda else " (this torch was built without CUDA)"
            raise DeviceError(
                f"device: is {name!r}, but torch finds {have} here{built}; expected a device that is there. Use 'auto'."
            )
        if device.index is not None and device.index >= torch.accelerator.device_count():
            raise DeviceError(f"device: is {name!r}; expected an index below {torch.accelerator.device_count()}.")
    return device, "as asked for"


class DeviceFeed:
    """Iterate over a loader's batches on the learner's device.

    One feed is one pass: iterate over it as often as you like, it goes on where it stopped. Call `next` on the stream
    that uses the batches, always the same one; then the ordinary rules of PyTorch hold for their memory.

    Args:
        loader: Anything that gives batches: a ReplayLoader, a DataLoader, a list. What it gives may be a `Batch`, a
            tensor, or dicts, lists, tuples and dataclasses of tensors; what is no tensor comes along as it is.
        device: ``"auto"``, or a torch device.
        depth: Batches under way ahead of the consumer, >= 1; where the device has no streams (CPU, MPS) none are.
        static_buffers: Give every batch in one of ``depth + 1`` places, in turn, so that CUDA graphs find it at one of
            so many addresses (on CPU and MPS: at one). A batch is valid until the call of `next` that follows, and all
            must have one shape. Ids, on the CPU, are each batch's own.

    Raises:
        DeviceError: If the device is not there.
        ConfigError: If the depth is wrong.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        device: str | torch.device = "auto",
        *,
        depth: int = 2,
        static_buffers: bool = False,
    ) -> None:
        if depth < 1:
            raise ConfigError(f"DeviceFeed: depth is {depth}; expected at least 1.")
        self.device, self.reason = choose_device(str(device))
        self._engine = engine_for(self.device)
        self._depth = depth if self._engine.reads_ahead else 0
        self._transfers = Transfers(self._engine, self._depth, static=static_buffers)
        self._loader, self._source, self._ended = loader, None, False
        self._taken: Any = _NOTHING  # from the loader, its copy not begun
        self._takes_late = self._engine.reads_ahead and hasattr(loader, "update_late")
        self._names: weakref.WeakKeyDictionary[Batch, Batch] = weakref.WeakKeyDictionary()
        self._delivered, self._wait_s = 0, 0.0
        self._failure: BaseException | None = None
        weakref.finalize(self, self._transfers.close)  # memory goes to others: not while copies use it

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        begin = time.monotonic()
        # One more than the depth: its copy runs while the consumer computes on the batch that is handed over now.
        while len(self._transfers) <= self._depth and self._start():
            pass
        if not len(self._transfers):
            failure, self._failure = self._failure, None
            raise failure or StopIteration
        batch, names = self._transfers.take()
        if names is not None:
            self._names[batch] = names
        self._tell_loader()
        self._delivered += 1
        self._wait_s += time.monotonic() - begin
        return batch

    def _start(self) -> bool:
        """Begin one more transfer; False where the loader has nothing now."""
        if self._ended or self._failure is not None:
            return False
        try:
            if self._source is None:
                self._source = self._open()
            if self._taken is _NOTHING:
                self._transfers.make_room()  # before the loader is asked: it may need the memory that is let go
                self._taken = next(self._source, _NOTHING)
                self._ended = self._taken is _NOTHING
            if self._ended:
                return False
            self._tell_loader()
            self._transfers.start(self._taken, self._names_of(self._taken))
        except Exception as error:
            if not len(self._transfers):
                raise
            # It is raised in its place, after the batches before it; what time mends is asked for again then.
            self._failure = None if isinstance(error, NotEnoughDataError | FeedTimeoutError) else error
            return False
        self._taken = _NOTHING
        return True

    def _open(self) -> Iterator[Any]:
        attach = getattr(self._loader, "attach", None)
        if attach is not None:
            attach(depth=self._depth, register=self._engine.register)
        return iter(self._loader)

    def _names_of(self, batch: Any) -> Batch | None:
        """Keep on the CPU what else than ids tells where priorities go: the loader would wait for the device for it."""
        if not (self._takes_late and isinstance(batch, Batch)):
            return None
        source, mask = batch.source, batch.loss_mask
        beside = [part for part in (source, mask) if part is not None]
        if not beside or self._engine.holds(beside[0]):
            return None
        shape = beside[-1].shape
        flags = torch.empty(shape, dtype=torch.bool)
        return Batch(
            observation=(),
            action=(),
            reward=torch.empty(shape),
            terminated=flags,
            truncated=flags,
            loss_mask=None if mask is None else mask.clone(),
            ids=None if batch.ids is None else batch.ids.clone(),
            source=None if source is None else source.clone(),
        )

    def _tell_loader(self) -> None:
        """Tell the loader how much of what it delivered is not with the consumer yet: its state begins there."""
        if hasattr(self._loader, "batches_ahead"):
            self._loader.batches_ahead = self._ahead()  # pyright: ignore[reportAttributeAccessIssue]

    def _ahead(self) -> int:
        return len(self._transfers) + (self._taken is not _NOTHING)

    def update_priorities(self, batch: Batch, values: Tensor | np.ndarray) -> None:
        """Give the samples of a batch new priorities.

        From the device they are fetched without a synchronisation, and take effect two batches later; from the CPU with
        the next one.

        Args:
            batch: From this feed.
            values: ``[B]``, >= 0, or ``[B, T]`` of a sequence's steps; see `ReplayLoader.update_priorities`.

        Raises:
            UnsupportedError: If the loader takes none.
            FieldError: If the batch has no ids, or other than there are values.
        """
        update = getattr(self._loader, "update_priorities", None)
        if update is None:
            raise UnsupportedError(
                f"DeviceFeed.update_priorities: the loader is a {type(self._loader).__name__}, which takes none; "
                "expected a ReplayLoader. Use make_loader(buffer, unit, batch_size=...)."
            )
        names = self._names.get(batch, batch)
        if self._takes_late and isinstance(values, Tensor) and self._engine.holds(values):
            self._loader.update_late(names, self._fetch(batch, values))  # pyright: ignore[reportAttributeAccessIssue]
        else:
            update(names, values)

    def _fetch(self, batch: Batch, values: Tensor) -> Callable[[], np.ndarray]:
        ids = None if batch.ids is None else tuple(batch.ids.shape)
        if tuple(values.shape[:1]) != ids:  # now: they are looked at when this call is long over
            raise FieldError(
                f"update_priorities: values has shape {tuple(values.shape)}, ids {ids}; expected one per sample."
            )
        narrow = values.dtype in (torch.float16, torch.bfloat16)  # NumPy has no bfloat16
        fetched = self._transfers.fetch(values.detach().float() if narrow else values.detach())
        return lambda: fetched().numpy()

    def stats(self) -> FeedStats:
        """Count deliveries, waiting and transfers.

        Returns:
            The counters so far.
        """
        transfers = self._transfers
        return FeedStats(self._delivered, self._ahead(), self._wait_s, transfers.copies, transfers.copied_bytes)

    def close(self) -> None:
        """End the pass: wait for copies under way, let go of the memory, and close the loader where it can be closed.

        What was taken from the loader and not handed over counts as never delivered: its `state_dict` begins there.
        """
        self._transfers.close()
        self._taken, self._failure, self._ended, self._source = _NOTHING, None, True, None
        if close := getattr(self._loader, "close", None):
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
