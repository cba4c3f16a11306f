"""What a device feed asks of a device: a stream of its own, events, and memory that both sides can read."""

from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from rlfeed.errors import CapacityError
from rlfeed.feed.page_lock import Register, Release, locked_limit, page_lock
from rlfeed.memory import readable_bytes


class Engine(Protocol):
    """Allocate, copy and order on one device.

    A stream does its work in order, and later than it was asked to; two streams know nothing of each other but by
    events.
    """

    device: torch.device
    reads_ahead: bool  # whether copies run beside the consumer's work
    side: Any  # a stream of its own

    @property
    def register(self) -> Register | None:
        """Give what page-locks memory for the device, once for many copies; see `page_lock`.

        Returns:
            Called with an address and a length in bytes; None where there is nothing of the kind.
        """
        ...

    def active(self) -> AbstractContextManager[Any]:
        """Make the device torch's current one for a while: all that follows is called inside.

        Returns:
            The context.
        """
        ...

    def consumer(self) -> Any:
        """Tell which stream the caller's own work goes to.

        Returns:
            The stream.
        """
        ...

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor lies on the device.

        Args:
            tensor: Anywhere.

        Returns:
            True where it does.
        """
        ...

    def allocate(self, like: Tensor) -> Tensor:
        """Allocate on the device, for the consumer's stream.

        Args:
            like: Whose shape and dtype it has.

        Returns:
            Memory that earlier work of the consumer's stream may still use.
        """
        ...

    def stage(self, tensor: Tensor) -> Tensor:
        """Put a tensor where the device reads it by itself.

        Args:
            tensor: In host memory.

        Returns:
            The tensor, if it lies in page-locked memory, else a copy of it there.
        """
        ...

    def landing(self, like: Tensor) -> Tensor:
        """Allocate host memory that the device writes by itself.

        Args:
            like: Whose shape and dtype it has.

        Returns:
            Memory of the host.
        """
        ...

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        """Put a copy at the end of a stream.

        Args:
            stream: ``side``, or from `consumer`.
            target: Where to.
            source: Where from; neither may go before the copy is over.
        """
        ...

    def record(self, stream: Any) -> Any:
        """Mark what a stream has to do so far.

        Args:
            stream: ``side``, or from `consumer`.

        Returns:
            The event at its end.
        """
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Have what comes next on a stream wait for an event.

        Args:
            stream: ``side``, or from `consumer`.
            event: From `record`.
        """
        ...

    def is_over(self, event: Any) -> bool:
        """Tell whether an event has come.

        Args:
            event: From `record`.

        Returns:
            True where it has.
        """
        ...

    def finish(self, event: Any) -> None:
        """Wait for an event here and now.

        Args:
            event: From `record`.
        """
        ...


