"""Where bytes lie: a segment of memory that processes can share, reserved when it is created."""

import fcntl
import mmap
import multiprocessing.reduction as reduction
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlfeed.errors import CapacityError, ConfigError, UnsupportedError

Kind = Literal["private", "shared", "memmap", "cuda"]


class Memory:
    """Hold a segment that processes can share: anonymous, in a memory file, or in a file on disk.

    Args:
        kind: Which.
        nbytes: What is reserved now.
        spare_bytes: What lies behind, a hole until it is reserved too.
        path: The file, for ``memmap``.
        replace: Whether the file may exist already.

    Raises:
        CapacityError: If it cannot be reserved.
        ConfigError: If the file exists, or another buffer uses it.
    """

    def __init__(
        self, kind: Kind, nbytes: int, spare_bytes: int = 0, path: Path | None = None, *, replace: bool = False
    ) -> None:
        self.kind: Kind = kind
        self.nbytes, self.path = nbytes + spare_bytes, path
        self._fd = -1 if self.is_private else _open_file(kind, path, replace)
        if self._fd >= 0:
            os.truncate(self._fd, self.nbytes)
        self._reserve(0, nbytes)
        self._map()

    @property
    def is_private(self) -> bool:
        """Tell whether no other process has it: so with ``private``, and beside rows on a device."""
        return self.kind in ("private", "cuda")

    def _map(self) -> None:
        try:
            if self.is_private:
                self.mapping = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                self.mapping = mmap.mmap(self._fd, self.nbytes)
        except OSError as error:
            raise CapacityError(
                f"memory: {readable_bytes(self.nbytes)} could not be mapped ({error.strerror}); expected room in "
                "this process. Lower capacity, batch_size or lookahead, or raise its limit (ulimit -v)."
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):  # rows are read at random: fewer pages to look up, where the system has them
            with suppress(OSError):
                self.mapping.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self.mapping, np.uint8)
        self.address = self.bytes.ctypes.data

    def reserve(self, offset: int, nbytes: int, purpose: str) -> None:
        """Have the memory of a part that was a hole.

        Args:
            offset: Where the part begins.
            nbytes: Its length.
            purpose: What it is for, to the error.

        Raises:
            CapacityError: If there is not enough.
        """
        check_fits(self.kind, nbytes, self.path, f"{purpose} need")
        self._reserve(offset, nbytes)

    def _reserve(self, offset: int, nbytes: int) -> None:
        # Now: a page that cannot be had later would kill the process that touches it.
        if self._fd < 0 or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._fd, offset, nbytes)
        except OSError as error:
            raise CapacityError(
                f"ReplayBuffer: {readable_bytes(nbytes)} could not be reserved ({error.strerror}); expected room for "
                "all of it. Lower capacity, or use storage='memmap' with a path on a larger disk."
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of a block of code that uses this memory; a killed process leaves no lock behind."""
        if self.is_private:  # no other process has it
            yield
            return
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def __getstate__(self) -> dict[str, Any]:
        if self.is_private:
            raise UnsupportedError(
                f"ReplayBuffer: storage={self.kind!r} cannot be sent to another process; expected memory that "
                "processes share. Use storage='shared' or 'memmap'"
                + (", and DeviceFeed to bring batches to the device." if self.kind == "cuda" else ".")
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


def _open_file(kind: Kind, path: Path | None, replace: bool) -> int:
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
        fd = os.memfd_create("rlfeed", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    return fd


def check_fits(kind: Kind, nbytes: int, path: Path | None, what: str = "needs") -> None:
    """Refuse what will not fit, with the numbers.

    Args:
        kind: Of the memory.
        nbytes: Bytes wanted.
        path: The file, for ``memmap``.
        what: Subject and verb of the message.

    Raises:
        CapacityError: If it needs more than 90 % of what is free.
    """
    available = available_bytes(path)
    if nbytes > 0.9 * available:
        place = f"on the disk of {path}" if kind == "memmap" else "in memory"
        raise CapacityError(
            f"ReplayBuffer: {what} {readable_bytes(nbytes)}, but {readable_bytes(available)} are free {place}; "
            f"expected at most 90 % of that. Lower capacity to about {0.9 * available / nbytes:.2%} of what was asked"
            + ("." if kind == "memmap" else ", or use storage='memmap' with a path.")
        )


def available_bytes(path: Path | None = None) -> int:
    """Tell how much memory, or room on a disk, is free.

    Args:
        path: A file on the disk; None asks for memory.

    Returns:
        Bytes.
    """
    if path is not None:
        folder = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
        return shutil.disk_usage(folder).free + (path.stat().st_blocks * 512 if path.exists() else 0)
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


def readable_bytes(nbytes: float) -> str:
    """Say a number of bytes to people.

    Args:
        nbytes: The number.

    Returns:
        It in the fitting unit, a power of 1000.
    """
    size, unit = float(nbytes), "bytes"
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "bytes" else f"{int(size)} bytes"
