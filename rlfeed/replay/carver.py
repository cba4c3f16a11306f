"""Where the fields of a batch lie in its block, and what a gather has to know of that."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from rlfeed.layout import Layout, Slot
from rlfeed.replay import kernels as k
from rlfeed.replay.storage import Storage


@dataclass(frozen=True, slots=True)
class Carved:
    """Say where everything of a batch of one size lies in its block.

    Args:
        layout: The fields.
        table: Field table of what is gathered row by row.
        stacks: Field table of the frame stacks of transitions.
        computed: Offsets of the computed fields, in their order.
    """

    layout: Layout
    table: np.ndarray
    stacks: np.ndarray
    computed: np.ndarray


class Carver:
    """Lay the fields of a batch out in a block: dense, each 64-byte aligned.

    Args:
        storage: Whose columns.
        groups: For each batch field: its name, the step field it comes from, its role in the gather and its axes
            (letters of ``B T S``, S = T + 1).
        computed: For each computed field: its name, dtype and axes.
        n_step: Steps from an observation to the next one; None for windows. After one step their stacks of frames
            overlap, and are stored once: all frames of the one, and the last one of the other.
    """

    def __init__(
        self,
        storage: Storage,
        groups: list[tuple[str, str, int, str]],
        computed: list[tuple[str, torch.dtype, str]],
        n_step: int | None = None,
    ) -> None:
        self._copied = [
            (name, column, axes, storage.table([(column, role)])[0])
            for name, source, role, axes in groups
            for column in storage.columns_of(source)
        ]
        self._computed, self._n_step = computed, n_step
        self._cache: dict[tuple[int, int], Carved] = {}

    def carve(self, rows: int, steps: int = 0) -> Carved:
        """Give the layout for a size of batch.

        Args:
            rows: B.
            steps: T.

        Returns:
            Where everything lies.
        """
        found = self._cache.get((rows, steps))
        if found is None:
            if len(self._cache) > 4096:  # lengths of whole episodes can take any value
                self._cache.clear()
            found = self._cache[rows, steps] = self._carve(rows, steps)
        return found

    def _carve(self, rows: int, steps: int) -> Carved:
        size, end = {"B": rows, "T": steps, "S": steps + 1}, 0
        slots: list[Slot] = []
        gathered: list[np.ndarray] = []
        stacked: list[np.ndarray] = []

        def place(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
            nonlocal end
            start, end = end, -(-(end + math.prod(shape) * dtype.itemsize) // 64) * 64
            return start

        for name, column, axes, template in self._copied:
            dtype, frames, line = _torch_dtype(column.held.dtype), int(template[k.FRAMES]), template.copy()
            batch, frame = tuple(size[a] for a in axes), column.held.shape
            shape = stored = (*batch, frames, *frame) if frames > 1 else (*batch, *frame)
            if frames > 1 and self._n_step == 1:
                if name == "next_observation":
                    before = next(slot for slot in slots if (slot.name, slot.path) == ("observation", column.path))
                    slots.append(replace(before, name=name, offset=before.offset + column.held.nbytes))
                    continue
                stored, line[k.FRAMES], line[k.ROLE] = (*batch, frames + 1, *frame), frames + 1, k.ROLE_SUCCESSOR
            line[k.OTHER] = place(dtype, stored)
            strides = torch.empty(stored, device="meta").stride() if stored != shape else None
            slots.append(Slot(name, column.path, dtype, shape, int(line[k.OTHER]), strides))
            (stacked if frames > 1 and self._n_step else gathered).append(line)
        offsets = []
        for name, dtype, axes in self._computed:
            shape = tuple(size[a] for a in axes)
            offsets.append(place(dtype, shape))
            slots.append(Slot(name, (), dtype, shape, offsets[-1]))
        return Carved(Layout(tuple(slots), end), _table(gathered), _table(stacked), np.array(offsets, np.int64))


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _table(lines: list[np.ndarray]) -> np.ndarray:
    return np.array(lines, np.int64).reshape(-1, k.FIELD_SIZE)
