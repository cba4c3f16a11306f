"""From a `Step` to rows: one kernel call checks every array and writes all lanes."""

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np

from rlfeed.errors import ConfigError, FieldError, LaneError
from rlfeed.nest import Nest, Path, build, describe, leaves
from rlfeed.replay import kernels as k
from rlfeed.replay.device_rows import DeviceRows
from rlfeed.replay.device_writing import write_step
from rlfeed.replay.ingest import write_episodes
from rlfeed.replay.limiter import Gate
from rlfeed.replay.storage import Column, Storage
from rlfeed.specs import ArraySpec
from rlfeed.types import Batch, Step

NOBODY = 0
_FLAG = ArraySpec((), np.dtype(bool))
_CONTROL = {"env_ids": ArraySpec((), np.dtype(np.int64)), "lost": _FLAG, "is_first": _FLAG} | {
    "terminated": _FLAG,
    "truncated": _FLAG,
}
_STEP_FIELDS = ("next_observation", "action", "reward", "carry", "extras", "observation")


class Writer:
    """Write steps into lanes that nobody else writes to.

    `ReplayBuffer.writer` makes one for another process; it is sent there by pickling.

    Args:
        storage: Where to.
        lanes: Its lanes.
        owner: Its number, or `NOBODY`: lanes that no writer has claimed.
    """

    def __init__(self, storage: Storage, lanes: Sequence[int], owner: int = NOBODY) -> None:
        self._storage, self._lanes, self._owner = storage, np.array(lanes, np.int64), owner
        self._where = "Writer" if owner else "ReplayBuffer"
        self._inputs = _Inputs(storage)
        self._program = _program(storage, self._inputs, self._lanes, owner)
        self._keeps_env_action = "env_action" in storage.fields["extras"]
        self._gate = Gate(storage)

    def __getstate__(self) -> dict[str, Any]:
        return {"storage": self._storage, "lanes": self._lanes, "owner": self._owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def add(self, step: Step) -> np.ndarray:
        """Store one step; see `ReplayBuffer.add`.

        Args:
            step: k rows; ``env_ids`` are lanes of this writer, None means all of them in their order.

        Returns:
            ``[k]`` int64 ids, -1 where a row was lost.

        Raises:
            FieldError: If a field does not fit; all findings at once.
            LaneError: If a row does not continue its lane, or the lane is not this writer's.
            FeedTimeoutError: If a limiter holds writers back and the learner does not come.
        """
        if self._keeps_env_action:
            step = _with_env_action(step)
        if self._gate.active[0]:
            self._gate.wait_to_insert()
        try:
            inputs = self._inputs.read(step)
            ids = np.empty(len(step.reward), np.int64)
        except (AttributeError, LookupError, TypeError):
            return self._add_fitted(step)
        fault = k.write_step(self._program, id(inputs), id(ids))
        if fault == k.MISFIT:
            return self._add_fitted(step)
        if fault != k.STORED:
            raise self._fault(int(fault), step)
        return ids

    def _add_fitted(self, step: Step) -> np.ndarray:
        fitted = self._fit(step)
        inputs = self._inputs.read(fitted)
        ids = np.empty(len(fitted.reward), np.int64)
        fault = k.write_step(self._program, id(inputs), id(ids))
        if fault != k.STORED:
            raise self._fault(int(fault), fitted)
        return ids

    def _fit(self, step: Step) -> Step:
        """Bring a step into the shapes and dtypes of the columns, without loss, or say everything that is wrong."""
        if not isinstance(step, Step):
            raise FieldError(f"{self._where}.add: got a {type(step).__name__}; expected a Step, as Rollout gives.")
        if np.ndim(step.reward) != 1:
            raise FieldError(f"{self._where}.add: reward is {step.reward!r}; expected shape (k,), one number per row.")
        count = len(step.reward)
        if self._owner and step.env_ids is None and count != len(self._lanes):
            raise LaneError(
                f"Writer.add: has {count} rows and no env_ids; expected one row for each of the {len(self._lanes)} "
                "lanes of this writer. Name the lanes in env_ids. Nothing was stored."
            )
        wrong = self._inputs.surplus(step)
        fitted: dict[str, list[tuple[Path, np.ndarray]]] = {}
        for name, path, spec in self._inputs.declared:
            value = getattr(step, name)
            if value is None and name in ("env_ids", "lost"):
                continue
            try:
                value = _leaf(value, path)
            except (KeyError, IndexError, TypeError):
                wrong.append(f"{describe(name, path)} is missing")
                continue
            array, shape, dtype = np.asarray(value), (count, *spec.shape), spec.dtype
            if array.shape != shape:
                wrong.append(f"{describe(name, path)} has shape {array.shape}; expected {shape}")
            elif not np.can_cast(array.dtype, dtype, "safe") and (name != "reward" or array.dtype.kind not in "biuf"):
                wrong.append(f"{describe(name, path)} has dtype {array.dtype}; expected {dtype}")
            elif name == "reward" and not (np.abs(array, dtype=np.float64) <= np.finfo(np.float32).max).all():
                wrong.append(f"reward is {array}; expected finite numbers that float32 can hold")
            else:
                exact = np.ascontiguousarray(array, dtype).reshape(shape)
                fitted.setdefault(name, []).append((path, exact.view(dtype)))
        if wrong:
            raise FieldError(f"{self._where}.add: " + "; ".join(wrong) + ". Nothing was stored.")
        return Step(**{name: build(pairs) for name, pairs in fitted.items()})

    def _fault(self, fault: int, step: Step) -> LaneError | FieldError:
        row, cause = divmod(fault - 1, 8)
        lanes = self._lanes if step.env_ids is None else step.env_ids
        lane = lanes[row] if row < len(lanes) else row
        where = f"{self._where}.add: row {row}:"
        if cause == k.BAD_REWARD:
            return FieldError(f"{where} reward is {step.reward[row]}; expected a finite number. Nothing was stored.")
        if cause == k.BAD_PRIORITY:
            priority = step.extras["priority"][row]
            return FieldError(
                f"{where} extras['priority'] is {priority}; expected a finite number of at least 0. Nothing was stored."
            )
        reason = {
            k.NO_LANE: f"has {lane}; expected 0 .. {self._storage.lanes - 1}",
            k.TWICE: f"has {lane} twice; expected each environment once in a step",
            k.NOT_OPEN: f"has {lane} with is_first False, but no episode is open in that lane; expected is_first True "
            "on the first step stored and on the first after an end. Store a rollout from its beginning; in a loop of "
            "your own set is_first where an episode begins",
            k.NOT_OWNED: self._not_owned(int(lane)),
        }[cause]
        return LaneError(f"{where} env_ids {reason}. Nothing was stored.")

    def _not_owned(self, lane: int) -> str:
        if lane not in self._lanes:
            return f"has {lane}, which is not this writer's; expected one of its lanes, {self._lanes.tolist()}"
        if self._owner:
            return (
                f"has {lane}, which was released; expected lanes that this writer has claimed. Ask the buffer for a "
                "new writer"
            )
        return (
            f"has {lane}, which a writer has claimed; expected lanes that nobody has. Call release([{lane}]) when that "
            "writer has left"
        )

    def extend(self, batch: Batch) -> np.ndarray:
        """Store whole episodes; see `ReplayBuffer.extend`.

        Args:
            batch: Padded episodes.

        Returns:
            ``[B]`` int64 ids of their first steps.

        Raises:
            FieldError: If a field does not fit, or an episode is not whole.
            CapacityError: If an episode is longer than a lane.
            LaneError: If an episode is open in every lane of this writer.
        """
        return write_episodes(self._storage, self._lanes.tolist(), self._owner, batch, f"{self._where}.extend")

    def cut(self) -> int:
        """End the open episodes of its lanes without an end.

        Returns:
            How many were open.

        Raises:
            LaneError: If a lane was released.
        """
        return cut_lanes(self._storage, self._lanes.tolist(), self._owner, f"{self._where}.cut")

    def close(self) -> None:
        """Cut what is open and let the lanes go; what was released before stays as it is."""
        heads = self._storage.heads()
        release_lanes(self._storage, [lane for lane in self._lanes.tolist() if heads[-1, lane] == self._owner])


class DeviceWriter(Writer):
    """Write steps into lanes whose rows lie on a device.

    Args:
        storage: Where to.
        device: Its rows.
        lanes: Its lanes.
        owner: Its number, or `NOBODY`.
    """

    def __init__(self, storage: Storage, device: DeviceRows, lanes: Sequence[int], owner: int) -> None:
        super().__init__(storage, lanes, owner)
        self._device = device

    def add(self, step: Step) -> np.ndarray:
        """Store one step; see `Writer.add`."""
        device = self._device
        device.check_process()
        if self._keeps_env_action:
            step = _with_env_action(step)
        if self._gate.active[0]:  # before the lock: the learner, who opens it, needs the lock too
            self._gate.wait_to_insert()
        with device.lock:
            ids = self._add_fitted(step)
            write_step(self._storage, device, step, ids)
        return ids

    def extend(self, batch: Batch) -> np.ndarray:
        """Store whole episodes; see `Writer.extend`."""
        self._device.check_process()
        with self._device.lock:
            return super().extend(batch)


def writer_for(storage: Storage, lanes: Sequence[int], owner: int = NOBODY) -> Writer:
    """Make a writer, wherever the rows lie.

    Args:
        storage: Where to.
        lanes: Its lanes.
        owner: Its number, or `NOBODY`.

    Returns:
        The writer.
    """
    if storage.device is not None:
        return DeviceWriter(storage, storage.device, lanes, owner)
    return Writer(storage, lanes, owner)


def claim_lanes(storage: Storage, lanes: list[int]) -> Writer:
    """Claim lanes for a new writer.

    Args:
        storage: Whose lanes.
        lanes: Which.

    Returns:
        The writer.

    Raises:
        ConfigError: If there is none, or one is named twice.
        LaneError: If another writer has one of them.
    """
    if not lanes or len(set(lanes)) != len(lanes):
        raise ConfigError(f"ReplayBuffer.writer: env_ids is {lanes}; expected at least one lane, each once.")
    check_lanes(storage, lanes, "ReplayBuffer.writer")
    owner = int(k.count_up(int(storage.plan[k.SHARED]) + k.LAST_OWNER * 8))
    for number, lane in enumerate(lanes):
        if k.claim_lane(storage.plan, lane, NOBODY, owner) != NOBODY:
            for claimed in lanes[:number]:
                k.claim_lane(storage.plan, claimed, owner, NOBODY)
            raise LaneError(
                f"ReplayBuffer.writer: lane {lane} has a writer; expected lanes that nobody has. Call "
                f"release([{lane}]) when that writer has left."
            )
    return writer_for(storage, lanes, owner)


def release_lanes(storage: Storage, lanes: list[int]) -> int:
    """Cut what is open and free lanes whose writer has left or died.

    Args:
        storage: Whose lanes.
        lanes: Which.

    Returns:
        How many episodes were open.
    """
    check_lanes(storage, lanes, "ReplayBuffer.release")
    return sum(int(k.free_lane(storage.plan, lane)) for lane in lanes)


def cut_lanes(storage: Storage, lanes: list[int], owner: int, where: str) -> int:
    """End open episodes without an end.

    Args:
        storage: Whose lanes.
        lanes: Which.
        owner: Who has them.
        where: Who asks, for an error.

    Returns:
        How many were open.

    Raises:
        LaneError: If there is no such lane, or it is somebody else's.
    """
    check_lanes(storage, lanes, where)
    others = [lane for lane in lanes if storage.heads()[-1, lane] != owner]
    if others:
        raise LaneError(
            f"{where}: env_ids has {others}, which " + ("were released" if owner else "a writer has claimed") + "; "
            "expected lanes of one's own. Call release(env_ids) when their writer has left."
        )
    return sum(int(k.cut_lane(storage.plan, lane)) for lane in lanes)


def check_lanes(storage: Storage, lanes: list[int], where: str) -> None:
    """Refuse lanes that are not there.

    Args:
        storage: Whose lanes.
        lanes: Which.
        where: Who asks, for the error.

    Raises:
        LaneError: If one is not.
    """
    for lane in lanes:
        if not 0 <= lane < storage.lanes:
            raise LaneError(f"{where}: env_ids has {lane}; expected 0 .. {storage.lanes - 1}.")


class _Inputs:
    """Say what arrays a step must have, in the order of the writer's tables, and collect them."""

    def __init__(self, storage: Storage) -> None:
        extras = dict(storage.fields["extras"])
        if "priority" in storage.fields:
            extras["priority"] = storage.fields["priority"]
        nests: dict[str, Nest] = storage.fields | {"extras": extras}
        nests["next_observation"] = nests["observation"]
        self.nests = {name: nests[name] for name in _STEP_FIELDS if name in nests} | _CONTROL
        self.declared = [(name, path, spec) for name, nest in self.nests.items() for path, spec in leaves(nest)]
        stored = [(name, _column(storage, name, path)) for name, path, _ in self.declared if name not in _CONTROL]
        self.columns = [(i, name, column) for i, (name, column) in enumerate(stored) if not column.on_device]
        read = {name: nest for name, nest in self.nests.items() if nest != {}}
        self._get = attrgetter(*read)
        self._deep = [(i, nest) for i, nest in enumerate(read.values()) if not isinstance(nest, ArraySpec)]
        self._no_extras = not extras

    def read(self, step: Step) -> tuple[Any, ...]:
        """Collect the arrays of a step; raises LookupError or TypeError where its nests are not the declared ones."""
        values = self._get(step)
        if self._no_extras and step.extras:
            raise LookupError
        if not self._deep:
            return values
        collected, begin = [], 0
        for at, spec in self._deep:
            collected += values[begin:at]
            _collect(spec, values[at], collected)
            begin = at + 1
        collected += values[begin:]
        return tuple(collected)

    def surplus(self, step: Step) -> list[str]:
        """Say what a step has that was not declared."""
        wrong = []
        for name, nest in self.nests.items():
            value = getattr(step, name)
            if name == "extras":
                wrong += [f"extras[{key!r}] is not declared" for key in value if key not in nest]
            elif isinstance(nest, dict | tuple) and isinstance(value, dict | tuple) and len(value) > len(nest):
                wrong.append(f"{name} has {len(value)} entries; expected {len(nest)}")
        return wrong


def _collect(spec: Nest, value: Any, out: list[Any]) -> None:
    if isinstance(spec, ArraySpec):
        out.append(value)
        return
    if len(value) != len(spec):
        raise LookupError
    for key, part in spec.items() if isinstance(spec, dict) else enumerate(spec):
        _collect(part, value[key], out)


def _column(storage: Storage, name: str, path: Path) -> Column:
    if (name, path) == ("extras", ("priority",)):
        return storage.column("priority")
    return storage.column("observation" if name == "next_observation" else name, path)


def _program(storage: Storage, inputs: _Inputs, lanes: np.ndarray, owner: int) -> np.ndarray:
    """Write down everything that the kernel must know of this writer; see `rlfeed.replay.kernels.write`."""

    def role(name: str, column: Column) -> int:
        if name in ("observation", "next_observation"):
            return k.ROLE_OBSERVATION if name == "observation" else k.ROLE_SUCCESSOR
        return k.ROLE_STEP if column.every == 1 else k.ROLE_CARRY

    fields = storage.table([(column, role(name, column)) for _, name, column in inputs.columns])
    fields[:, k.OTHER] = [i for i, _, _ in inputs.columns]
    places = [name if path != ("priority",) else "priority" for name, path, _ in inputs.declared]
    specs = [spec for _, _, spec in inputs.declared]
    expects = np.zeros((len(specs), k.EXPECT_SIZE), np.int64)
    sizes = np.zeros(k.SIZES, np.int64)
    sizes[k.WRITTEN], sizes[k.INPUTS] = len(fields), len(specs)
    sizes[k.OWNER], sizes[k.OWN_LANES], sizes[k.OWN_COUNT] = owner, lanes.ctypes.data, len(lanes)
    sizes[k.REWARD_INPUT] = places.index("reward")
    sizes[k.PRIORITY_INPUT] = places.index("priority") if "priority" in places else -1
    tables = [sizes, np.array(k.runtime(), np.int64), storage.plan, expects.ravel(), fields.ravel()]
    at = sum(map(len, tables))
    for line, spec in zip(expects, specs, strict=True):
        line[:] = k.kind_word(spec.dtype), len(spec.shape), at
        tables.append(np.array(spec.shape, np.int64))
        at += len(spec.shape)
    return np.concatenate(tables)


def _with_env_action(step: Step) -> Step:
    """Put what the environments got where the other declared columns are; a rollout that is strict gives none."""
    env_action = getattr(step, "env_action", None)
    return step if env_action is None else replace(step, extras={**step.extras, "env_action": env_action})


def _leaf(value: Any, path: Path) -> Any:
    for part in path:
        value = value[part]
    return value
