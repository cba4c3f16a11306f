"""Rows on an accelerator: what is large of a step lies there, and batches are gathered there.

The segment in host memory keeps what says where a row lies and what a sample is: heads, flags, rewards. In the place of
every field that lies on the device it has the row's *place* there. So the readers of host memory gather a batch of
places, by the same kernels and rules as they gather a batch of rows, and one `index_select` a field turns places into
rows. Place 0 holds zeros: padding is a place like any other. See docs/adr/0010-rows-on-an-accelerator.md.
"""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfeed.errors import CapacityError, UnsupportedError
from rlfeed.layout import Layout, Slot
from rlfeed.memory import readable_bytes
from rlfeed.nest import Path
from rlfeed.replay import device_engine
from rlfeed.specs import ArraySpec
from rlfeed.types import Batch

_FIELDS = ("observation", "action", "extras", "carry")
SOURCES = {"next_observation": "observation", "prev_action": "action"}  # of batch fields with other names
PLACE = ArraySpec((), np.dtype(np.int32))
MOST_PLACES = (1 << 31) - 1
STAGES = 4  # writes that may be under way before the writer waits for the first of them
PIECE_BYTES = 1 << 24  # of what a checkpoint copies at once
_LAYOUTS = 4096  # lengths of whole episodes can take any value

Key = tuple[str, Path]
Line = tuple[Key, np.ndarray, np.ndarray]


def lies_there(name: str, path: Path) -> bool:
    """Tell whether a leaf lies on the device.

    Args:
        name: The `Step` field.
        path: The leaf's path in it.

    Returns:
        False for what the host itself reads: rewards, priorities, and the policy version, whose lag it counts.
    """
    return name in _FIELDS and (name, path) != ("extras", ("policy_version",))


@dataclass(frozen=True, slots=True)
class Leaf:
    """Describe one leaf of what is stored.

    Args:
        key: The `Step` field, and the leaf's path in it.
        spec: Shape and dtype.
        places: How many there are, over all lanes.
    """

    key: Key
    spec: ArraySpec
    places: int


@dataclass(frozen=True, slots=True)
class _Select:
    """Say what one `index_select` reads and writes: offsets are bytes in the block of the batch."""

    rows: Tensor
    places_at: int
    count: int
    out_at: int

    def run(self, block: Tensor) -> None:
        rows, words = self.rows, self.rows.shape[1]
        places = block[self.places_at : self.places_at + self.count * PLACE.nbytes].view(torch.int32)
        out = block[self.out_at : self.out_at + self.count * words * rows.dtype.itemsize].view(rows.dtype)
        torch.index_select(rows, 0, places, out=out.view(self.count, words))


class _Stage:
    """Hold a step's new rows on their way to the device."""

    def __init__(self) -> None:
        self.here = self.there = torch.empty(0, dtype=torch.uint8)
        self.event: Any = None


