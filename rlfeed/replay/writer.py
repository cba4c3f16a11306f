"""From a `Step` to rows: check every field at the boundary, then one kernel call writes all lanes."""

import ctypes
from typing import Any

import numpy as np

from rlfeed.errors import FieldError, LaneError
from rlfeed.nest import Path, build, describe
from rlfeed.replay import kernels as k
from rlfeed.replay.storage import Storage
from rlfeed.types import Step

_BOOL, _INT64, _FLOAT32 = np.dtype(bool), np.dtype(np.int64), np.dtype(np.float32)
# NumPy's C ABI: an array object is the object head, then the pointer to its data. The kernel follows that pointer
# itself, which costs nothing; asking Python for it (array.ctypes.data) costs 0.7 us an array, more than all the rest.
_POINTER = object.__basicsize__
_probe = np.empty(1)
if ctypes.c_void_p.from_address(id(_probe) + _POINTER).value != _probe.ctypes.data:
    raise ImportError(
        "rlfeed.replay: this NumPy lays out its arrays in a way that rlfeed does not know. Use NumPy 1.26 to 2.x."
    )


class StepWriter:
    """Write steps into lanes; one writer per lane.

    Args:
        storage: Where to.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        opening = storage.columns_of("observation")
        written = [("next_observation", column, k.ROLE_SUCCESSOR) for column in opening]
        for name in ("action", "reward", "carry", "extras"):
            columns = storage.columns_of(name)
            written += [(name, c, k.ROLE_STEP if c.every == 1 else k.ROLE_CARRY) for c in columns]
        self._fields = storage.table([(column, role) for _, column, role in written])
        self._opening = storage.table([(column, k.ROLE_STEP) for column in opening])
        self._fields[:, k.OTHER] = np.arange(len(written))
        self._opening[:, k.OTHER] = np.arange(len(opening)) + len(written)
        self._declared = [(name, column.path, column.spec.shape, column.spec.dtype) for name, column, _ in written]
        self._declared += [("observation", column.path, column.spec.shape, column.spec.dtype) for column in opening]
        self._declared += [("env_ids", (), (), _INT64)]
        self._declared += [(name, (), (), _BOOL) for name in ("is_first", "terminated", "truncated", "lost")]
        self._extras, self._keys = len(storage.fields["extras"]), _keys(storage.fields["observation"])
        self._inputs = np.zeros(len(self._declared), np.int64)
        self._expected: dict[int, list[tuple[str, Path, tuple[int, ...], np.dtype]]] = {}
        self._lanes: dict[int, np.ndarray] = {}

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
        if not isinstance(step, Step):
            raise FieldError(f"ReplayBuffer.add: got a {type(step).__name__}; expected a Step, as Rollout gives.")
        if getattr(step.reward, "ndim", None) != 1 and np.ndim(step.reward) != 1:
            raise FieldError(f"ReplayBuffer.add: reward is {step.reward!r}; expected shape (k,), one number per row.")
        count = len(step.reward)
        alive: list[np.ndarray | None] = []  # the kernel follows pointers into these
        if not self._point(step, count, alive):
            step = self._fit(step, count)
            self._point(step, count, alive)
        self._inputs[:] = [id(array) + _POINTER if array is not None else 0 for array in alive]
        ids = np.empty(count, np.int64)
        fault = k.write_step(self._storage.plan, self._fields, self._opening, self._inputs, count, ids)
        if fault >= 0:
            raise self._lane_error(int(fault), step.env_ids)
        return ids

    def _point(self, step: Step, count: int, alive: list[np.ndarray | None]) -> bool:
        """Collect every input, or tell that one is not exactly what its column stores."""
        expected = self._expected.get(count)
        if expected is None:
            expected = [(name, path, (count, *shape), dtype) for name, path, shape, dtype in self._declared]
            self._expected[count], self._lanes[count] = expected, np.arange(count)
        alive.clear()
        if len(step.extras) != self._extras or _keys(step.observation) != self._keys:
            return False
        for name, path, shape, dtype in expected:
            value = getattr(step, name)
            if path:
                try:
                    value = _leaf(value, path)
                except (KeyError, IndexError, TypeError):
                    return False
            if type(value) is np.ndarray:
                if value.shape != shape or value.dtype != dtype or not value.flags.c_contiguous:
                    return False
            elif value is not None or name not in ("env_ids", "lost"):
                return False
            elif name == "env_ids":
                value = self._lanes[count]
            alive.append(value)
        return True

    def _fit(self, step: Step, count: int) -> Step:
        """Bring a step into the shapes and dtypes of the columns, without loss, or say everything that is wrong."""
        declared = self._storage.fields["extras"]
        wrong = [f"extras[{name!r}] is not declared" for name in step.extras if name not in declared]
        if _keys(step.observation) != self._keys:
            wrong.append(f"observation has {_keys(step.observation)} entries; expected {self._keys}")
        fitted: dict[str, list[tuple[Path, np.ndarray]]] = {}
        for name, path, shape, dtype in self._expected[count]:
            value = getattr(step, name)
            if value is None and name in ("env_ids", "lost"):
                continue
            try:
                value = _leaf(value, path)
            except (KeyError, IndexError, TypeError):
                wrong.append(f"{describe(name, path)} is missing")
                continue
            array = np.asarray(value)
            if array.shape != shape:
                wrong.append(f"{describe(name, path)} has shape {array.shape}; expected {shape}")
            elif not np.can_cast(array.dtype, dtype, "safe") and (name != "reward" or array.dtype.kind not in "biuf"):
                wrong.append(f"{describe(name, path)} has dtype {array.dtype}; expected {dtype}")
            elif name == "reward" and not (np.abs(array, dtype=np.float64) <= np.finfo(np.float32).max).all():
                wrong.append(f"reward is {array}; expected finite numbers that float32 can hold")
            else:
                fitted.setdefault(name, []).append((path, np.ascontiguousarray(array, dtype).reshape(shape)))
        if wrong:
            raise FieldError("ReplayBuffer.add: " + "; ".join(wrong) + ". Nothing was stored.")
        return Step(**{name: build(pairs) for name, pairs in fitted.items()})

    def _lane_error(self, fault: int, env_ids: np.ndarray | None) -> LaneError:
        row, cause = divmod(fault, 4)
        lane = row if env_ids is None else env_ids[row]
        reason = (
            f"has {lane}; expected 0 .. {self._storage.lanes - 1}",
            f"has {lane} twice; expected each environment once in a step",
            f"has {lane} with is_first False, but no episode is open in that lane; expected is_first True on the first "
            "step stored and on the first after an end. Store a rollout from its beginning; in a loop of your own set "
            "is_first where an episode begins",
        )[cause]
        return LaneError(f"ReplayBuffer.add: row {row}: env_ids {reason}. Nothing was stored.")


def _keys(nest: Any) -> int:
    return len(nest) if isinstance(nest, dict | tuple) else 0


def _leaf(value: Any, path: Path) -> Any:
    for part in path:
        value = value[part]
    return value
