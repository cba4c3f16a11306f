"""From steps and episodes to rows on a device: the kernels have said where, the values follow in one transfer."""

from typing import Any

import numpy as np
from torch import Tensor

from rlfeed.replay import kernels as k
from rlfeed.replay.device_rows import DeviceRows, Line
from rlfeed.replay.storage import Column, Storage
from rlfeed.types import Step

EPISODE_ROWS = 256  # of an episode that travel together


def write_step(storage: Storage, device: DeviceRows, step: Step, ids: np.ndarray) -> None:
    """Copy the values of a step to the rows that the kernel has given it; the caller holds the device's lock.

    Args:
        storage: What has stored the rest of it.
        device: Where to.
        step: k rows, as they were stored.
        ids: ``[k]`` int64, -1 where a row was lost.
    """
    stored = np.flatnonzero(ids >= 0)
    if not len(stored):
        return
    lanes, rows = ids[stored] >> k.LANE_SHIFT, ids[stored] & k.ROW_MASK
    here, there = _places(storage, lanes, rows), _places(storage, lanes, rows + 1)
    opens = np.asarray(step.is_first)[stored]
    lines: list[Line] = []
    for column in storage.columns:
        if not column.on_device:
            continue
        key = column.name, column.path
        if column.name == "observation":
            lines.append((key, there, _leaf(step.next_observation, column)[stored]))
            if opens.any():
                lines.append((key, here[opens], _leaf(step.observation, column)[stored[opens]]))
        elif column.every == 1:
            lines.append((key, here, _leaf(getattr(step, column.name), column)[stored]))
        else:
            index = storage.indices(lanes, rows)
            due = (index > 0) & (index % column.every == 0)
            lines.append((key, _carry_places(storage, lanes, rows)[due], _leaf(step.carry, column)[stored[due]]))
    device.write(lines)


def write_episode(
    storage: Storage, device: DeviceRows, first: int, steps: int, values: list[tuple[Column, np.ndarray]]
) -> None:
    """Copy the values of an episode to its rows; the caller holds the device's lock.

    Args:
        storage: What has stored the rest of it.
        device: Where to.
        first: The id of its first step.
        steps: How many it has.
        values: ``[T, ...]`` of every column on the device, ``[T + 1, ...]`` of observations.
    """
    lane, row = first >> k.LANE_SHIFT, first & k.ROW_MASK
    for begin in range(0, steps + 1, EPISODE_ROWS):
        lines: list[Line] = []
        for column, rows in values:
            at = np.arange(begin, min(begin + EPISODE_ROWS, steps + (column.name == "observation")))
            if column.every > 1:
                at = at[(at > 0) & (at % column.every == 0)]
            places = (_places if column.every == 1 else _carry_places)(storage, np.full(len(at), lane), row + at)
            lines.append(((column.name, column.path), places, rows[at]))
        device.write(lines)


def _places(storage: Storage, lanes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return lanes * storage.ring + rows % storage.ring + 1


def _carry_places(storage: Storage, lanes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return lanes * storage.carry_entries + rows // storage.carry_every % storage.carry_entries + 1


def _leaf(nest: Any, column: Column) -> np.ndarray:
    for part in column.path:
        nest = nest[part]
    return nest.numpy(force=True) if isinstance(nest, Tensor) else np.asarray(nest)
