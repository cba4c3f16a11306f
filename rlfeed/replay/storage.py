"""Where rows lie: one segment of memory, its heads, its episode directory, its records and its large columns.

    segment = heads | directory | records [lane, row, stride] | one column [lane, row, bytes] per large field

The small fields of a row lie side by side in one record (one memory access a row); a field of `LARGE_BYTES` and up has
a column of its own. See docs/adr/0001-lanes-with-closing-rows.md.
"""

import fcntl
import mmap
import multiprocessing.reduction as reduction
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlfeed.errors import CapacityError, ConfigError, UnsupportedError
from rlfeed.nest import Nest, leaves
from rlfeed.nest import Path as LeafPath
from rlfeed.replay import kernels as k
from rlfeed.specs import ArraySpec

Kind = Literal["private", "shared", "memmap", "cuda"]
LARGE_BYTES = 1024
LEAST_ROWS = 4
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


class Memory:
    """Hold a segment that processes can share: anonymous, in a memory file, or in a file on disk.

    Args:
        kind: Which.
        nbytes: Its length.
        path: The file, for ``memmap``.
        replace: Whether the file may exist already.

    Raises:
        CapacityError: If it cannot be reserved.
        ConfigError: If the file exists, or another buffer uses it.
    """

    def __init__(self, kind: Kind, nbytes: int, path: Path | None = None, *, replace: bool = False) -> None:
        self.kind: Kind = kind
        self.nbytes, self.path = nbytes, path
        self._fd = -1 if kind == "private" else _open_file(kind, nbytes, path, replace)
        self._map()

    def _map(self) -> None:
        if self.kind == "private":
            self._mmap = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._mmap = mmap.mmap(self._fd, self.nbytes)
        self.bytes = np.frombuffer(self._mmap, np.uint8)
        self.address = self.bytes.ctypes.data

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of a block of code that uses this memory; a killed process leaves no lock behind."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def __getstate__(self) -> dict[str, Any]:
        if self.kind == "private":
            raise UnsupportedError(
                "ReplayBuffer: storage='private' cannot be sent to another process; expected memory that processes "
                "share. Use storage='shared' or 'memmap'."
            )
        state = {"kind": self.kind, "nbytes": self.nbytes, "path": self.path}
        return state | {"fd": None if self.kind == "memmap" else reduction.DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.kind, self.nbytes, self.path = state["kind"], state["nbytes"], state["path"]
        self._fd = os.open(self.path, os.O_RDWR) if state["fd"] is None else state["fd"].detach()
        self._map()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)


def _open_file(kind: Kind, nbytes: int, path: Path | None, replace: bool) -> int:
    if kind == "memmap" and path is not None:
        if path.exists() and not replace:
            raise ConfigError(f"ReplayBuffer: {path} exists; expected a new file. Remove it, or choose another path.")
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the last process that maps it is gone
        except OSError:
            os.close(fd)
            raise ConfigError(f"ReplayBuffer: {path} is in use by another buffer; expected one of its own.") from None
    elif hasattr(os, "memfd_create"):  # not limited by the size of /dev/shm, and leaves no name behind
        fd = os.memfd_create("rlfeed-replay", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        # Reserve now: a page that cannot be had later would kill the process that touches it.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, nbytes)
        else:
            os.truncate(fd, nbytes)
    except OSError as error:
        os.close(fd)
        raise CapacityError(
            f"ReplayBuffer: {_readable(nbytes)} could not be reserved ({error.strerror}); expected room for the whole "
            "buffer. Lower capacity, or use storage='memmap' with a path on a larger disk."
        ) from error
    return fd


def _check_fits(kind: Kind, nbytes: int, path: Path | None) -> None:
    available = _available_bytes(path)
    if nbytes > 0.9 * available:
        place = f"on the disk of {path}" if kind == "memmap" else "in memory"
        raise CapacityError(
            f"ReplayBuffer: needs {_readable(nbytes)}, but {_readable(available)} are free {place}; expected at "
            f"most 90 % of that. Lower capacity to about {0.9 * available / nbytes:.2%} of what was asked"
            + ("." if kind == "memmap" else ", or use storage='memmap' with a path.")
        )


def _available_bytes(path: Path | None) -> int:
    if path is not None:
        folder = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
        return shutil.disk_usage(folder).free + (path.stat().st_size if path.exists() else 0)
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        cache = int(stat.get("inactive_file", 0))  # the kernel gives it back when asked
        available = min(available, int(limit.read_text()) - int(used.read_text()) + cache)
    return available


def _readable(nbytes: float) -> str:
    size, unit = float(nbytes), "bytes"
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "bytes" else f"{int(size)} bytes"


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
        _check_fits(kind, self.nbytes, path)
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
        self.heads_offset = 0
        self.directory_offset = 4 * head_bytes
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
        for index, word in enumerate((k.COMMITTED, k.RESERVED, k.EPISODES, k.STEPS)):
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
        """View the heads: committed, reserved, episodes and steps of every lane.

        Returns:
            ``[4, lanes]`` int64 on the live memory: for saving and for people, not for synchronisation.
        """
        words = self.memory.bytes[self.heads_offset : self.directory_offset].view(np.int64)
        return words.reshape(4, self.head_bytes // 8)[:, : self.lanes]

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
