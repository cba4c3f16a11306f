"""The run directory: what a run was, who writes it, and how it ended.

Layout of ``runs/CartPole-v1/dqn/20260131-120000-s0-1f3c/``:

- ``config.json``: the resolved settings; ``command.txt``: what was typed; ``env.json``: versions, machine, git state
- ``run.lock``: who writes it now; ``checkpoints/``: see `rlfeed.train.checkpoint`; event files of TensorBoard
- ``DONE``, ``STOPPED`` or ``FAILED`` once the run has ended, and none of them where it was killed
"""

import os
import platform
import re
import secrets
import shlex
import socket
import subprocess
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch

from rlfeed.durable import clean_temporaries, make_directory, read_json, write_bytes, write_json
from rlfeed.errors import CheckpointError, RunDirectoryError, UnsupportedError
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.lock import Lock
from rlfeed.types import Policy

Marker = Literal["DONE", "STOPPED", "FAILED"]
MARKERS: tuple[Marker, ...] = ("DONE", "STOPPED", "FAILED")
CONFIG, COMMAND, ENVIRONMENT, LOCK = "config.json", "command.txt", "env.json", "run.lock"
_PACKAGES = ("rlfeed", "torch", "numpy", "gymnasium", "numba", "tensorboard")


def default_path(env_id: str, preset: str, seed: int) -> Path:
    """Name a new run directory, differently every time.

    Args:
        env_id: The environment as it was typed: an id, ``file.py:Class`` or ``package.module:Class``.
        preset: The agent's preset.
        seed: The run's seed.

    Returns:
        ``runs/{env}/{preset}/{YYYYMMDD-HHMMSS}-s{seed}-{4 hex}``.
    """
    last = Path(env_id).name if ".py:" in env_id else env_id
    env = re.sub(r"[^\w.-]+", "-", last).strip("-.") or "env"
    return Path("runs") / env / preset / f"{time.strftime('%Y%m%d-%H%M%S')}-s{seed}-{secrets.token_hex(2)}"


class RunDirectory:
    """Hold a run directory for writing: one process at a time.

    As a context manager it says how the run ended: ``DONE`` where the block ends, ``STOPPED`` where it was interrupted,
    ``FAILED`` with the traceback where it raised, unless `mark` said it before.

    Args:
        path: The directory, from `create` or `resume`.
        config: The resolved settings.
        lock: The held lock.
    """

    def __init__(self, path: Path, config: dict[str, Any], lock: Lock) -> None:
        self.path = path
        self.config = config
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._lock = lock

    @classmethod
    def create(cls, path: Path | str, config: Mapping[str, Any], command: Sequence[str] = ()) -> Self:
        """Begin a new run.

        Args:
            path: A directory that is not there yet, or is empty.
            config: The resolved settings, as JSON can say them.
            command: What was typed, such as ``sys.argv``.

        Returns:
            The run, locked.

        Raises:
            RunDirectoryError: If the directory holds anything, or another process holds it.
        """
        directory = Path(path)
        _refuse_taken(directory)
        try:
            make_directory(directory)
        except OSError as error:
            raise RunDirectoryError(
                f"run directory {directory}: cannot be made ({error.strerror}); expected a place to write to. Choose "
                "another --run-dir."
            ) from error
        lock = Lock(directory / LOCK)
        try:
            _refuse_taken(directory)  # another process may have come between the first look and the lock
            write_bytes(directory / COMMAND, (shlex.join(command) + "\n").encode())
            write_json(directory / ENVIRONMENT, describe_machine())
            write_json(directory / CONFIG, dict(config))
        except BaseException:
            lock.release()
            raise
        return cls(directory, read_config(directory), lock)

    @classmethod
    def resume(cls, path: Path | str, config: Mapping[str, Any] | None = None) -> Self:
        """Go on with a run that ended, was stopped or was killed.

        Args:
            path: Its directory.
            config: The settings it goes on with, where they have changed; they are the run's from now on.

        Returns:
            The run, locked; entered as a context manager it is no longer marked as ended.

        Raises:
            RunDirectoryError: If it holds no run, no checkpoint to go on from, or another process holds it.
        """
        directory = Path(path)
        before = read_config(directory)
        lock = Lock(directory / LOCK)
        try:
            clean_temporaries(directory)
            if not Checkpoints(directory / "checkpoints").paths():
                raise RunDirectoryError(
                    f"run directory {directory}: has no checkpoint; expected at least one to go on from. It stopped "
                    "before the first: start it again with another --run-dir."
                )
            if config is not None and dict(config) != before:
                write_json(directory / CONFIG, dict(config))
        except BaseException:
            lock.release()
            raise
        return cls(directory, before if config is None else dict(config), lock)

    def mark(self, marker: Marker, text: str = "") -> None:
        """Say how the run ended.

        Args:
            marker: ``DONE``, ``STOPPED`` or ``FAILED``; replaces what was said before.
            text: Why: a signal's name, a traceback.
        """
        self._unmark()
        write_bytes(self.path / marker, (text.rstrip() + "\n").encode())

    def close(self) -> None:
        """Let the directory go."""
        self._lock.release()

    def _unmark(self) -> None:
        for marker in MARKERS:
            (self.path / marker).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Begin: how the run ended before no longer holds.

        Returns:
            The run itself.
        """
        self._unmark()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Mark how the run ended, and let the directory go."""
        try:
            if kind is not None and issubclass(kind, Exception):
                self.mark("FAILED", "".join(traceback.format_exception(kind, error, trace)))
            elif read_marker(self.path) is None:
                self.mark("DONE" if kind is None else "STOPPED", "" if kind is None else f"{kind.__name__}: {error}")
        finally:
            self.close()


