"""Files and directories that last: whole or not there at all, whenever the process or the machine stops.

Everything is written beside its place under a temporary name, flushed to the disk, then renamed, and the rename is
flushed too. A failure leaves what was there before as it was; what a killed process leaves behind is recognised by
its name (`clean_temporaries`). Nothing here reads or writes pickle.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rlfeed import codec
from rlfeed.errors import CheckpointError, FieldError, RunDirectoryError

MANIFEST = "MANIFEST.json"
SCHEMA = 1
_TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{8}")


def write_bytes(path: Path | str, *parts: bytes | memoryview) -> None:
    """Write a file so that it is there whole, or the old one is.

    Args:
        path: Where to; its directory exists.
        *parts: The contents, written one after the other without joining them.

    Raises:
        OSError: If the disk refuses; what stood at ``path`` is untouched.
    """
    target = Path(path)
    temporary = _temporary(target)
    try:
        with temporary.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(target)  # "No space left on device" alone does not say where
        raise


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as JSON, durably.

    Args:
        path: Where to; its directory exists.
        value: Dicts, lists, strings, finite numbers, bools and None.

    Raises:
        FieldError: If JSON cannot say the value.
        OSError: If the disk refuses; what stood at ``path`` is untouched.
    """
    write_bytes(path, _render(value, path))


