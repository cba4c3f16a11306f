"""Heads and rows as a checkpoint sees them: read beside writers, and put back with all that follows from them."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np

from rlfeed.replay.kernels.rows import (
    CLOSING,
    COMMITTED,
    CUT,
    DIRECTORY,
    ENTRIES,
    EPISODES,
    FIRST,
    FLAGS,
    LANE_SHIFT,
    LANES,
    ORDINAL,
    RESERVED,
    ROWS,
    STEPS,
    TRIES,
    full_ordinal,
    record_of,
    slot_of,
)
from rlfeed.replay.kernels.words import (
    fence,
    kernel,
    load_acquire,
    load_u8,
    load_u32,
    store_release,
    store_u8,
    store_u32,
)


@kernel("void(int64[::1], int64[:, ::1])")
def snapshot_heads(plan: np.ndarray, out: np.ndarray) -> None:
    """Read the heads of every lane as they stood together, where no writer keeps its lane busy or died in a write.

    Args:
        plan: The storage.
        out: ``[4, lanes]``: receives committed, reserved, episodes, steps. The episodes are those of the committed
            rows: their count runs ahead of the head, and the next episode takes the ordinal of one that never was.
    """
    for lane in range(plan[LANES]):
        head, reserved, episodes, steps = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        for _ in range(TRIES):
            reserved = load_acquire(plan[RESERVED] + lane * 8)
            head = load_acquire(plan[COMMITTED] + lane * 8)
            steps = load_acquire(plan[STEPS] + lane * 8)
            if head > 0:
                episodes = full_ordinal(plan, lane, record_of(plan, lane, head - 1)) + 1
            fence()
            if head == reserved and load_acquire(plan[RESERVED] + lane * 8) == reserved:
                break
        out[0, lane], out[1, lane], out[2, lane], out[3, lane] = head, reserved, episodes, steps


@kernel("int64(int64[::1], int64)")
def reserved_head(plan: np.ndarray, lane: int) -> int:
    """Read how far a lane is reserved by now: call it after a copy, to learn what was overwritten meanwhile."""
    fence()
    return load_acquire(plan[RESERVED] + lane * 8)


@kernel("int64(int64[::1], int64[:, ::1])")
def restore_heads(plan: np.ndarray, heads: np.ndarray) -> int:
    """Put heads back over rows that lie in place, and rebuild the directory from the rows.

    Args:
        plan: The storage, fresh.
        heads: ``[4, lanes]``: committed, reserved, episodes, steps.

    Returns:
        -1; or the id of the first row that does not continue the one before it.
    """
    for lane in range(plan[LANES]):
        head, reserved, episodes, steps = heads[0, lane], heads[1, lane], heads[2, lane], heads[3, lane]
        tail = max(0, reserved - plan[ROWS])
        if head > 0:
            last = record_of(plan, lane, head - 1)
            if head <= tail:  # nothing of the lane could be copied before it was overwritten: it begins anew
                store_u32(last + ORDINAL, np.uint32(episodes - 1))
                store_u8(last + FLAGS, np.uint8(CLOSING | CUT))
            elif not load_u8(last + FLAGS) & CLOSING:  # its step was perhaps being written, and is to come
                store_u8(last + FLAGS, np.uint8(load_u8(last + FLAGS) & FIRST))
            if load_u32(last + ORDINAL) != np.uint32(episodes - 1):
                return (lane << LANE_SHIFT) | (head - 1)
        store_release(plan[EPISODES] + lane * 8, episodes)
        before = np.int64(-1)
        for row in range(tail, head):
            record = record_of(plan, lane, row)
            first = load_u8(record + FLAGS) & FIRST != 0
            if before >= 0:
                opens = load_u8(before + FLAGS) & CLOSING != 0
                if first != opens or first == (load_u32(record + ORDINAL) == load_u32(before + ORDINAL)):
                    return (lane << LANE_SHIFT) | row
            if first:
                ordinal = full_ordinal(plan, lane, record)
                entry = plan[DIRECTORY] + (lane * plan[ENTRIES] + ordinal % plan[ENTRIES]) * 4
                store_u32(entry, np.uint32(slot_of(plan, row)))
            before = record
        store_release(plan[STEPS] + lane * 8, steps)
        store_release(plan[RESERVED] + lane * 8, reserved)
        store_release(plan[COMMITTED] + lane * 8, head)
    return -1
