"""The last leg: batches on the learner's device, with the next copies under way while the learner computes."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlfeed.errors import ConfigError, DeviceError, UnsupportedError
from rlfeed.nest import map_nest
from rlfeed.types import Batch


@dataclass(frozen=True, slots=True)
class FeedStats:
    """Count what a feed delivered and how long its consumer waited.

    Args:
        delivered: Batches handed to the consumer.
        in_flight: Batches copied or being copied, not handed over yet.
        wait_s: Seconds the consumer spent waiting, in all.
    """

    delivered: int
    in_flight: int
    wait_s: float


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


class CopyEngine(Protocol):
    """Copy batches to a device, asynchronously where it can."""

    reads_ahead: bool

    def start(self, source: Any) -> tuple[Any, Any]:
        """Begin a copy.

        Args:
            source: The batch in host memory.

        Returns:
            The batch on the device, not to be read yet, and what tells when it may be.
        """
        ...

    def wait(self, ticket: Any) -> None:
        """Make the consumer's work that follows wait for a copy.

        Args:
            ticket: From `start`.
        """
        ...

    def is_over(self, ticket: Any) -> bool:
        """Tell whether a copy is over, so that its source may go.

        Args:
            ticket: From `start`.

        Returns:
            True where it is.
        """
        ...


class DirectEngine:
    """Hand batches over where they are (CPU), or copy them at once (devices without streams).

    Args:
        device: Where to.
    """

    reads_ahead = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self, source: Any) -> tuple[Any, Any]:
        """Copy now; see `CopyEngine.start`."""
        return _move(source, self._device, non_blocking=False), None

    def wait(self, ticket: Any) -> None:
        """Do nothing: the copy is over."""

    def is_over(self, ticket: Any) -> bool:
        """Tell that the copy is over; see `CopyEngine.is_over`."""
        return True


class StreamEngine:
    """Copy on a side stream of its own, from pinned memory, in one transfer a batch.

    The block on the device is allocated on the consumer's stream, so that it is freed by the usual rules; the side
    stream waits for what the consumer did with that memory before, and the consumer waits for the copy.

    Args:
        device: Where to.
    """

    reads_ahead = True

    def __init__(self, device: torch.device) -> None:
        index = device.index if device.index is not None else torch.accelerator.current_device_index()
        self._device = torch.device(device.type, index)
        self._side = torch.Stream(device=self._device)

    def start(self, source: Any) -> tuple[Any, Any]:
        """Begin a copy on the side stream; see `CopyEngine.start`."""
        consumer = torch.accelerator.current_stream(self._device)
        self._side.wait_stream(consumer)
        pinned = source if _is_pinned(source) else _map(source, lambda t: t.pin_memory(), Batch.pin_memory)

        current = torch.accelerator.current_device_index()

        def copy(tensor: Tensor) -> Tensor:
            target = torch.empty_like(tensor, device=self._device)
            self._side.wait_stream(consumer)
            torch.accelerator.set_stream(self._side)
            try:
                return target.copy_(tensor, non_blocking=True)
            finally:
                torch.accelerator.set_stream(consumer)
                torch.accelerator.set_device_index(current)

        moved = _map(pinned, copy, lambda batch: batch.through(copy))
        return moved, (self._side.record_event(), pinned)

    def wait(self, ticket: Any) -> None:
        """Make the consumer's stream wait for the copy; see `CopyEngine.wait`."""
        torch.accelerator.current_stream(self._device).wait_event(ticket[0])

    def is_over(self, ticket: Any) -> bool:
        """Tell whether the copy is over; see `CopyEngine.is_over`."""
        return ticket[0].query()


def engine_for(device: torch.device) -> CopyEngine:
    """Choose how batches reach a device.

    Args:
        device: Where to.

    Returns:
        A stream of its own where the device has streams, else direct copies.
    """
    return StreamEngine(device) if device.type in ("cuda", "xpu") else DirectEngine(device)


class DeviceFeed:
    """Iterate over a loader's batches on the learner's device.

    One feed is one pass: iterate over it as often as you like, it goes on where it stopped.

    Args:
        loader: Anything that gives batches: a DataLoader, a ReplayLoader, a list of tensors.
        device: ``"auto"``, or a torch device.
        depth: Batches under way ahead of the consumer, >= 1; where the device has no streams (CPU) none are.
        static_buffers: Give every batch in the same few buffers, for CUDA graphs.

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
        if static_buffers:
            raise UnsupportedError("DeviceFeed: static_buffers is True; expected False in this version.")
        self.device, _ = choose_device(str(device))
        self._loader, self._source = loader, None
        self._engine = engine_for(self.device)
        self._depth = depth if self._engine.reads_ahead else 1
        self._ready: deque[tuple[Any, Any]] = deque()
        self._copying: deque[Any] = deque()
        self._delivered, self._wait_s = 0, 0.0
        self._failure: BaseException | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        begin = time.monotonic()
        if self._source is None:
            self._source = iter(self._loader)
        # One more than the depth: its copy runs while the consumer computes on the batch that is handed over now.
        while len(self._ready) < self._depth + self._engine.reads_ahead and self._start():
            pass
        if not self._ready:
            failure, self._failure = self._failure, None
            raise failure or StopIteration
        batch, ticket = self._ready.popleft()
        self._engine.wait(ticket)
        if hasattr(self._loader, "batches_ahead"):
            self._loader.batches_ahead = len(self._ready)  # pyright: ignore[reportAttributeAccessIssue]
        while self._copying and self._engine.is_over(self._copying[0]):
            self._copying.popleft()
        self._delivered += 1
        self._wait_s += time.monotonic() - begin
        return batch

    def _start(self) -> bool:
        if self._source is None or self._failure is not None:
            return False
        try:
            source = next(self._source, None)
        except Exception as error:
            if not self._ready:
                raise
            self._failure = error  # raised in its place, after the batches before it
            return False
        if source is None:
            return False
        batch, ticket = self._engine.start(source)
        self._ready.append((batch, ticket))
        self._copying.append(ticket)  # holds the source until its copy is over
        return True

    def __del__(self) -> None:
        for _, ticket in getattr(self, "_ready", ()):  # their memory goes to others: not while copies write to it
            self._engine.wait(ticket)

    def update_priorities(self, batch: Batch, values: Tensor) -> None:
        """Give the samples of a batch new priorities.

        Args:
            batch: From this feed.
            values: ``[B]``, >= 0.

        Raises:
            UnsupportedError: If the loader takes none.
        """
        update = getattr(self._loader, "update_priorities", None)
        if update is None:
            raise UnsupportedError(
                f"DeviceFeed.update_priorities: the loader is a {type(self._loader).__name__}, which takes none; "
                "expected a ReplayLoader. Use make_loader(buffer, unit, batch_size=...)."
            )
        update(batch, values)

    def stats(self) -> FeedStats:
        """Count deliveries and waiting.

        Returns:
            The counters so far.
        """
        return FeedStats(self._delivered, len(self._ready), self._wait_s)


def _map(value: Any, fn: Any, whole: Any) -> Any:
    if isinstance(value, Batch):
        return whole(value)
    if isinstance(value, list):
        return [_map(part, fn, whole) for part in value]
    return map_nest(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, value)


def _move(value: Any, device: torch.device, non_blocking: bool) -> Any:
    return _map(value, lambda t: t.to(device, non_blocking=non_blocking), lambda b: b.to(device, non_blocking))


def _is_pinned(value: Any) -> bool:
    pinned: list[bool] = []
    _map(value, lambda t: pinned.append(t.is_pinned()), lambda b: pinned.append(b.is_pinned()))
    return all(pinned)