def read_config(path: Path | str) -> dict[str, Any]:
    """Read the settings of a run.

    Args:
        path: The run directory.

    Returns:
        The resolved settings.

    Raises:
        RunDirectoryError: If it holds no run.
        CheckpointError: If the settings cannot be read.
    """
    directory = Path(path)
    if not (directory / CONFIG).is_file():
        found = "is not a directory" if not directory.is_dir() else f"has no {CONFIG}"
        raise RunDirectoryError(f"run directory {directory}: {found}; expected one that scripts/train.py made.")
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / CONFIG}: is a {type(config).__name__}; expected an object of settings.")
    return config


def read_marker(path: Path | str) -> Marker | None:
    """Tell how a run ended.

    Args:
        path: The run directory.

    Returns:
        ``DONE``, ``STOPPED``, ``FAILED``, or None while it runs or where it was killed.
    """
    return next((marker for marker in MARKERS if (Path(path) / marker).exists()), None)


def describe_machine() -> dict[str, Any]:
    """Describe what a run runs on.

    Returns:
        Versions, processors, CUDA devices and the state of the checkout, as JSON can say them.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu_count": os.cpu_count(),
        "cuda_devices": torch.cuda.device_count(),  # their names would initialise CUDA before workers are forked
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain"),
    }


def _refuse_taken(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise RunDirectoryError(f"run directory {directory}: is a file; expected none. Choose another --run-dir.")
    entries = sorted(entry.name for entry in directory.iterdir() if entry.name != LOCK)
    if CONFIG in entries:
        ended = read_marker(directory) or "not marked as ended"
        count = len(Checkpoints(directory / "checkpoints").paths())
        raise RunDirectoryError(
            f"run directory {directory}: holds a run ({ended}, {count} checkpoints); expected a new directory. "
            f"Go on with it by --resume {directory}, or choose another --run-dir."
        )
    if entries:
        raise RunDirectoryError(
            f"run directory {directory}: holds {', '.join(entries[:3])}{', ...' if entries[3:] else ''}; expected a "
            "new or empty directory. Choose another --run-dir."
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def load_policy(run_dir: Path | str) -> Policy:
    """Give back the policy of a run.

    Args:
        run_dir: The run directory.

    Returns:
        The policy of its last checkpoint.

    Raises:
        UnsupportedError: In this version.
    """
    raise UnsupportedError(
        f"load_policy({str(run_dir)!r}): is not served by this version. Evaluate the run with scripts/evaluate.py."
    )
