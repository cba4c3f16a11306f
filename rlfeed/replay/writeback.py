"""What a learner writes back into stored steps: the recurrent state, beside the actor's, never over it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from rlfeed.errors import FieldError, UnsupportedError
from rlfeed.nest import describe, leaves
from rlfeed.replay import kernels as k
from rlfeed.replay.storage import Storage

_WHERE = "ReplayBuffer.update"


def write_back(storage: Storage, ids: Any, columns: Mapping[str, Any]) -> int:
    """Write columns back; one process at a time does so, the learner.

    Args:
        storage: What holds the steps.
        ids: ``[B]`` int64, of steps.
        columns: ``carry`` alone: ``[B, ...]`` per leaf.

    Returns:
        How many were applied. Stale ids are dropped and counted; first steps of episodes keep their zeros.

    Raises:
        UnsupportedError: If the rows lie on a device.
        FieldError: If ids or values are not what was declared; nothing has been written then.
        CapacityError: If there is no memory for what is written back, at the first call.
    """
    if storage.device is not None:
        raise UnsupportedError(
            f"{_WHERE}: the buffer has storage='cuda'; expected 'shared', 'private' or 'memmap' where carries are "
            "written back. Use one of them with DeviceFeed."
        )
    ids = _ids(ids)
    values = _values(storage, columns, len(ids))
    storage.reserve_overlay()
    table = storage.table([(column, k.ROLE_CARRY) for column in storage.columns_of("carry")])
    table[:, k.OTHER] = [value.ctypes.data for value in values]
    out = np.zeros(2, np.int64)
    fault = int(k.write_back(storage.plan, table, ids, out))
    if fault >= 0:
        raise _fault(storage, int(ids[fault // 2]), fault)
    storage.words(k.STALE_UPDATES, k.STALE_UPDATES + 1)[0] += out[1]
    return int(out[0])


def _ids(ids: Any) -> np.ndarray:
    array = _array(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not np.can_cast(array.dtype, np.int64, "safe"):
        raise FieldError(
            f"{_WHERE}: ids has shape {array.shape} and dtype {array.dtype}; expected (B,) int64. Pass batch.ids."
        )
    return np.ascontiguousarray(array, np.int64)


def _values(storage: Storage, columns: Mapping[str, Any], count: int) -> list[np.ndarray]:
    declared = storage.columns_of("carry")
    if set(columns) != {"carry"} or not declared:
        known = "carry" if declared else "none: extras has no 'carry'"
        raise FieldError(
            f"{_WHERE}: got {sorted(columns) or 'no column'}; expected what a learner may write ({known}). Everything "
            "else is the actor's."
        )
    given, wrong, values = dict(leaves(columns["carry"])), [], []
    for column in declared:
        name, expected = describe("carry", column.path), (count, *column.spec.shape)
        if column.path not in given:
            wrong.append(f"{name} is missing")
            continue
        array = _array(given.pop(column.path))
        if array.shape != expected:
            wrong.append(f"{name} has shape {array.shape}; expected {expected}")
        elif not np.can_cast(array.dtype, column.spec.dtype, "safe"):
            wrong.append(f"{name} has dtype {array.dtype}; expected {column.spec.dtype}")
        elif not np.isfinite(array).all():
            wrong.append(f"{name} has values that are not finite; expected finite ones")
        values.append(np.ascontiguousarray(array, column.spec.dtype))
    wrong += [f"{describe('carry', path)} is not declared" for path in given]
    if wrong:
        raise FieldError(f"{_WHERE}: " + "; ".join(wrong) + ". Nothing was written.")
    return values


def _array(value: Any) -> np.ndarray:
    return value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)


def _fault(storage: Storage, identity: int, fault: int) -> FieldError:
    place = f"lane {identity >> k.LANE_SHIFT}, row {identity & k.ROW_MASK}"
    if fault % 2 == 0:
        return FieldError(
            f"{_WHERE}: ids has {identity} ({place}), which is no step of this buffer; expected ids of batches or of "
            "add. Nothing was written."
        )
    return FieldError(
        f"{_WHERE}: ids has {identity} ({place}), at which no carry is stored; expected steps whose number in their "
        f"episode is a multiple of carry_every={storage.carry_every}. Nothing was written."
    )
