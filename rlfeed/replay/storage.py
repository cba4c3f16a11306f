"""Where rows lie: one segment of memory, its heads, its episode directory, its records and its large columns.

    segment = words | heads | directory | records [lane, row, stride] | one column [lane, row, bytes] per large field

The small fields of a row lie side by side in one record (one memory access a row); a field of `LARGE_BYTES` and up has
a column of its own. See docs/adr/0001-lanes-with-closing-rows.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlfeed.errors import ConfigError
from rlfeed.nest import Nest, leaves
from rlfeed.nest import Path as LeafPath
from rlfeed.replay import kernels as k
from rlfeed.replay.memory import Kind, Memory, check_fits
from rlfeed.specs import ArraySpec

LARGE_BYTES = 1024
LEAST_ROWS = 4
WORDS = 256  # shared counters and settings of the whole buffer; who owns which: `Storage.words`
HEADS = 5  # lines of one word per lane: committed, reserved, episodes, steps, owner
MOST_LANES, MOST_ROWS = 1 << 19, 1 << 32  # an id has 19 bits for the lane, a directory entry 32 for the row
REWARD = ArraySpec((), np.dtype(np.float32))


@dataclass(frozen=True, slots=True)
class Column:
    """Say where the rows of one leaf lie in the segment.

    Args:
        name: The `Step` field.
        path: The leaf's path in it.
        spec: Shape and dtype.
        offset: Bytes from the start of the segment to the first row.
        pitch: Bytes from one row to the next.
    """

    name: str
    path: LeafPath
    spec: ArraySpec
    offset: int
    pitch: int


class Storage:
    """Lay out lanes of rows in a segment and give kernels their plan.

    Args:
        fields: Nests of `ArraySpec` by `Step` field; the reward is added.
        lanes: Lanes.
        rows: Rows per lane, closing rows included.
        kind: Private, shared or memory-mapped.
        path: The file, for ``memmap``.
        replace: Whether the file may exist already.

    Raises:
        ConfigError: If a lane is too short to hold anything, or the file exists.
        CapacityError: If it does not fit.
    """

    def __init__(
        self,
        fields: dict[str, Nest],
        lanes: int,
        rows: int,
        kind: Kind,
        path: Path | None,
        *,
        replace: bool = False,
    ) -> None:
        if rows < LEAST_ROWS:
            raise ConfigError(
                f"ReplayBuffer: capacity gives {rows} rows to each of {lanes} lanes; expected at least {LEAST_ROWS} "
                "(an episode of n steps takes n + 1 rows). Raise capacity, or lower num_envs."
            )
        self.lanes, self.rows, self.entries = lanes, rows, rows // 2 + 2
        self.fields = {**fields, "reward": REWARD}
        self._place()
        check_fits(kind, self.nbytes, path)
        if lanes >= MOST_LANES or rows >= MOST_ROWS:
            raise ConfigError(
                f"ReplayBuffer: capacity gives {lanes} lanes of {rows} rows; expected fewer than {MOST_LANES} lanes of "
                f"fewer than {MOST_ROWS} rows. Lower num_envs or capacity."
            )
        self.memory = Memory(kind, self.nbytes, path, replace=replace)
        self._bind()

    def _place(self) -> None:
        small, large = [], []
        for name, nest in self.fields.items():
            for path, spec in leaves(nest):
                (large if spec.nbytes >= LARGE_BYTES else small).append((name, path, spec))
        small.sort(key=lambda field: -field[2].dtype.itemsize)  # largest alignment first: no holes
        head_bytes = _aligned(self.lanes * 8, 128)
        self.heads_offset = WORDS * 8
        self.directory_offset = self.heads_offset + HEADS * head_bytes
        self.records_offset = _aligned(self.directory_offset + self.lanes * self.entries * 4, 4096)
        offset, inside = self.records_offset, k.HEAD_BYTES
        placed = []
        for name, path, spec in small:
            inside = _aligned(inside, spec.dtype.itemsize)
            placed.append((name, path, spec, inside))
            inside += spec.nbytes
        self.stride = _aligned(inside, 8)
        columns = [Column(name, path, spec, offset + at, self.stride) for name, path, spec, at in placed]
        offset += self.lanes * self.rows * self.stride
        for name, path, spec in large:
            offset = _aligned(offset, 4096)
            columns.append(Column(name, path, spec, offset, spec.nbytes))
            offset += self.lanes * self.rows * spec.nbytes
        self.columns = tuple(columns)
        self.head_bytes = head_bytes
        self.nbytes = _aligned(offset, 4096)

    def _bind(self) -> None:
        base = self.memory.address
        plan = np.zeros(k.PLAN_SIZE, np.int64)
        for index, word in enumerate((k.COMMITTED, k.RESERVED, k.EPISODES, k.STEPS, k.OWNERS)):
            plan[word] = base + self.heads_offset + index * self.head_bytes
        plan[k.DIRECTORY], plan[k.RECORDS] = base + self.directory_offset, base + self.records_offset
        plan[k.LANES], plan[k.ROWS], plan[k.ENTRIES] = self.lanes, self.rows, self.entries
        plan[k.STRIDE] = self.stride
        plan[k.REWARD] = self.column("reward").offset - self.records_offset
        self.plan = plan

    def __getstate__(self) -> dict[str, Any]:
        return {"lanes": self.lanes, "rows": self.rows, "fields": self.fields, "memory": self.memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.entries = self.rows // 2 + 2
        self._place()
        self._bind()

    def column(self, name: str, path: LeafPath = ()) -> Column:
        """Find a column.

        Args:
            name: The `Step` field.
            path: The leaf's path in it.

        Returns:
            The column.
        """
        return next(c for c in self.columns if c.name == name and c.path == path)

    def columns_of(self, name: str) -> list[Column]:
        """Find the columns of a field.

        Args:
            name: The `Step` field.

        Returns:
            One column per leaf, in the nest's order.
        """
        found = {c.path: c for c in self.columns if c.name == name}
        return [found[path] for path, _ in leaves(self.fields[name])] if name in self.fields else []

    def table(self, columns: list[tuple[Column, int]]) -> np.ndarray:
        """Describe columns to a kernel.

        Args:
            columns: Pairs of a column and its role.

        Returns:
            ``[F, FIELD_SIZE]`` int64; OTHER is left 0.
        """
        table = np.zeros((len(columns), k.FIELD_SIZE), np.int64)
        for line, (column, role) in zip(table, columns, strict=True):
            line[k.BASE] = self.memory.address + column.offset
            line[k.PITCH], line[k.NBYTES], line[k.ROLE] = column.pitch, column.spec.nbytes, role
        return table

    def heads(self) -> np.ndarray:
        """View the heads: committed, reserved, episodes, steps and owner of every lane.

        Returns:
            ``[HEADS, lanes]`` int64 on the live memory: for saving and for people, not for synchronisation.
        """
        words = self.memory.bytes[self.heads_offset : self.directory_offset].view(np.int64)
        return words.reshape(HEADS, self.head_bytes // 8)[:, : self.lanes]

    def words(self, begin: int, end: int) -> np.ndarray:
        """View shared words of the whole buffer.

        Words 0 .. 127 count draws, one word per process that draws; 128 .. 159 are the limiter's; 160 .. 191 the
        sampler's.

        Args:
            begin: The first.
            end: Behind the last, <= WORDS.

        Returns:
            ``[end - begin]`` int64 on the live memory.
        """
        return self.memory.bytes[begin * 8 : end * 8].view(np.int64)

    def parts(self, lane: int, rows: int) -> dict[str, np.ndarray]:
        """View what a lane holds, piece by piece: its directory, its records, its large columns.

        Args:
            lane: Which.
            rows: How many physical rows, from the first.

        Returns:
            uint8 (directory: uint32) arrays on the live memory, by name.
        """
        data, total = self.memory.bytes, self.lanes * self.rows
        directory = data[self.directory_offset :][: self.lanes * self.entries * 4].view(np.uint32)
        records = data[self.records_offset :][: total * self.stride].reshape(self.lanes, -1)
        out = {
            "directory": directory.reshape(self.lanes, self.entries)[lane],
            "records": records[lane, : rows * self.stride],
        }
        for index, column in enumerate(self.columns):
            if column.offset >= self.records_offset + total * self.stride:
                whole = data[column.offset :][: total * column.pitch].reshape(self.lanes, -1)
                out[f"column{index}"] = whole[lane, : rows * column.pitch]
        return out


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
