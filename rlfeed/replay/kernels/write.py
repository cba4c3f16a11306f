"""From steps to rows: checked first, then reserved, written and committed for all lanes at once."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.rows import (
    BASE,
    CARRY_EVERY,
    CLOSING,
    COMMITTED,
    CUT,
    DIRECTORY,
    ENTRIES,
    EPISODES,
    FIRST,
    FLAGS,
    INDEX_SHIFT,
    LANE_SHIFT,
    LANES,
    NBYTES,
    ORDINAL,
    OTHER,
    PITCH,
    RECORDS,
    RESERVED,
    ROLE,
    ROLE_CARRY,
    ROLE_SUCCESSOR,
    ROWS,
    STEPS,
    STRIDE,
    TERMINATED,
    TRUNCATED,
    carry_entry,
    index_of,
    is_open,
    next_index,
    record_of,
)
from rlfeed.replay.kernels.words import (
    copy_row,
    fence,
    kernel,
    load_acquire,
    load_i64,
    load_u8,
    store_release,
    store_u8,
    store_u32,
)


@njit
def close_open(plan: np.ndarray, lane: int) -> None:
    """Close a lane's open row: the episode was cut, its last complete step keeps both flags False."""
    record = record_of(plan, lane, load_acquire(plan[COMMITTED] + lane * 8) - 1)
    store_u8(record + FLAGS, np.uint8(load_u8(record + FLAGS) | CLOSING | CUT))


@njit
def find_fault(plan: np.ndarray, count: int, lanes: int, first: int, lost: int) -> int:
    """Find the first row of a step that does not continue its lane: ``4 * i + cause``, or -1 where all do.

    Causes: 0 no such lane, 1 the lane twice, 2 no episode is open.
    """
    highest = np.int64(-1)
    for i in range(count):
        lane = load_i64(lanes + i * 8)
        if lane < 0 or lane >= plan[LANES]:
            return 4 * i
        if lane > highest:
            highest = lane
        else:  # out of order: look at all before it
            for j in range(i):
                if load_i64(lanes + j * 8) == lane:
                    return 4 * i + 1
        gone = lost != 0 and load_u8(lost + i) != 0
        if not gone and not load_u8(first + i) and not is_open(plan, lane):
            return 4 * i + 2
    return -1


@kernel("int64(int64[::1], int64[:, ::1], int64[:, ::1], int64[::1], int64, int64[::1])")
def write_step(
    plan: np.ndarray, fields: np.ndarray, opening: np.ndarray, inputs: np.ndarray, count: int, ids: np.ndarray
) -> int:
    """Store one step of each lane: its part of the open row, and the next row with the successor's observation.

    Args:
        plan: The storage.
        fields: Field table of what each step writes; OTHER is the input's index, ROLE tells the row.
        opening: Field table of the observation that opens an episode; OTHER is the input's index.
        inputs: Where each input's address is kept; the last five: env_ids, is_first, terminated, truncated, lost (0
            where nothing was lost).
        count: Rows.
        ids: ``[count]``: receives the ids, -1 where a row was lost.

    Returns:
        -1; or what `find_fault` found, and then nothing has been written.
    """
    lanes, first, lost = load_i64(inputs[-5]), load_i64(inputs[-4]), np.int64(0)
    terminated, truncated = load_i64(inputs[-3]), load_i64(inputs[-2])
    if inputs[-1] != 0:
        lost = load_i64(inputs[-1])
    fault = find_fault(plan, count, lanes, first, lost)
    if fault >= 0:
        return fault
    rows = plan[ROWS]
    for i in range(count):
        lane = load_i64(lanes + i * 8)
        head = load_acquire(plan[COMMITTED] + lane * 8)
        opens = load_u8(first + i) != 0
        gone = lost != 0 and load_u8(lost + i) != 0
        if (opens or gone) and is_open(plan, lane):  # the episode before was left without an end
            close_open(plan, lane)
        row = np.int64(-1)
        if not gone:
            row = head if opens else head - 1
            # Never back: rows that a writer was killed over, or that a checkpoint lost, stay given up.
            store_release(plan[RESERVED] + lane * 8, max(row + 2, load_acquire(plan[RESERVED] + lane * 8)))
        ids[i] = row
    fence()
    for i in range(count):
        row = ids[i]
        if row < 0:
            continue
        lane = load_i64(lanes + i * 8)
        opens = load_u8(first + i) != 0
        ordinal = load_acquire(plan[EPISODES] + lane * 8) - (0 if opens else 1)
        slot = row % rows
        here = lane * rows + slot
        there = here + 1 if slot + 1 < rows else lane * rows
        ends = np.uint8(TERMINATED * (load_u8(terminated + i) != 0) + TRUNCATED * (load_u8(truncated + i) != 0))
        record = plan[RECORDS] + here * plan[STRIDE]
        index = np.int64(0)
        if opens:
            store_u32(record + ORDINAL, np.uint32(ordinal))
            store_u32(plan[DIRECTORY] + (lane * plan[ENTRIES] + ordinal % plan[ENTRIES]) * 4, np.uint32(slot))
            for f in range(opening.shape[0]):
                nbytes = opening[f, NBYTES]
                source = load_i64(inputs[opening[f, OTHER]]) + i * nbytes
                copy_row(opening[f, BASE] + here * opening[f, PITCH], source, nbytes)
            store_u32(record + FLAGS, np.uint32(FIRST | ends))
        else:
            index = index_of(record)
            store_u8(record + FLAGS, np.uint8((load_u8(record + FLAGS) & FIRST) | ends))
        for f in range(fields.shape[0]):
            nbytes = fields[f, NBYTES]
            place = there if fields[f, ROLE] == ROLE_SUCCESSOR else here
            if fields[f, ROLE] == ROLE_CARRY:
                if index == 0 or index % plan[CARRY_EVERY] != 0:
                    continue
                place = carry_entry(plan, lane, row)
            source = load_i64(inputs[fields[f, OTHER]]) + i * nbytes
            copy_row(fields[f, BASE] + place * fields[f, PITCH], source, nbytes)
        record = plan[RECORDS] + there * plan[STRIDE]
        store_u32(record + ORDINAL, np.uint32(ordinal))
        following = np.uint32(next_index(plan, index)) << np.uint32(INDEX_SHIFT)
        store_u32(record + FLAGS, following | np.uint32(CLOSING | ends if ends else 0))
    for i in range(count):
        row = ids[i]
        if row < 0:
            continue
        lane = load_i64(lanes + i * 8)
        if load_u8(first + i):
            store_release(plan[EPISODES] + lane * 8, load_acquire(plan[EPISODES] + lane * 8) + 1)
        store_release(plan[STEPS] + lane * 8, load_acquire(plan[STEPS] + lane * 8) + 1)
        store_release(plan[COMMITTED] + lane * 8, row + 2)
        ids[i] = (lane << LANE_SHIFT) | row
    return -1


@kernel("int64(int64[::1], int64)")
def cut_lane(plan: np.ndarray, lane: int) -> int:
    """Close a lane's open row, if it has one.

    Args:
        plan: The storage.
        lane: Which.

    Returns:
        1 where an episode was cut, 0 where none was open.
    """
    if not is_open(plan, lane):
        return 0
    close_open(plan, lane)
    fence()
    return 1
