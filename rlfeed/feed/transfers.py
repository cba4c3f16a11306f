"""Batches on their way to a device: which copy waits for what, and how long memory is held for it.

The order, for every batch: its memory on the device is allocated on the consumer's stream; the side stream waits for
what the consumer had to do until then, for that memory may have been the consumer's, and copies; the consumer waits for
the copy before it uses the batch. Until the copy is over its source is held: the batch slots of a ring are used again
when nobody holds them, and torch does not know of copies out of them.
"""

import copy
import dataclasses
import os
from collections import deque
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from rlfeed.errors import FieldError
from rlfeed.feed.engines import Engine
from rlfeed.layout import Slot
from rlfeed.nest import describe
from rlfeed.types import Batch


class Transfers:
    """Copy batches to a device, in order.

    Args:
        engine: The device.
        depth: Batches under way beside the one that is handed over, >= 0.
        static: Whether every batch lies in one of the same ``depth + 1`` places.
    """

    def __init__(self, engine: Engine, depth: int, *, static: bool) -> None:
        self._engine, self._depth, self._process = engine, depth, os.getpid()
        self._places = _Places(depth + 1) if static else None
        self._ready: deque[tuple[Any, Any, Any]] = deque()  # on the device, what belongs to it, when it is there
        self._held: deque[tuple[Any, list[Tensor]]] = deque()  # when a copy is over, and where it reads
        self.copied_bytes, self.copies = 0, 0

    def __len__(self) -> int:
        """Count the batches to hand over.

        Returns:
            Copied, or being copied.
        """
        return len(self._ready)

    def make_room(self) -> None:
        """Let go of sources whose copies are over; wait for the oldest rather than hold more than ``depth + 1``."""
        with self._engine.active():
            self._let_go(self._depth + 1)

    def start(self, source: Any, beside: Any = None) -> None:
        """Begin to copy a batch.

        Args:
            source: In host memory; what lies on the device already stays there.
            beside: Handed over with it.
        """
        with self._engine.active():
            self._start(source, beside)

    def take(self) -> tuple[Any, Any]:
        """Hand over the oldest batch; what the consumer does with it waits until it is there.

        Returns:
            The batch on the device, and what was given beside it.
        """
        with self._engine.active():
            return self._take()

    def close(self) -> None:
        """Wait until every copy is over, and let everything go."""
        if self._process == os.getpid():  # a forked child has neither the device nor these copies
            with self._engine.active():
                self._let_go(0)
                self._ready.clear()

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a tensor of the device back, without waiting for anything.

        Args:
            tensor: On the device.

        Returns:
            What waits until it is there, and gives it.
        """
        engine = self._engine
        with engine.active():
            stream = engine.consumer()  # not the side stream: it would wait behind batches, and have to be held
            landed = engine.landing(tensor)
            engine.copy(stream, landed, tensor)
            event = engine.record(stream)

        def wait() -> Tensor:
            with engine.active():
                engine.finish(event)
            return landed

        return wait

    def _let_go(self, most: int) -> None:
        while self._held:
            event, _ = self._held[0]
            if not self._engine.is_over(event):
                if len(self._held) <= most:
                    return
                self._engine.finish(event)
            self._held.popleft()

    def _take(self) -> tuple[Any, Any]:
        batch, beside, event = self._ready.popleft()
        if event is not None:
            self._engine.wait(self._engine.consumer(), event)
        return batch, beside

    def _start(self, source: Any, beside: Any) -> None:
        engine, places = self._engine, self._places
        copies: list[tuple[Tensor, Tensor]] = []

        def place(tensor: Tensor) -> Tensor:
            here = engine.holds(tensor)
            if here and places is None:
                return tensor
            if tensor.layout != torch.strided or tensor.is_nested or (tensor.device.type != "cpu" and not here):
                return tensor.to(engine.device, non_blocking=True)  # on the consumer's stream
            read = tensor if here else engine.stage(tensor)
            target = engine.allocate(read) if places is None else places.give(len(copies), read, engine.allocate)
            copies.append((target, read))
            return target

        stays = False
        if isinstance(source, Batch):
            whole = source.block_and_layout()
            here = engine.holds(whole[0] if whole else source.reward)
            stays = here and places is None
            if not (whole or here):
                source = source.in_block(self._landing)  # a transform took it apart: one transfer all the same
        if places is not None:
            places.check(source)
        batch = source if stays else map_tensors(place, source, engine.device)
        event = self._copy(copies) if copies else None
        self._ready.append((batch, beside, event))
        if places is not None:
            places.turn += 1

    def _landing(self, nbytes: int) -> Tensor:
        return self._engine.landing(torch.empty(nbytes, dtype=torch.uint8, device="meta"))

    def _copy(self, copies: list[tuple[Tensor, Tensor]]) -> Any:
        engine = self._engine
        engine.wait(engine.side, engine.record(engine.consumer()))
        for target, read in copies:
            engine.copy(engine.side, target, read)
        event = engine.record(engine.side)
        self._held.append((event, [read for _, read in copies]))
        self.copies += len(copies)
        self.copied_bytes += sum(read.nbytes for _, read in copies)
        return event


class _Places:
    """Keep the same memory for every so-manieth batch, for graphs that were captured with its addresses."""

    def __init__(self, count: int) -> None:
        self._sets: list[list[Tensor]] = [[] for _ in range(count)]
        self._first: list[Slot] | None = None
        self.turn = 0

    def check(self, batch: Any) -> None:
        shapes = shapes_of(batch)
        self._first = self._first or shapes
        if shapes != self._first:
            raise FieldError(
                f"DeviceFeed: static_buffers is True, but {_difference(self._first, shapes)}; expected batches of one "
                "shape. Use Sequence(length, boundary='strict') or 'cross', or a pad_to_multiple_of that pads every "
                "batch to the same length."
            )

    def give(self, index: int, like: Tensor, allocate: Callable[[Tensor], Tensor]) -> Tensor:
        mine = self._sets[self.turn % len(self._sets)]
        if index == len(mine):
            mine.append(allocate(like))
        return mine[index]


def shapes_of(value: Any) -> list[Slot]:
    """Say what a batch is made of.

    Args:
        value: A `Batch`, or tensors in containers.

    Returns:
        Its tensors in order.
    """
    if isinstance(value, Batch) and (whole := value.block_and_layout()):
        return list(whole[1].slots)
    found: list[Slot] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(Slot(f"tensor {len(found)}", (), tensor.dtype, tuple(tensor.shape), 0))
        return tensor

    map_tensors(note, value, torch.device("cpu"))
    return found


def _difference(first: list[Slot], now: list[Slot]) -> str:
    for before, after in zip(first, now, strict=False):
        if before != after:
            name = describe(after.name, after.path)
            return f"{name} is {after.dtype} {after.shape} and was {before.dtype} {before.shape} before"
    return f"a batch has {len(now)} tensors and the first one {len(first)}"


def map_tensors(fn: Callable[[Tensor], Tensor], value: Any, device: torch.device) -> Any:
    """Apply a function to every tensor of a batch: once to one block; the ids of a `Batch` stay on the CPU.

    Args:
        fn: Called with one tensor.
        value: A `Batch`, a tensor, or dicts, lists, (named) tuples and dataclasses of them.
        device: For objects that move themselves (packed sequences, tensor dicts).

    Returns:
        The same with the results; what is no tensor stays as it is.
    """
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Batch):
        return value.through(fn)
    if hasattr(value, "to") and hasattr(value, "pin_memory"):
        return value.to(device)

    def inner(part: Any) -> Any:
        return map_tensors(fn, part, device)

    if isinstance(value, MutableMapping):
        clone = copy.copy(value)  # keeps its class, as torch's own pinning does
        clone.update({key: inner(part) for key, part in value.items()})
        return clone
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(inner, value))
    if isinstance(value, list | tuple):
        return type(value)(map(inner, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        )
    return value
