"""Checkpoints: at every moment at least one that loads, also in the middle of saving the next.

``checkpoints/000000005000/`` holds MANIFEST.json, the states and subdirectories such as ``replay/``; the last two are
kept. ``checkpoints/LATEST`` names the last one that was reported as saved. Their order is the env step in their name,
never a clock.
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
_NAME = re.compile(r"\d{12,}")


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
        return sorted((p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name))

    def save(
        self,
        env_steps: int,
        states: Mapping[str, Any],
        directories: Mapping[str, Callable[[Path], object]] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Path:
        """Save a checkpoint; when this returns it lasts, and until then the one before does.

        Args:
            env_steps: Where the run stands. Saving the same place twice keeps the first.
            states: What `rlfeed.durable.save_state` takes, by name.
            directories: Called with the path of a subdirectory to create, by name: ``{"replay": buffer.save}``.
            info: Further facts, as JSON can say them; the name ``env_steps`` is taken.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: If there is a later one, or what was written does not read back.
            OSError: If the disk refuses; the checkpoints before are untouched.
        """
        if any(int(path.name) > env_steps for path in self.paths()):
            raise CheckpointError(
                f"{self.directory}: holds a checkpoint later than env step {env_steps}; expected to go on from the "
                "last. Load it first, or use another run directory."
            )
        make_directory(self.directory)
        clean_temporaries(self.directory)
        target = self.directory / f"{env_steps:012d}"
        if not target.exists():
            with build_directory(target, {"env_steps": env_steps, **(info or {})}) as building:
                for name, state in states.items():
                    save_state(building / f"{name}.state", state)
                for name, write in (directories or {}).items():
                    write(building / name)
        verify_directory(target)  # nothing older goes, and nothing is reported, before the new one reads back
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
            if not findings and (reported := self._reported()) > checkpoint.env_steps:
                findings.append(f"{self.directory / f'{reported:012d}'}: was reported as saved and is gone.")
            if findings:
                warnings.warn(f"Going back to {path}: {' '.join(findings)}", RuntimeWarning, stacklevel=2)
            return checkpoint
        raise CheckpointError(
            f"{self.directory}: holds no checkpoint that loads; expected at least one. {' '.join(findings)}".rstrip()
        )

    def _reported(self) -> int:
        try:
            return int((self.directory / LATEST).read_text())
        except (OSError, ValueError):
            return 0  # a pointer that is missing or damaged costs nothing: the order is in the names


def _open(path: Path) -> Checkpoint:
    info = verify_directory(path)
    env_steps = info.pop("env_steps", None)
    if env_steps != int(path.name):
        raise CheckpointError(f"{path}: is of env step {env_steps}; expected that of its name. It was renamed.")
    return Checkpoint(path, env_steps, info)
