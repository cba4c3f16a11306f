"""One writer per run directory."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from rlfeed.errors import RunDirectoryError, UnsupportedError

try:
    import fcntl
except ImportError as error:
    raise UnsupportedError("rlfeed.train: flock is missing here; expected Linux or macOS.") from error

_held: set[int] = set()  # descriptors of this process


class Lock:
    """Hold a lock file that names its holder; the operating system lets it go when the process ends, however it ends.

    Args:
        path: The lock file; it stays, and means nothing while nobody holds it.

    Raises:
        RunDirectoryError: If another process holds it; the message names it.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace")
            os.close(descriptor)
            raise RunDirectoryError(
                f"run directory {path.parent}: is in use by {_holder(holder)}; expected a run that nobody writes. "
                "Wait for it, stop it, or choose another --run-dir."
            ) from error
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(note).encode(), 0)
        self._descriptor = descriptor
        _held.add(descriptor)

    def release(self) -> None:
        """Let the lock go; again is harmless."""
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # also for a child that was forked this very moment
            os.close(self._descriptor)


def _holder(note: str) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        holder = json.loads(note)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    return "another process"


def _after_fork() -> None:
    # A forked worker shares the lock: one that outlives a killed learner would keep the run from being resumed.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_after_fork)
