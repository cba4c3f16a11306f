"""From a `Step` to rows: check every field at the boundary, then one kernel call writes all lanes."""

from typing import Any

import numpy as np

from rlfeed.errors import FieldError, LaneError
from rlfeed.nest import Nest, Path, describe, leaves
from rlfeed.replay import kernels as k
from rlfeed.replay.storage import Column, Storage
from rlfeed.types import Step

_BOOL = np.dtype(bool)
_INT64 = np.dtype(np.int64)


class StepWriter:
    """Write steps into lanes; one writer per lane.

    Args:
        storage: Where to.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lanes = np.arange(storage.lanes)
        opening = storage.columns_of("observation")
        inputs = [(column, "next_observation", k.ROLE_SUCCESSOR) for column in opening]
        for name in ("action", "reward", "carry", "extras"):
            columns = [storage.column("reward")] if name == "reward" else storage.columns_of(name)
            inputs += [(column, name, k.ROLE_STEP) for column in columns]
        self._opening_columns = opening
        self._inputs = [(column, name) for column, name, _ in inputs]
        self._table = storage.table([(column, role) for column, _, role in inputs])
        self._opening_table = storage.table([(column, k.ROLE_STEP) for column in opening])

    def write(self, step: Step) -> np.ndarray:
        """Check a step and store it.

        Args:
            step: k rows.

        Returns:
            ``[k]`` int64 ids, -1 where a row was lost.

        Raises:
            FieldError: If a field does not fit; all findings at once.
            LaneError: If a row does not continue its lane.
        """
        arrays = self._arrays(step)
        count = len(arrays["reward", ()])
        ids = np.empty(count, np.int64)
        lanes, first, lost = arrays["env_ids", ()], arrays["is_first", ()], arrays.get(("lost", ()))
        lanes_at, first_at, lost_at = _address(lanes), _address(first), 0 if lost is None else _address(lost)
        wrong = k.check_step(self._storage.plan, count, lanes_at, first_at, lost_at)
        if wrong >= 0:
            raise self._lane_error(int(wrong), lanes)
        for line, (column, name) in zip(self._table, self._inputs, strict=True):
            line[k.OTHER] = _address(arrays[name, column.path])
        if first.any():
            for line, column in zip(self._opening_table, self._opening_columns, strict=True):
                line[k.OTHER] = _address(arrays["observation", column.path])
        k.write_step(
            self._storage.plan, self._table, self._opening_table, count, lanes_at, first_at,
            _address(arrays["terminated", ()]), _address(arrays["truncated", ()]), lost_at, _address(ids),
        )  # fmt: skip
        return ids

    def _arrays(self, step: Step) -> dict[tuple[str, Path], np.ndarray]:
        count, wrong = len(step.reward), []
        arrays: dict[tuple[str, Path], np.ndarray] = {}
        given: dict[str, Nest] = {
            "observation": step.observation,
            "next_observation": step.next_observation,
            "action": step.action,
            "carry": step.carry,
            "extras": step.extras,
        }
        for name, nest in given.items():
            columns = self._storage.columns_of("observation" if name == "next_observation" else name)
            found = dict(leaves(nest)) if columns else {}
            for column in columns:
                if column.path not in found:
                    wrong.append(f"{describe(name, column.path)} is missing")
                    continue
                fitted = _fit(found[column.path], (count, *column.spec.shape), column.spec.dtype)
                if isinstance(fitted, str):
                    wrong.append(f"{describe(name, column.path)} {fitted}")
                else:
                    arrays[name, column.path] = fitted
        flags = {"terminated": step.terminated, "truncated": step.truncated, "is_first": step.is_first, "lost": step.lost}
        plain = [(name, value, _BOOL) for name, value in flags.items() if value is not None]
        plain.append(("env_ids", self._lanes[:count] if step.env_ids is None else step.env_ids, _INT64))
        plain.append(("reward", np.asarray(step.reward, np.float32), np.dtype(np.float32)))
        for name, value, dtype in plain:
            fitted = _fit(value, (count,), dtype)
            if isinstance(fitted, str):
                wrong.append(f"{name} {fitted}")
            else:
                arrays[name, ()] = fitted
        if wrong:
            raise FieldError("ReplayBuffer.add: " + "; ".join(wrong) + ". Nothing was stored.")
        return arrays

    def _lane_error(self, code: int, lanes: np.ndarray) -> LaneError:
        row, cause = divmod(code, 4)
        lane = lanes[row]
        reason = (
            f"has {lane}; expected 0 .. {self._storage.lanes - 1}",
            f"has {lane} twice; expected each environment once in a step",
            f"has {lane} with is_first False, but no episode is open in that lane; expected is_first True on the first "
            "step after an end. Set is_first where an episode begins",
        )[cause]
        return LaneError(f"ReplayBuffer.add: row {row}: env_ids {reason}. Nothing was stored.")


def _fit(value: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | str:
    """Give the value as a dense array of this shape and dtype, or say why it cannot be without loss."""
    array = value if type(value) is np.ndarray else np.asarray(value)
    if array.shape != shape:
        return f"has shape {array.shape}; expected {shape}"
    if array.dtype != dtype:
        if not np.can_cast(array.dtype, dtype, "safe"):
            return f"has dtype {array.dtype}; expected {dtype}"
        return array.astype(dtype)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
