"""Where the fields of a batch lie in its one block of memory."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfeed.nest import Nest, Path, build


@dataclass(frozen=True, slots=True)
class Slot:
    """Describe where one field of a batch lies in its block.

    Args:
        name: The `Batch` field.
        path: The leaf's path inside the field; ``()`` where the field is one tensor.
        dtype: Its torch dtype.
        shape: Its shape, batch axes included.
        offset: Bytes from the start of the block, a multiple of 64 where the field is dense.
        strides: Elements from one entry to the next, by axis; None where the field is dense: stacks share frames.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None


class Layout:
    """Say how the fields of a batch are carved from one contiguous block.

    Args:
        slots: The fields in order.
        nbytes: The block's length in bytes, a multiple of 64.
    """

    __slots__ = ("_plan", "nbytes", "single", "slots")

    def __init__(self, slots: tuple[Slot, ...], nbytes: int) -> None:
        self.slots, self.nbytes = slots, nbytes
        self._plan: dict[str, tuple[list[Path], list[tuple[Any, ...]]]] = {}
        for s in slots:
            paths, lines = self._plan.setdefault(s.name, ([], []))
            paths.append(s.path)
            as_numpy, start = _as_numpy(s.dtype), s.offset // s.dtype.itemsize
            apart = None if s.strides is None else tuple(n * s.dtype.itemsize for n in s.strides)
            lines.append((s.shape, s.offset, as_numpy, s.dtype, s.strides or _strides(s.shape), start, apart))
        # What np.ndarray asks for, of the fields that are one tensor: `_Look` has no time for more.
        alone = {name: lines[0] for name, (paths, lines) in self._plan.items() if paths == [()]}
        self.single = {n: (x[0], x[2], x[1], x[6]) for n, x in alone.items() if _is_of(x[2], x[3])}

    @classmethod
    def of(cls, leaves: Iterable[tuple[str, Path, torch.dtype, tuple[int, ...]]]) -> "Layout":
        """Lay leaves out one behind the other, dense, each 64-byte aligned.

        Args:
            leaves: Field, path in it, dtype and shape of each.

        Returns:
            The layout.
        """
        slots, end = [], 0
        for name, path, dtype, shape in leaves:
            slots.append(Slot(name, path, dtype, shape, end))
            end = -(-(end + math.prod(shape) * dtype.itemsize) // 64) * 64
        return cls(tuple(slots), end)

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout, (self.slots, self.nbytes)

    def __contains__(self, name: object) -> bool:
        return name in self._plan

    def read(self, name: str, block: Tensor, typed: dict[torch.dtype, Tensor]) -> Nest:
        """Carve one field out of a block, wherever it lies.

        Args:
            name: A field that has slots here.
            block: uint8, at least ``nbytes`` long.
            typed: The block as other dtypes, kept from field to field.

        Returns:
            A nest of tensors that share the block's storage.
        """
        paths, lines = self._plan[name]
        views = []
        for shape, _, _, dtype, strides, start, _ in lines:
            if dtype not in typed:
                typed[dtype] = block.view(dtype)
            views.append(typed[dtype].as_strided(shape, strides, start))  # narrow, view and view would be three calls
        return build(zip(paths, views, strict=True)) if paths[0] else views[0]

    def read_plain(self, name: str, memory: np.ndarray) -> Nest:
        """Carve one field out of ordinary memory: half the price, but its tensors do not know the block's storage.

        Args:
            name: A field that has slots here.
            memory: uint8, at least ``nbytes`` long.

        Returns:
            A nest of tensors that share the memory.
        """
        paths, lines = self._plan[name]
        views = [torch.from_numpy(np.ndarray(line[0], line[2], memory, line[1], line[6])) for line in lines]
        views = [v if v.dtype == line[3] else v.view(line[3]) for v, line in zip(views, lines, strict=True)]
        return build(zip(paths, views, strict=True)) if paths[0] else views[0]


def _as_numpy(dtype: torch.dtype) -> np.dtype:
    """Give NumPy's dtype, or one as wide where it has none (bfloat16)."""
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        return np.dtype(f"i{dtype.itemsize}")


def _is_of(as_numpy: np.dtype, dtype: torch.dtype) -> bool:
    return torch.from_numpy(np.empty(0, as_numpy)).dtype == dtype


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