class DeviceRows:
    """Hold the rows of some fields on a device; write them, gather them, and keep both in order.

    Threads of one process may write and read at the same time, on streams of their own: a write waits on the device for
    the gathers before it and a gather for the writes before it, by events; `lock` has the host see both in one order.

    Args:
        leaves: What is stored.

    Raises:
        DeviceError: If there is no device.
        CapacityError: If it does not fit.
    """

    def __init__(self, leaves: list[Leaf]) -> None:
        self.engine = device_engine.choose_engine()
        self.lock = threading.RLock()
        self.nbytes = sum((leaf.places + 1) * leaf.spec.nbytes for leaf in leaves)
        self._check_fits()
        self._leaves = {leaf.key: leaf for leaf in leaves}
        self._rows = {leaf.key: self._allocate(leaf) for leaf in leaves}
        self._stages = [_Stage() for _ in range(STAGES)]
        self._written = self.engine.record(self.engine.reader())
        self.engine.wait(self.engine.writer, self._written)
        self._read: dict[Any, Any] = {}  # the last gather of every stream since the last write
        self._layouts: dict[Layout, tuple[Layout, list[_Select]]] = {}
        self._process = os.getpid()

    def _check_fits(self) -> None:
        free = self.engine.free_bytes()
        if self.nbytes > 0.9 * free:
            raise CapacityError(
                f"ReplayBuffer: needs {readable_bytes(self.nbytes)} on {self.engine.device}, but "
                f"{readable_bytes(free)} are free there; expected at most 90 % of that. Lower capacity to about "
                f"{0.9 * free / self.nbytes:.2%} of what was asked, or use storage='shared' with DeviceFeed."
            )

    def _allocate(self, leaf: Leaf) -> Tensor:
        size = next(size for size in (8, 4, 2, 1) if leaf.spec.nbytes % size == 0)
        word = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[size]  # whatever the dtype is, it moves
        return torch.zeros((leaf.places + 1, leaf.spec.nbytes // size), dtype=word, device=self.engine.device)

    def check_process(self) -> None:
        """Refuse to work in a forked child.

        Raises:
            UnsupportedError: If this is another process than the one that has the device's memory.
        """
        if os.getpid() != self._process:
            raise UnsupportedError(
                "ReplayBuffer: storage='cuda' was carried into another process; expected the one that made it, which "
                "has the device's memory. Use num_workers=0, or storage='shared' with DeviceFeed."
            )

    def write(self, lines: list[Line]) -> None:
        """Copy rows to their places, in one transfer; the caller holds `lock`.

        Args:
            lines: Leaves with the places of rows, ``[n]``, each once a leaf, and the rows, ``[n, ...]``.
        """
        stage = self._next_stage(
            sum(_room(8 * len(at)) + _room(self._leaves[key].spec.nbytes * len(at)) for key, at, _ in lines)
        )
        memory, end = stage.here.numpy(), 0
        copies: list[tuple[Tensor, Tensor, Tensor]] = []

        def put(array: np.ndarray, dtype: np.dtype) -> Tensor:
            nonlocal end
            nbytes = array.size * dtype.itemsize
            memory[end : end + nbytes].view(dtype).reshape(array.shape)[...] = array
            start, end = end, end + _room(nbytes)
            return stage.there[start : start + nbytes]

        for key, places, rows in lines:
            target = self._rows[key]
            where = put(places, np.dtype(np.int64)).view(torch.int64)
            copies.append((target, where, put(rows, self._leaves[key].spec.dtype).view(target.dtype)))

        def work() -> None:
            stage.there[:end].copy_(stage.here[:end], non_blocking=True)
            for target, where, rows in copies:
                target.index_copy_(0, where, rows.view(len(where), target.shape[1]))

        stage.event = self._launch(work)

    def _launch(self, work: Callable[[], Any]) -> Any:
        """Have the writer's stream do something behind all gathers: rows that they read are overwritten."""
        engine, writer = self.engine, self.engine.writer
        for event in self._read.values():
            engine.wait(writer, event)
        self._read.clear()
        engine.launch(writer, work)
        self._written = engine.record(writer)
        return self._written

    def _next_stage(self, nbytes: int) -> _Stage:
        """Give the stage of the oldest write, once that is over."""
        self._stages.append(stage := self._stages.pop(0))
        if stage.event is not None:
            self.engine.finish(stage.event)
        if len(stage.here) < nbytes:
            stage.here = self.engine.stage(nbytes)
            stage.there = torch.empty(nbytes, dtype=torch.uint8, device=self.engine.device)
            # Its memory may have been somebody's on the caller's stream.
            self.engine.wait(self.engine.writer, self.engine.record(self.engine.reader()))
        return stage

    def fetch(self, places: Batch) -> Batch:
        """Turn a batch of places into a batch of rows on the device; the caller holds `lock`.

        Args:
            places: From a reader: one block in memory from `Engine.stage`.

        Returns:
            The batch, one block on the device; its ids stay here. It may be used on the caller's stream at once.
        """
        return places.recarve(self._gather)

    def _gather(self, places: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        target, selects = self._layout(layout)
        block = torch.empty(target.nbytes, dtype=torch.uint8, device=self.engine.device)

        def work() -> None:
            block[: len(places)].copy_(places, non_blocking=True)
            for select in selects:
                select.run(block)

        stream = self.engine.reader()
        self.engine.wait(stream, self._written)
        self.engine.launch(stream, work)
        self._read[stream] = self.engine.record(stream)
        return block, target

    def _layout(self, layout: Layout) -> tuple[Layout, list[_Select]]:
        found = self._layouts.get(layout)
        if found is None:
            if len(self._layouts) > _LAYOUTS:
                self._layouts.clear()
            found = self._layouts[layout] = self._lay_out(layout)
        return found

    def _lay_out(self, layout: Layout) -> tuple[Layout, list[_Select]]:
        """Say how a batch lies on the device: the block of places and computed fields as it is, then the rows."""
        slots: list[Slot] = []
        selects: list[_Select] = []
        shared: dict[Key, tuple[int, int]] = {}  # of stacks: where places and rows lie that two fields share
        end = layout.nbytes
        for slot in layout.slots:
            leaf = self._leaves.get((SOURCES.get(slot.name, slot.name), slot.path))
            if leaf is None:
                slots.append(slot)
                continue
            spec, rows = leaf.spec, self._rows[leaf.key]
            start, strides = end, None
            if slot.strides is not None:
                apart = spec.nbytes // spec.dtype.itemsize
                strides = (*(n * apart for n in slot.strides), *_strides(spec.shape))
            if slot.strides is not None and leaf.key in shared:
                places_at, rows_at = shared[leaf.key]
                start = rows_at + (slot.offset - places_at) // PLACE.nbytes * spec.nbytes
            else:
                count = int(np.prod(slot.shape)) if slot.strides is None else slot.shape[0] * slot.strides[0]
                selects.append(_Select(rows, slot.offset, count, start))
                shared[leaf.key] = slot.offset, start
                end += _room(count * spec.nbytes)
            dtype = torch.from_numpy(np.empty(0, spec.dtype)).dtype
            slots.append(Slot(slot.name, slot.path, dtype, (*slot.shape, *spec.shape), start, strides))
        return Layout(tuple(slots), end), selects

    def pieces(self, key: Key, begin: int, end: int, *, fill: bool = False) -> Iterator[np.ndarray]:
        """Copy rows through host memory, for a checkpoint.

        Args:
            key: Which leaf.
            begin: The first place, from 0.
            end: Behind the last.
            fill: Whether what the caller puts into a piece goes to the device, instead of the other way round.

        Yields:
            uint8 arrays, each valid until the next is asked for.
        """
        rows = self._rows[key][1:]
        step = max(1, PIECE_BYTES // max(1, self._leaves[key].spec.nbytes))
        for at in range(begin, end, step):
            some = rows[at : min(end, at + step)]
            piece = torch.empty(some.shape, dtype=some.dtype)
            if not fill:
                self._copy(piece, some)
            yield piece.numpy().reshape(-1).view(np.uint8)
            if fill:
                self._copy(some, piece)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        """Copy between host and device, and wait for it."""
        with self.lock:
            self.check_process()
            self.engine.finish(self._launch(lambda: target.copy_(source)))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


def _room(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
