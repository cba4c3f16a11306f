"""What orders the work of writers and readers on an accelerator: streams, events, and memory that it can read."""

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from rlfeed.errors import DeviceError


class Engine(Protocol):
    """Run work on the streams of one device.

    A stream does its work in order, and later than it was asked to; two streams know nothing of each other but by
    events.
    """

    device: torch.device
    writer: Any

    def reader(self) -> Hashable:
        """Tell which stream the caller's own work goes to.

        Returns:
            The stream.
        """
        ...

    def launch(self, stream: Any, work: Callable[[], Any]) -> None:
        """Put work at the end of a stream.

        Args:
            stream: ``writer``, or from `reader`.
            work: Launches operations; it returns before they are over.
        """
        ...

    def record(self, stream: Any) -> Any:
        """Mark what a stream has to do so far.

        Args:
            stream: ``writer``, or from `reader`.

        Returns:
            The event at its end.
        """
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Have what comes next on a stream wait for an event.

        Args:
            stream: ``writer``, or from `reader`.
            event: From `record`.
        """
        ...

    def finish(self, event: Any) -> None:
        """Wait for an event here and now.

        Args:
            event: From `record`.
        """
        ...

    def stage(self, nbytes: int) -> Tensor:
        """Allocate host memory from which the device copies by itself.

        Args:
            nbytes: Its length.

        Returns:
            uint8, not initialised; the device's copies out of it may outlive it.
        """
        ...

    def free_bytes(self) -> int:
        """Tell how much memory of the device is free.

        Returns:
            Bytes.
        """
        ...


class CudaEngine:
    """Write on a stream of its own, read on whatever stream the caller uses.

    Args:
        device: With its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.writer = device, torch.cuda.Stream(device)

    def reader(self) -> torch.cuda.Stream:
        """Tell which stream the caller's own work goes to; see `Engine.reader`."""
        return torch.cuda.current_stream(self.device)

    def launch(self, stream: torch.cuda.Stream, work: Callable[[], Any]) -> None:
        """Put work at the end of a stream; see `Engine.launch`."""
        with torch.cuda.stream(stream):
            work()

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Mark what a stream has to do so far; see `Engine.record`."""
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Have what comes next on a stream wait for an event; see `Engine.wait`."""
        stream.wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        """Wait for an event here and now; see `Engine.finish`."""
        event.synchronize()

    def stage(self, nbytes: int) -> Tensor:
        """Allocate pinned memory; see `Engine.stage`. Torch keeps it from others while copies out of it run."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def free_bytes(self) -> int:
        """Tell how much memory of the device is free; see `Engine.free_bytes`."""
        return torch.cuda.mem_get_info(self.device)[0]


def choose_engine() -> Engine:
    """Choose the device of ``storage="cuda"``: torch's current one.

    Returns:
        Its engine.

    Raises:
        DeviceError: If torch finds no CUDA device.
    """
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this torch was built without CUDA)"
        raise DeviceError(
            f"ReplayBuffer: storage is 'cuda', but torch finds no CUDA device here{built}; expected one. Use "
            "storage='shared', and DeviceFeed to bring batches to whatever device the learner has."
        )
    return CudaEngine(torch.device("cuda", torch.cuda.current_device()))