def write_hashed(path: Path | str, parts: Iterable[bytes | memoryview | np.ndarray]) -> str:
    """Write a new file into a directory that is being built, and hash it on the way.

    Args:
        path: Where to; no file stands there.
        parts: Bytes, or uint8 arrays; each is written before the next is asked for.

    Returns:
        Its SHA-256, for `build_directory`, which flushes the file to the disk.

    Raises:
        OSError: If the disk refuses.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("xb", buffering=0) as file:
            for part in parts:
                view = part.data if isinstance(part, np.ndarray) else memoryview(part)
                digest.update(view)
                while view:
                    view = view[file.write(view) :]
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return digest.hexdigest()


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        Its value.

    Raises:
        CheckpointError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read, {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON, {error}; it was cut short or changed.") from error


def save_state(path: Path | str, state: Any) -> None:
    """Write a state into one file, durably; arrays go to the disk from where they lie.

    Args:
        path: Where to; its directory exists.
        state: What `rlfeed.codec.encode` takes: a ``state_dict`` of a model, an optimiser, a buffer, ...

    Raises:
        FieldError: If a part of the state is of a type that cannot be stored; the message says which.
        OSError: If the disk refuses; what stood at ``path`` is untouched.
    """
    write_bytes(path, *codec.encode(state))


def load_state(path: Path | str) -> Any:
    """Read a state back.

    Args:
        path: A file of `save_state`.

    Returns:
        The state, types, dtypes and shapes as they were; its arrays are writable views of one block.

    Raises:
        CheckpointError: If the file is missing, cut short or changed.
    """
    try:
        block = np.fromfile(path, np.uint8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read, {error.strerror}.") from error
    return codec.decode(block, str(path))


def make_directory(path: Path | str) -> None:
    """Create a directory and its parents where they are missing, durably.

    Args:
        path: The directory.

    Raises:
        OSError: If it cannot be created, or a file stands there.
    """
    target = Path(path)
    if target.is_dir():
        return
    make_directory(target.parent)
    target.mkdir(exist_ok=True)
    _sync(target.parent)


@contextmanager
def build_directory(
    path: Path | str, info: Mapping[str, Any] | None = None, digests: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Build a directory that appears at once, complete and with a manifest, or not at all.

    A built directory inside is covered by the manifest that it has: nothing is hashed twice.

    Args:
        path: Where the directory is to appear; nothing stands there. Missing parents are created.
        info: What `verify_directory` gives back, as JSON can say it; read when the block ends.
        digests: SHA-256 by name of files that need not be read again: `write_hashed` gave them, or they are links to
            files of another built directory. Read when the block ends.

    Yields:
        A temporary sibling directory to write into.

    Raises:
        RunDirectoryError: If something stands at ``path`` already.
        OSError: If the disk refuses; nothing is left behind.
    """
    target = Path(path)
    if target.exists() or target.is_symlink():
        raise RunDirectoryError(f"{target}: exists already; expected a free path. Remove it or choose another.")
    make_directory(target.parent)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        _write_manifest(temporary, dict(info or {}), digests or {})
        temporary.replace(target)
        _sync(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(target)
        raise


def verify_directory(path: Path | str, *, linked: bool = True) -> dict[str, Any]:
    """Check every file of a built directory, and of those built inside, against its manifest.

    Args:
        path: A directory of `build_directory`.
        linked: Whether to read files again that stand under another name too. Right after building, False spares
            those that were linked from a directory that was verified when it was built.

    Returns:
        The info that it was built with.

    Raises:
        CheckpointError: If the manifest or a file is missing, of another length or changed; names all of them.
    """
    directory = Path(path)
    manifest = read_json(directory / MANIFEST)
    try:
        text = _render(manifest, directory)
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(
                f"{directory / MANIFEST}: has schema {manifest['schema']!r}; expected {SCHEMA}. "
                "Read it with the rlfeed that wrote it."
            )
        if manifest.pop("sha256") != _digest(manifest):
            raise CheckpointError(f"{directory / MANIFEST}: does not have its checksum; it was changed.")
        findings = [_damage(directory, name, entry, linked) for name, entry in manifest["files"].items()]
        info = dict(manifest["info"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / MANIFEST}: is not a manifest; expected schema {SCHEMA}.") from error
    if damaged := [finding for finding in findings if finding]:
        raise CheckpointError(f"{directory}: is damaged: {'; '.join(damaged)}.")
    if (directory / MANIFEST).read_bytes() != text:  # it says the same in other words
        raise CheckpointError(f"{directory / MANIFEST}: is not as it was written; it was changed.")
    return info


def digests_of(path: Path | str) -> dict[str, str]:
    """Read what a built directory's files are, for another directory that links them.

    Args:
        path: A directory that `verify_directory` passed.

    Returns:
        Their SHA-256 by name.
    """
    return {name: entry["sha256"] for name, entry in read_json(Path(path) / MANIFEST)["files"].items()}


def remove_directory(path: Path | str) -> None:
    """Remove a directory so that it is never seen half removed under its name.

    Args:
        path: The directory.

    Raises:
        OSError: If it is not there or cannot be removed.
    """
    directory = Path(path)
    shutil.rmtree(directory.rename(_temporary(directory)))


def clean_temporaries(parent: Path | str) -> list[Path]:
    """Remove what processes killed in the middle of a write left in a directory.

    Args:
        parent: The directory; only its owner may call this, for a live writer's work looks the same.

    Returns:
        What was removed.
    """
    stale = [entry for entry in Path(parent).iterdir() if _TEMPORARY.fullmatch(entry.name)]
    for entry in stale:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return stale


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(directory: Path, info: dict[str, Any], digests: Mapping[str, str]) -> None:
    files: dict[str, dict[str, Any]] = {}
    new = [directory, directory / MANIFEST]
    for entry, name in _entries(directory):
        if entry.is_dir():
            new.append(Path(entry))
            continue
        digest = digests.get(name)
        if digest is None:
            with Path(entry).open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if entry.stat().st_nlink == 1:  # what stands in another directory was flushed with that
            new.append(Path(entry))
        files[name] = {"bytes": entry.stat().st_size, "sha256": digest}
    manifest: dict[str, Any] = {"schema": SCHEMA, "files": files, "info": info}
    manifest["sha256"] = _digest(manifest)
    (directory / MANIFEST).write_bytes(_render(manifest, directory))
    with ThreadPoolExecutor(min(len(new), 8)) as threads:  # a disk flushes several files in the time of one
        list(threads.map(_sync, new))


def _entries(directory: Path, prefix: str = "") -> Iterator[tuple[os.DirEntry[str], str]]:
    """List what is in a directory and below, by name; but of a directory that was built only its manifest."""
    with os.scandir(directory) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    built = prefix and any(entry.name == MANIFEST for entry in entries)
    for entry in entries:
        name = prefix + entry.name
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            raise FieldError(f"{entry.path}: is not a plain file; expected files and directories only.")
        if not built or entry.name == MANIFEST:
            yield entry, name
            if entry.is_dir():
                yield from _entries(Path(entry), f"{name}/")


def _render(value: Any, where: Path | str) -> bytes:
    try:
        return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise FieldError(f"{where}: cannot be written as JSON, {error}; expected plain finite values.") from error


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _damage(directory: Path, name: str, entry: dict[str, Any], linked: bool) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return f"{name} lies outside it"
    file = directory / name
    if file.is_symlink() or not file.is_file():
        return f"{name} is missing"
    if (nbytes := file.stat().st_size) != entry["bytes"]:
        return f"{name} has {nbytes} bytes instead of {entry['bytes']}"
    if not linked and file.stat().st_nlink > 1:
        return ""
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != entry["sha256"]:
            return f"{name} was changed"
    if file.name == MANIFEST:  # of a directory that was built inside
        try:
            verify_directory(file.parent, linked=linked)
        except CheckpointError as error:
            return str(error).rstrip(".")
    return ""
