"""From padded episodes to rows: what was recorded elsewhere, checked as a whole and written one episode at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rlfeed.errors import CapacityError, FieldError, LaneError
from rlfeed.nest import Nest, describe, leaves
from rlfeed.replay import kernels as k
from rlfeed.replay.device_writing import write_episode
from rlfeed.replay.storage import Column, Storage
from rlfeed.types import Batch


def write_episodes(storage: Storage, lanes: Sequence[int], owner: int, batch: Batch, where: str) -> np.ndarray:
    """Store episodes, each in the lane that has had the fewest rows so far.

    Args:
        storage: Where to.
        lanes: Lanes that may be written to.
        owner: Who writes.
        batch: Padded episodes.
        where: Who asks, for an error.

    Returns:
        ``[B]`` int64 ids of their first steps.

    Raises:
        FieldError: If a field is not what the columns store, or an episode is not whole; all findings at once.
        CapacityError: If an episode is longer than a lane.
        LaneError: If an episode is open in every lane.
    """
    if not isinstance(batch, Batch):
        raise FieldError(f"{where}: got a {type(batch).__name__}; expected a Batch of padded episodes.")
    episodes = _Episodes(storage, batch)
    if episodes.wrong:
        raise FieldError(f"{where}: " + "; ".join(episodes.wrong) + ". Nothing was stored.")
    longest = int(episodes.lengths.max(initial=0))
    if longest + 1 > storage.rows:
        raise CapacityError(
            f"{where}: has an episode of {longest} steps, which takes {longest + 1} rows; expected at most "
            f"{storage.rows}, the rows of a lane. Raise capacity to at least {(longest + 1) * storage.lanes}. Nothing "
            "was stored."
        )
    mine, ids = np.array(lanes, np.int64), np.empty(len(episodes.lengths), np.int64)
    table, plan = episodes.table, storage.plan
    begins = table[:, k.OTHER].copy()
    for i, (steps, ends) in enumerate(zip(episodes.lengths.tolist(), episodes.ends.tolist(), strict=True)):
        lane = int(k.choose_lane(plan, mine, owner))
        if lane < 0:
            raise LaneError(
                f"{where}: none of the lanes {mine.tolist()} is free: each has an open episode, or another writer; "
                "expected one to put an episode in. End or cut one, or use a lane of its own for offline data."
            )
        np.add(begins, episodes.sizes * i, out=table[:, k.OTHER])
        ids[i] = (lane << k.LANE_SHIFT) | int(k.write_episode(plan, table, lane, steps, ends))
        if storage.device is not None:
            write_episode(storage, storage.device, int(ids[i]), steps, [(c, rows[i]) for c, rows in episodes.on_device])
    return ids


class _Episodes:
    """Check a batch of padded episodes; `wrong` says what cannot be stored."""

    def __init__(self, storage: Storage, batch: Batch) -> None:
        self.wrong: list[str] = []
        self.lengths, self.ends = np.empty(0, np.int64), np.empty(0, np.int64)
        shape = tuple(batch.reward.shape)
        if len(shape) != 2:
            self.wrong.append(f"reward has shape {shape}; expected (B, T), steps of padded episodes")
            return
        self.batch_size, self.longest = shape
        self._alive: list[np.ndarray] = []
        self.on_device: list[tuple[Column, np.ndarray]] = []
        lines = []
        for name in ("observation", "action", "reward", "carry", "extras"):
            declared = storage.columns_of(name) + (storage.columns_of("priority") if name == "extras" else [])
            lines += self._columns(name, getattr(batch, name), declared)
        self._measure(batch)
        self._check_values(batch)
        self.table = storage.table([(column, role) for column, role, _, _ in lines])
        self.table[:, k.OTHER] = [begin for _, _, begin, _ in lines]
        self.sizes = np.array([size for _, _, _, size in lines], np.int64)

    def _columns(self, name: str, nest: Nest, declared: list[Column]) -> list[tuple[Column, int, int, int]]:
        given, lines = dict(leaves(nest)) if declared or name == "extras" else {}, []
        role = k.ROLE_OBSERVATION if name == "observation" else k.ROLE_STEP
        steps = self.longest + (name == "observation")
        for column in declared:
            path = ("priority",) if column.name == "priority" else column.path
            label, shape, dtype = describe(name, path), (self.batch_size, steps, *column.spec.shape), column.spec.dtype
            if path not in given:
                self.wrong.append(f"{label} is missing")
                continue
            array = _array(given.pop(path))
            if array.shape != shape:
                hint = " (the state before every step)" if name == "carry" else ""
                self.wrong.append(f"{label} has shape {array.shape}; expected {shape}{hint}")
            elif not np.can_cast(array.dtype, dtype, "safe") and (name != "reward" or array.dtype.kind not in "biuf"):
                self.wrong.append(f"{label} has dtype {array.dtype}; expected {dtype}")
            else:
                with np.errstate(over="ignore"):  # a reward beyond float32 is found as an infinite one
                    array = np.ascontiguousarray(array, dtype)
                if column.on_device:
                    self.on_device.append((column, array))
                    continue
                self._alive.append(array)
                size = steps * column.spec.nbytes
                lines.append((column, k.ROLE_CARRY if column.every > 1 else role, array.ctypes.data, size))
        unknown = [path for path in given if (name, path[:1]) != ("extras", ("env_action",))]
        self.wrong += [f"{describe(name, path)} is not declared" for path in unknown]
        return lines

    def _measure(self, batch: Batch) -> None:
        """Say how long each episode is, and how it ends."""
        rows, steps = self.batch_size, np.arange(self.longest)
        terminated, truncated = self._flags("terminated", batch.terminated), self._flags("truncated", batch.truncated)
        mask = None if batch.mask is None else self._flags("mask", batch.mask)
        lengths = np.full(rows, self.longest) if mask is None else mask.sum(axis=1)
        if batch.lengths is not None:
            lengths = _array(batch.lengths)
        if lengths.shape != (rows,) or lengths.dtype.kind not in "iu":
            self.wrong.append(f"lengths has shape {lengths.shape} and dtype {lengths.dtype}; expected ({rows},) int64")
            return
        self.lengths = lengths = lengths.astype(np.int64)
        self.valid = steps < lengths[:, None]
        for i in np.flatnonzero((lengths < 1) | (lengths > self.longest)):
            self.wrong.append(f"row {i}: has {lengths[i]} steps; expected 1 .. {self.longest}")
        if mask is not None and not np.array_equal(mask, self.valid):
            self.wrong.append("mask has gaps or does not fit lengths; expected True for the first steps of each row")
        ends = k.TERMINATED * terminated.astype(np.int64) + k.TRUNCATED * truncated
        before = (steps < lengths[:, None] - 1) & (ends != 0)
        for i in np.flatnonzero(before.any(axis=1)):
            at = f"step {before[i].argmax()} of {lengths[i]}"
            self.wrong.append(f"row {i}: ends at {at}; expected an end at the last step only")
        if batch.is_first is not None:
            inside = self._flags("is_first", batch.is_first) & (steps > 0) & self.valid
            for i in np.flatnonzero(inside.any(axis=1)):
                self.wrong.append(f"row {i}: another episode begins at step {inside[i].argmax()}; expected one episode")
        if not self.wrong:
            self.ends = ends[np.arange(rows), lengths - 1]

    def _flags(self, name: str, value: Any) -> np.ndarray:
        array, shape = _array(value), (self.batch_size, self.longest)
        if array.shape == shape and array.dtype == bool:
            return array
        self.wrong.append(f"{name} has shape {array.shape} and dtype {array.dtype}; expected {shape} bool")
        return np.zeros(shape, bool)

    def _check_values(self, batch: Batch) -> None:
        if self.wrong:
            return
        if not np.isfinite(_array(batch.reward).astype(np.float32)[self.valid]).all():
            self.wrong.append("reward has values that are not finite float32 numbers; expected finite ones")
        priority = _array(batch.extras["priority"])[self.valid] if "priority" in batch.extras else np.zeros(1)
        if not (np.isfinite(priority) & (priority >= 0)).all():
            self.wrong.append("extras['priority'] has negative or infinite values or NaN; expected finite ones >= 0")


def _array(value: Any) -> np.ndarray:
    return value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)
