"""Recurrent state that the learner writes back: an overlay that readers prefer where it is for their row.

Rows have one writer, the actor; the overlay has another one, the learner, and rewrites entries in place. So each entry
has a version word, odd while it is written, and the absolute row it is for (plus 1: 0 is nobody's). A reader compares
the version before and after its copy: the row alone lets torn values through, because a second write-back to a row
matches it all the while.
"""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.rows import (
    BASE,
    CARRY_EVERY,
    CLOSING,
    COMMITTED,
    FIRST,
    FLAGS,
    INSIDE,
    LANE_SHIFT,
    LANES,
    NBYTES,
    OTHER,
    OVERLAY,
    OVERLAY_PITCH,
    PITCH,
    ROLE,
    ROLE_CARRY,
    ROW_MASK,
    SHARED,
    WRITTEN_BACK,
    carry_entry,
    index_of,
    is_stale,
    record_of,
)
from rlfeed.replay.kernels.words import (
    copy_row,
    fence,
    kernel,
    load_acquire,
    load_i64,
    load_u8,
    memzero,
    store_i64,
    store_release,
)

VERSION, ROW = 0, 8  # of an overlay entry; the leaves lie behind
PATIENCE = 1 << 16  # looks at an entry that is being written: its writer may have been killed


@njit
def read_written_back(plan: np.ndarray, fields: np.ndarray, block: int, i: int, row: int, entry: int) -> bool:
    """Copy the carry that the learner has written back for a row, or tell that there is none."""
    source = plan[OVERLAY] + entry * plan[OVERLAY_PITCH]
    for _ in range(PATIENCE):
        version = load_acquire(source + VERSION)
        if version & 1:
            continue
        if load_i64(source + ROW) != row + 1:
            return False
        for f in range(fields.shape[0]):
            if fields[f, ROLE] == ROLE_CARRY:
                nbytes = fields[f, NBYTES]
                copy_row(block + fields[f, OTHER] + i * nbytes, source + fields[f, INSIDE], nbytes)
        fence()
        if load_acquire(source + VERSION) == version:
            return True
    return False


@njit
def read_carry(plan: np.ndarray, fields: np.ndarray, block: int, i: int, lane: int, row: int) -> None:
    """Store the carry before a row's observation: zeros where it opens an episode, the learner's if there is one.

    Args:
        plan: The storage.
        fields: Field table; only lines of ROLE_CARRY are read. OTHER is the field's offset in the block.
        block: Address of the block.
        i: The row of the batch.
        lane: The lane.
        row: The absolute row, on the grid of CARRY_EVERY; the caller checks afterwards that it was not overwritten.
    """
    if load_u8(record_of(plan, lane, row) + FLAGS) & FIRST:
        for f in range(fields.shape[0]):
            if fields[f, ROLE] == ROLE_CARRY:
                memzero(block + fields[f, OTHER] + i * fields[f, NBYTES], fields[f, NBYTES])
        return
    entry = carry_entry(plan, lane, row)
    if load_acquire(plan[SHARED] + WRITTEN_BACK * 8) and read_written_back(plan, fields, block, i, row, entry):
        return
    for f in range(fields.shape[0]):
        if fields[f, ROLE] == ROLE_CARRY:
            nbytes = fields[f, NBYTES]
            copy_row(block + fields[f, OTHER] + i * nbytes, fields[f, BASE] + entry * fields[f, PITCH], nbytes)


@njit
def find_carry_fault(plan: np.ndarray, ids: np.ndarray) -> int:
    """Find the first id that can have no carry: ``2 * i + cause``, or -1.

    Causes: 0 no step of that id was ever stored, 1 no carry is stored at that step.
    """
    for i in range(len(ids)):
        lane, row = ids[i] >> LANE_SHIFT, ids[i] & ROW_MASK
        if ids[i] < 0 or lane >= plan[LANES] or row >= load_acquire(plan[COMMITTED] + lane * 8) - 1:
            return 2 * i
        record = record_of(plan, lane, row)
        closing, index = load_u8(record + FLAGS) & CLOSING, index_of(record)
        fence()
        if not is_stale(plan, lane, row):
            if closing:
                return 2 * i
            if index % plan[CARRY_EVERY] != 0:
                return 2 * i + 1
    return -1


@kernel("int64(int64[::1], int64[:, ::1], int64[::1], int64[::1])")
def write_back(plan: np.ndarray, fields: np.ndarray, ids: np.ndarray, out: np.ndarray) -> int:
    """Write carries into the overlay, in order: the last one of a step that is named twice stays.

    Args:
        plan: The storage.
        fields: Field table of the carry; OTHER is the address of the values, ``[B, ...]``.
        ids: ``[B]``.
        out: ``[2]``: receives how many were applied and how many were stale; first steps of episodes are neither, their
            carry is zeros.

    Returns:
        -1; or what `find_carry_fault` found, and then nothing has been written.
    """
    fault = find_carry_fault(plan, ids)
    if fault >= 0:
        return fault
    out[:] = 0
    for i in range(len(ids)):
        lane, row = ids[i] >> LANE_SHIFT, ids[i] & ROW_MASK
        if is_stale(plan, lane, row):
            out[1] += 1
            continue
        if load_u8(record_of(plan, lane, row) + FLAGS) & FIRST:
            continue
        target = plan[OVERLAY] + carry_entry(plan, lane, row) * plan[OVERLAY_PITCH]
        version = load_acquire(target + VERSION) | 1  # odd already where a learner was killed in the middle
        store_release(target + VERSION, version)
        fence()
        store_i64(target + ROW, row + 1)
        for f in range(fields.shape[0]):
            nbytes = fields[f, NBYTES]
            copy_row(target + fields[f, INSIDE], fields[f, OTHER] + i * nbytes, nbytes)
        store_release(target + VERSION, version + 1)
        out[0] += 1
    return -1