class DirectEngine:
    """Copy here and now, where there are no streams (CPU, MPS); on a CPU there is nothing to copy.

    Args:
        device: Where to.
    """

    reads_ahead = False
    side = None
    register = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def active(self) -> AbstractContextManager[Any]:
        """Do nothing; see `Engine.active`."""
        return nullcontext()

    def consumer(self) -> Any:
        """Give none; see `Engine.consumer`."""
        return None

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor lies on the device; see `Engine.holds`."""
        return tensor.device.type == self.device.type

    def allocate(self, like: Tensor) -> Tensor:
        """Allocate on the device; see `Engine.allocate`."""
        return torch.empty_like(like, device=self.device)

    def stage(self, tensor: Tensor) -> Tensor:
        """Give the tensor; see `Engine.stage`."""
        return tensor

    def landing(self, like: Tensor) -> Tensor:
        """Allocate host memory; see `Engine.landing`."""
        return torch.empty_like(like, device="cpu")

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        """Copy now; see `Engine.copy`. Not asynchronously: MPS would read a source that is being written again."""
        target.copy_(source)

    def record(self, stream: Any) -> Any:
        """Give none: all is over; see `Engine.record`."""
        return None

    def wait(self, stream: Any, event: Any) -> None:
        """Do nothing; see `Engine.wait`."""

    def is_over(self, event: Any) -> bool:
        """Tell that it is over; see `Engine.is_over`."""
        return True

    def finish(self, event: Any) -> None:
        """Do nothing; see `Engine.finish`."""


class StreamEngine:
    """Copy on a side stream, from page-locked memory.

    Only this device gets a context: a call that made another one current, if only to restore it, would take some
    hundred megabytes of that one.

    Args:
        device: Where to; without an index torch's current one.
    """

    reads_ahead = True

    def __init__(self, device: torch.device) -> None:
        index = device.index if device.index is not None else torch.accelerator.current_device_index()
        self.device = torch.device(device.type, index)
        with self.active():
            self.side = torch.Stream(device=self.device)

    @property
    def register(self) -> Register | None:
        """Give what page-locks memory for the device; torch can do so with CUDA alone yet."""
        return self._register if self.device.type == "cuda" else None

    def active(self) -> AbstractContextManager[Any]:
        """Make the device current; see `Engine.active`."""
        return torch.get_device_module(self.device.type).device(self.device.index)

    def consumer(self) -> torch.Stream:
        """Tell which stream the caller's own work goes to; see `Engine.consumer`."""
        return torch.accelerator.current_stream(self.device)

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor lies on the device; see `Engine.holds`."""
        return tensor.device == self.device

    def allocate(self, like: Tensor) -> Tensor:
        """Allocate on the device, for the consumer's stream; see `Engine.allocate`."""
        return torch.empty_like(like, device=self.device)

    def stage(self, tensor: Tensor) -> Tensor:
        """Put a tensor into page-locked memory, dense; see `Engine.stage`."""
        if tensor.is_contiguous() and tensor.is_pinned():
            return tensor
        return self._pinned(tensor).copy_(tensor)

    def landing(self, like: Tensor) -> Tensor:
        """Allocate page-locked memory; see `Engine.landing`."""
        return self._pinned(like)

    def _pinned(self, like: Tensor) -> Tensor:
        try:
            return torch.empty_like(like, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise CapacityError(
                f"DeviceFeed: {readable_bytes(like.nbytes)} of page-locked memory could not be had "
                f"({str(error).splitlines()[0]}{locked_limit()}); expected room for a batch. Make batches smaller, or "
                "free memory."
            ) from error

    def copy(self, stream: torch.Stream, target: Tensor, source: Tensor) -> None:
        """Put a copy at the end of a stream; see `Engine.copy`."""
        before = torch.accelerator.current_stream(self.device)
        torch.accelerator.set_stream(stream)
        try:
            target.copy_(source, non_blocking=True)
        finally:
            torch.accelerator.set_stream(before)

    def record(self, stream: torch.Stream) -> torch.Event:
        """Mark what a stream has to do so far; see `Engine.record`."""
        return stream.record_event()

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        """Have what comes next on a stream wait for an event; see `Engine.wait`."""
        stream.wait_event(event)

    def is_over(self, event: torch.Event) -> bool:
        """Tell whether an event has come; see `Engine.is_over`."""
        return event.query()

    def finish(self, event: torch.Event) -> None:
        """Wait for an event here and now; see `Engine.finish`."""
        event.synchronize()

    def _register(self, address: int, nbytes: int) -> Release | None:
        with self.active():
            release = page_lock(torch.cuda.cudart(), address, nbytes, self._forget)
        return None if release is None else lambda: self._release(release)

    def _release(self, release: Release) -> None:
        with self.active():
            self.side.synchronize()  # a copy out of that memory may be under way
            release()

    def _forget(self) -> None:
        """Take note of the runtime's last error: else the next kernel that is launched would report it as its own."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device)


def engine_for(device: torch.device) -> Engine:
    """Choose how batches reach a device.

    Args:
        device: Where to.

    Returns:
        A stream of its own where the device has streams, else direct copies.
    """
    return StreamEngine(device) if device.type in ("cuda", "xpu") else DirectEngine(device)
