"""Save a storage and load it again: whole, verified, and without anything that could run code."""

from pathlib import Path
from typing import Any

import numpy as np

from rlfeed import durable
from rlfeed.errors import CheckpointError
from rlfeed.nest import Nest, map_nest
from rlfeed.replay import kernels as k
from rlfeed.replay.storage import Storage
from rlfeed.specs import ArraySpec

VERSION = 1


def save(directory: Path, storage: Storage, settings: dict[str, Any]) -> None:
    """Write a storage's rows and heads, and the buffer's settings.

    Args:
        directory: Must not exist.
        storage: What to save; nobody writes to it meanwhile.
        settings: What the buffer needs beside.
    """
    heads = storage.heads().copy()
    with durable.build_directory(directory) as building:
        for lane in range(storage.lanes):
            rows = min(int(heads[0, lane]), storage.rows)
            durable.save_state(building / f"lane-{lane:06d}", storage.parts(lane, rows))
        durable.save_state(
            building / "buffer",
            {
                "version": VERSION,
                "fields": map_nest(lambda spec: [list(spec.shape), spec.dtype.str], storage.fields),
                "lanes": storage.lanes,
                "rows": storage.rows,
                "carry_every": storage.carry_every,
                "written_back": bool(storage.words(k.WRITTEN_BACK, k.WRITTEN_BACK + 1)[0]),
                "kind": storage.memory.kind,
                "path": None if storage.memory.path is None else str(storage.memory.path),
                "heads": heads,
                "settings": settings,
            },
        )


def load(directory: Path) -> tuple[Storage, dict[str, Any]]:
    """Read what `save` wrote.

    Args:
        directory: What `save` wrote.

    Returns:
        The storage and the buffer's settings.

    Raises:
        CheckpointError: If it is missing, damaged or of another version.
    """
    durable.verify_directory(directory)
    state = durable.load_state(directory / "buffer")
    if state["version"] != VERSION:
        raise CheckpointError(
            f"{directory}: has version {state['version']}; expected {VERSION}. Use the rlfeed that wrote it."
        )
    path = None if state["path"] is None else Path(state["path"])
    lanes, rows, every = state["lanes"], state["rows"], state["carry_every"]
    storage = Storage(_specs(state["fields"]), lanes, rows, state["kind"], path, replace=True, carry_every=every)
    if state["written_back"]:
        storage.reserve_overlay()
    heads: np.ndarray = state["heads"]
    for lane in range(storage.lanes):
        rows = min(int(heads[0, lane]), storage.rows)
        saved = durable.load_state(directory / f"lane-{lane:06d}")
        for name, part in storage.parts(lane, rows).items():
            part[...] = saved[name]
    storage.heads()[...] = heads
    return storage, state["settings"]


def _specs(fields: Nest) -> Nest:
    if isinstance(fields, list):
        return ArraySpec(tuple(fields[0]), np.dtype(fields[1]))
    if isinstance(fields, dict):
        return {key: _specs(value) for key, value in fields.items()}
    return tuple(_specs(value) for value in fields)
