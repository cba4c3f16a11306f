"""Save a storage, each time only what is new, and load it again: verified, and nothing that could run code.

A saved directory stands alone:

    MANIFEST.json      length and SHA-256 of every file
    buffer             layout, heads, shared words, the buffer's own state, and which rows are in which file
    rows-000000 ..     the rows [begin, end) of every lane that were new at one save: lane by lane, section by section
    carries-000000 ..  the carries that the learner had written back since the save before: their entries, their bytes

Files that an earlier save wrote are hard links to it. See docs/adr/0009-incremental-checkpoints.md.
"""

from pathlib import Path
from typing import Any

import numpy as np

from rlfeed import codec, durable
from rlfeed.errors import CheckpointError
from rlfeed.nest import Nest, describe, leaves, map_nest
from rlfeed.replay import kernels as k
from rlfeed.replay.saved_rows import (
    Saved,
    SavedFile,
    carries_name,
    copy_carries,
    copy_rows,
    new_carries,
    read_carries,
    read_rows,
    rows_name,
)
from rlfeed.replay.storage import WORDS, Storage, ring_of
from rlfeed.specs import ArraySpec

VERSION = 2
STATE = "buffer"
MOST_SAVES = 64  # whose files one directory holds
COMMITTED, RESERVED, EPISODES, STEPS = range(4)  # lines of the saved heads


def save(directory: Path, storage: Storage, state: dict[str, Any], before: Saved | None) -> Saved:
    """Write what is new since the last save; others may go on writing rows meanwhile.

    Args:
        directory: Must not exist; it is there whole afterwards, or not at all.
        storage: What to save.
        state: What the buffer needs beside.
        before: What was saved last, if anything.

    Returns:
        What was saved, for the next time.

    Raises:
        RunDirectoryError: If the directory exists.
        OSError: If the disk refuses; what was saved before is untouched.
    """
    heads, digests = np.empty((4, storage.lanes), np.int64), dict[str, str]()
    k.snapshot_heads(storage.plan, heads)
    tails = np.maximum(heads[RESERVED] - storage.ring, 0)
    number = max(before.spans) + 1 if before is not None else 0
    with durable.build_directory(directory, digests=digests) as building:
        kept = [] if before is None else _worth_keeping(before, storage, heads[COMMITTED], tails)
        base = before if before is not None and kept and before.link(kept, building) else None
        files = {name: base.files[name] for name in kept} if base else {}
        spans = {n: span for n, span in base.spans.items() if rows_name(n) in files} if base else {}
        # The last row of a lane comes again: it was open when it was saved, or its end was not known.
        begins = np.maximum(base.heads - 1, tails) if base else tails
        spans[number] = np.stack([np.minimum(begins, heads[COMMITTED]), heads[COMMITTED]])
        carries = new_carries(storage, tails, base.versions if base else None)
        new = {rows_name(number): copy_rows(storage, spans[number], heads[RESERVED])}
        if len(carries):
            new[carries_name(number)] = copy_carries(storage, carries)
        for name, parts in new.items():
            digest = durable.write_hashed(building / name, parts)
            files[name] = SavedFile((building / name).stat().st_size, digest)
        content = {
            "version": VERSION,
            "layout": _layout(storage),
            "numbers": np.array(list(spans), np.int64),
            "spans": np.stack(list(spans.values())),
            "carries": [n for n in range(number + 1) if carries_name(n) in files],
            "heads": heads,
            "words": storage.words(0, WORDS).copy(),
            "state": state,
        }
        digests.update({name: file.sha256 for name, file in files.items()})
        digests[STATE] = durable.write_hashed(building / STATE, codec.encode(content))
        saved = Saved(building, files, spans, heads[COMMITTED], _versions(storage))
    return saved


