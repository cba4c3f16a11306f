"""Checkpoints: at every moment at least one that loads, also in the middle of saving the next.

``checkpoints/000000005000/`` holds MANIFEST.json, the states and subdirectories such as ``replay/``; the last two are
kept. ``checkpoints/LATEST`` names the last one that was reported as saved. Their order is the env step in their name,
never a clock; a run that was stopped between two updates saves the same step again, as ``000000005000.1``.
"""

import re
import secrets
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfeed.durable import (
    build_directory,
    clean_temporaries,
    load_state,
    make_directory,
    remove_directory,
    save_state,
    verify_directory,
    write_bytes,
)
from rlfeed.errors import CheckpointError

LATEST = "LATEST"
_NAME = re.compile(r"(\d{12,})(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Point to a checkpoint whose files were all verified.

    Args:
        path: Its directory; subdirectories that were written by a callable are under their names.
        env_steps: Where the run stood.
        info: What was saved beside the states, such as how environments come back.
    """

    path: Path
    env_steps: int
    info: dict[str, Any]

    def load(self, name: str) -> Any:
        """Read one state.

        Args:
            name: Its name in `Checkpoints.save`.

        Returns:
            The state.

        Raises:
            CheckpointError: If there is none of that name.
        """
        return load_state(self.path / f"{name}.state")


class Checkpoints:
    """Keep the last checkpoints of a run. Reading needs no lock; saving is for the one who holds the run directory.

    Args:
        directory: Where they are; created by the first save.
        keep: How many stay, at least 2: where the newest turns out to be damaged there is another.
    """

    def __init__(self, directory: Path | str, keep: int = 2) -> None:
        self.directory = Path(directory)
        self.keep = max(2, keep)

    def paths(self) -> list[Path]:
        """List the checkpoints, verified or not.

        Returns:
            Their directories, oldest first.
        """
        if not self.directory.is_dir():
            return []
        return sorted((p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: _place(p.name))

    def save(
        self,
        env_steps: int,
        states: Mapping[str, Any],
        directories: Mapping[str, Callable[[Path], object]] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Path:
        """Save a checkpoint; when this returns it lasts, and until then the one before does.

        Args:
            env_steps: Where the run stands, not before the last checkpoint.
            states: What `rlfeed.durable.save_state` takes, by name.
            directories: Called with the path of a subdirectory to create, by name: ``{"replay": buffer.save}``.
            info: Further facts, as JSON can say them; the name ``env_steps`` is taken.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: If there is a later one, a replay cannot be written, or it does not read back.
            OSError: If the disk refuses; the checkpoints before are untouched.
        """
        make_directory(self.directory)
        clean_temporaries(self.directory)
        target = self._next(env_steps)
        with build_directory(target, {"env_steps": env_steps, **(info or {})}) as building:
            for name, state in states.items():
                save_state(building / f"{name}.state", state)
            for name, write in (directories or {}).items():
                write(building / name)
        verify_directory(target, linked=False)  # nothing older goes, nothing is reported, before it reads back
        write_bytes(self.directory / LATEST, f"{target.name}\n".encode())
        for old in self.paths()[: -self.keep]:
            remove_directory(old)
        return target

    def latest(self, *, repair: bool = False) -> Checkpoint:
        """Find the newest checkpoint that verifies; warn of every newer one that does not.

        Args:
            repair: Rename damaged ones out of the way, so that the run can go on past them: for the one who holds the
                run directory.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: If none verifies; the message says what is wrong with each.
        """
        findings: list[str] = []
        for path in reversed(self.paths()):
            try:
                checkpoint = _open(path)
            except CheckpointError as error:
                findings.append(str(error))
                if repair:
                    path.rename(path.with_name(f"{path.name}.damaged-{secrets.token_hex(2)}"))
                continue
            if not findings and _place(reported := self._reported()) > _place(path.name):
                findings.append(f"{self.directory / reported}: was reported as saved and is gone.")
            if findings:
                warnings.warn(f"Going back to {path}: {' '.join(findings)}", RuntimeWarning, stacklevel=2)
            return checkpoint
        raise CheckpointError(
            f"{self.directory}: holds no checkpoint that loads; expected at least one. {' '.join(findings)}".rstrip()
        )

    def _next(self, env_steps: int) -> Path:
        last = _place(self.paths()[-1].name) if self.paths() else (-1, 0)
        if last[0] > env_steps:
            raise CheckpointError(
                f"{self.directory}: holds a checkpoint later than env step {env_steps}; expected to go on from the "
                "last. Load it first, or use another run directory."
            )
        again = f".{last[1] + 1}" if last[0] == env_steps else ""
        return self.directory / f"{env_steps:012d}{again}"

    def _reported(self) -> str:
        try:
            return (self.directory / LATEST).read_text().strip()
        except (OSError, ValueError):
            return ""  # a pointer that is missing or damaged costs nothing: the order is in the names


def _place(name: str) -> tuple[int, int]:
    """Order checkpoints: by env step, then by how often that step was saved."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _open(path: Path) -> Checkpoint:
    info = verify_directory(path)
    env_steps = info.pop("env_steps", None)
    if env_steps != _place(path.name)[0]:
        raise CheckpointError(f"{path}: is of env step {env_steps}; expected that of its name. It was renamed.")
    return Checkpoint(path, env_steps, info)
