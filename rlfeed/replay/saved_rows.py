"""Files of rows: what a checkpoint writes of lanes that go on growing, and reads back to where it was."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlfeed.errors import CheckpointError
from rlfeed.replay import kernels as k
from rlfeed.replay.storage import Storage

STAGE_BYTES = 1 << 18  # stays in the cache between the copy, the hash and the write


@dataclass(frozen=True, slots=True)
class SavedFile:
    """Describe a file that need not be written again.

    Args:
        nbytes: Its length.
        sha256: Of its contents.
    """

    nbytes: int
    sha256: str


class Saved:
    """Hold on to what was saved last, wherever its directory is moved: the next save links its files.

    Args:
        directory: Where it is now.
        files: Its files of rows and of carries, by name.
        spans: ``[2, lanes]`` int64 by the number of a file of rows, oldest first: its rows of each lane, begin and end.
        heads: ``[lanes]`` int64, the committed heads that it holds.
        versions: ``[lanes * carry_entries]`` int64, of the carries written back that it holds; None where none was.
    """

    def __init__(
        self,
        directory: Path,
        files: dict[str, SavedFile],
        spans: dict[int, np.ndarray],
        heads: np.ndarray,
        versions: np.ndarray | None,
    ) -> None:
        self.files, self.spans, self.heads, self.versions = files, spans, heads, versions
        self.descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def link(self, names: list[str], building: Path) -> bool:
        """Link files into a directory.

        Args:
            names: Which.
            building: The directory.

        Returns:
            Whether all of them could be linked; otherwise none is. The directory may have been removed meanwhile, or
            lie on another file system.
        """
        target = os.open(building, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in names:
                os.link(name, name, src_dir_fd=self.descriptor, dst_dir_fd=target)
                if os.stat(name, dir_fd=target).st_size != self.files[name].nbytes:
                    raise OSError(f"{name}: is damaged")
        except OSError:
            for name in names:
                (building / name).unlink(missing_ok=True)
            return False
        finally:
            os.close(target)
        return True


def rows_name(number: int) -> str:
    """Name the file of rows of a save.

    Args:
        number: Which save.

    Returns:
        The name.
    """
    return f"rows-{number:06d}"


def carries_name(number: int) -> str:
    """Name the file of the carries that had been written back since the save before.

    Args:
        number: Which save.

    Returns:
        The name.
    """
    return f"carries-{number:06d}"


def copy_rows(storage: Storage, spans: np.ndarray, reserved: np.ndarray) -> Iterator[np.ndarray]:
    """Copy rows through a small block, while others may write.

    Args:
        storage: Whose.
        spans: ``[2, lanes]`` int64: of each lane the first absolute row, and behind the last.
        reserved: ``[lanes]`` int64: receives how far each lane was reserved after its copy. What writers overwrote
            meanwhile is given up by that; a lane that was overwritten whole begins anew behind its head.

    Yields:
        The next bytes, valid until the next are asked for.
    """
    stage, filled = np.empty(STAGE_BYTES, np.uint8), 0
    for lane, (begin, end) in enumerate(spans.T.tolist()):
        for section in storage.sections:
            for piece in storage.pieces(section, lane, begin, end):
                at = 0
                while at < len(piece):
                    count = min(len(piece) - at, STAGE_BYTES - filled)
                    stage[filled : filled + count] = piece[at : at + count]
                    at, filled = at + count, filled + count
                    if filled == STAGE_BYTES:
                        yield stage
                        filled = 0
        reserved[lane] = min(max(end, k.reserved_head(storage.plan, lane)), end + storage.ring)
    yield stage[:filled]


def read_rows(path: Path, storage: Storage, spans: np.ndarray) -> None:
    """Read a file of rows to where they lie.

    Args:
        path: The file, verified.
        storage: Whose.
        spans: As they were given to `copy_rows`.

    Raises:
        CheckpointError: If the file is longer or shorter than its rows.
    """
    with path.open("rb", buffering=0) as file:
        for lane, (begin, end) in enumerate(spans.T.tolist()):
            for section in storage.sections:
                for piece in storage.pieces(section, lane, begin, end, fill=True):
                    view = piece.data
                    while view:
                        count = file.readinto(view)
                        if not count:
                            raise CheckpointError(f"{path}: ends before its rows do; expected those of the layout.")
                        view = view[count:]
        if file.read(1):
            raise CheckpointError(f"{path}: goes on after its rows; expected those of the layout alone.")


def new_carries(storage: Storage, tails: np.ndarray, versions: np.ndarray | None) -> np.ndarray:
    """Find the carries that were written back since the last save; the learner, who writes them, saves too.

    Args:
        storage: Whose.
        tails: ``[lanes]`` int64, the oldest live rows.
        versions: Of the last save; None takes all of them.

    Returns:
        ``[N]`` int64 entries of the overlay.
    """
    overlay = storage.overlay()
    if overlay is None:
        return np.empty(0, np.int64)
    live = overlay[:, 1] > np.repeat(tails, storage.carry_entries)  # holds the row plus 1
    return np.flatnonzero(live if versions is None else live & (overlay[:, 0] != versions))


def copy_carries(storage: Storage, entries: np.ndarray) -> Iterator[np.ndarray]:
    """Copy carries that were written back through a small block.

    Args:
        storage: Whose.
        entries: ``[N]`` int64, of the overlay.

    Yields:
        The entries, then what they hold.
    """
    yield entries.view(np.uint8)
    overlay = storage.overlay()
    if overlay is not None:
        for some in _blocks(storage, entries):
            yield overlay[some].view(np.uint8).reshape(-1)


def read_carries(path: Path, storage: Storage) -> None:
    """Read carries that were written back to where they lie.

    Args:
        path: The file, verified.
        storage: Whose.

    Raises:
        CheckpointError: If it is not of this layout.
        CapacityError: If there is no memory for what is written back.
    """
    storage.reserve_overlay()
    overlay = storage.overlay()
    count, rest = divmod(path.stat().st_size, 8 + storage.overlay_pitch)
    with path.open("rb") as file:
        entries = np.fromfile(file, np.int64, count)
        if overlay is None or rest or ((entries < 0) | (entries >= len(overlay))).any():
            raise CheckpointError(f"{path}: holds carries of another layout; expected those of this one.")
        for some in _blocks(storage, entries):
            overlay[some] = np.fromfile(file, np.int64, len(some) * overlay.shape[1]).reshape(len(some), -1)


def _blocks(storage: Storage, entries: np.ndarray) -> Iterator[np.ndarray]:
    count = max(1, STAGE_BYTES // storage.overlay_pitch)
    return (entries[at : at + count] for at in range(0, len(entries), count))