def load(directory: Path, expected: dict[str, Nest] | None = None) -> tuple[Storage, dict[str, Any], Saved]:
    """Read what `save` wrote.

    Args:
        directory: What `save` wrote.
        expected: Nests of `ArraySpec` by `Step` field that the storage must have.

    Returns:
        The storage; the buffer's state; and what the next save need not write again.

    Raises:
        CheckpointError: If it is missing, damaged, of another version or of other fields.
        CapacityError: If it does not fit here.
        ConfigError: If its memory-mapped file is in use.
    """
    durable.verify_directory(directory)
    content = durable.load_state(directory / STATE)
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise CheckpointError(f"{directory}: has version {version}; expected {VERSION}. Use the rlfeed that wrote it.")
    try:
        layout, heads, words, state = (content[name] for name in ("layout", "heads", "words", "state"))
        fields, lanes, rows, every = _specs(layout["fields"]), layout["lanes"], layout["rows"], layout["carry_every"]
        stack = layout["frame_stack"]
        kind, path = layout["kind"], None if layout["path"] is None else Path(layout["path"])
        _check_index(content, lanes, ring_of(rows))
        spans = dict(zip(content["numbers"].tolist(), content["spans"], strict=True))
        carries = [carries_name(number) for number in content["carries"]]
        digests = durable.digests_of(directory)
        names = [*(rows_name(number) for number in spans), *carries]
        hashes = {name: digests[name] for name in names}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / STATE}: is not the state of a buffer, {error!r}.") from error
    _check_fields(directory, fields, expected or {})
    storage = Storage(fields, lanes, rows, kind, path, replace=True, carry_every=every, frame_stack=stack)
    for number, span in spans.items():  # oldest first: a row that was open when it was saved comes again
        read_rows(directory / rows_name(number), storage, span)
    fault = k.restore_heads(storage.plan, heads)
    if fault >= 0:
        lane, row = fault >> k.LANE_SHIFT, fault & k.ROW_MASK
        raise CheckpointError(
            f"{directory}: row {row} of lane {lane} does not continue the one before; it was changed."
        )
    storage.words(0, WORDS)[:] = words
    storage.words(k.WRITTEN_BACK, k.WRITTEN_BACK + 1)[:] = 0  # the memory for it is not yet there
    for name in carries:
        read_carries(directory / name, storage)
    files = {name: SavedFile((directory / name).stat().st_size, digest) for name, digest in hashes.items()}
    return storage, state, Saved(directory, files, spans, heads[COMMITTED], _versions(storage))


def _layout(storage: Storage) -> dict[str, Any]:
    return {
        "fields": map_nest(lambda spec: [list(spec.shape), spec.dtype.str], storage.fields),
        "lanes": storage.lanes,
        "rows": storage.rows,
        "carry_every": storage.carry_every,
        "frame_stack": storage.frame_stack,
        "kind": storage.memory.kind,
        "path": None if storage.memory.path is None else str(storage.memory.path),
    }


def _specs(fields: Nest) -> Nest:
    if isinstance(fields, list):
        return ArraySpec(tuple(fields[0]), np.dtype(fields[1]))
    if isinstance(fields, dict):
        return {key: _specs(value) for key, value in fields.items()}
    return tuple(_specs(value) for value in fields)


def _versions(storage: Storage) -> np.ndarray | None:
    overlay = storage.overlay()
    return None if overlay is None else overlay[:, 0].copy()


def _worth_keeping(before: Saved, storage: Storage, heads: np.ndarray, tails: np.ndarray) -> list[str]:
    """Choose the files whose rows are not all overwritten; none, where they are many or mostly hold dead rows."""
    spans = {n: span for n, span in before.spans.items() if (span[1] > np.maximum(tails, span[0])).any()}
    carries = {name: file.nbytes for name, file in before.files.items() if name.startswith("carries-")}
    held = sum(int((ends - begins).sum()) for begins, ends in spans.values()) + int((heads - before.heads).sum())
    stale = held > 2 * int((heads - tails).sum())
    stale |= sum(carries.values()) > 2 * storage.overlay_bytes
    if stale or max(len(spans), len(carries)) >= MOST_SAVES:
        return []
    return [*map(rows_name, spans), *carries]


def _check_index(content: dict[str, Any], lanes: int, rows: int) -> None:
    """Check that heads fit together, and that every live row is in a file."""
    heads, spans, numbers, words = (content[name] for name in ("heads", "spans", "numbers", "words"))
    shapes = heads.shape == (4, lanes) and spans.shape == (len(numbers), 2, lanes) and words.shape == (WORDS,)
    if not shapes or {table.dtype for table in (heads, spans, numbers, words)} != {np.dtype(np.int64)}:
        raise ValueError("its tables are of other shapes")
    committed, reserved, lengths = heads[COMMITTED], heads[RESERVED], spans[:, 1] - spans[:, 0]
    reach = committed.copy()
    for begins, ends in spans[::-1]:  # newest first: each goes on where the later ones begin
        reach = np.where(ends >= reach, np.minimum(begins, reach), reach)
    covered = reach <= np.maximum(reserved - rows, 0)
    orders = (heads >= 0, committed <= reserved, reserved <= committed + rows, covered, spans >= 0)
    if not all(order.all() for order in orders) or ((lengths < 0) | (lengths > rows)).any():
        raise ValueError("its heads and files do not fit together")


def _check_fields(directory: Path, fields: dict[str, Nest], expected: dict[str, Nest]) -> None:
    wrong = [
        f"{_readable(name, fields[name])}; expected {_readable(name, nest)}"
        for name, nest in expected.items()
        if fields[name] != nest
    ]
    if wrong:
        raise CheckpointError(f"{directory}: was saved of other spaces: it has {'; '.join(wrong)}.")


def _readable(name: str, nest: Nest) -> str:
    return ", ".join(f"{describe(name, path)} {spec.dtype} {spec.shape}" for path, spec in leaves(nest))
