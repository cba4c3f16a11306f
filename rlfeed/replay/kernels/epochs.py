"""Each stored step once: every lane cut into windows, and what their first ones look like when all before is gone."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np

from rlfeed.replay.kernels.rows import (
    CLOSING,
    COMMITTED,
    FLAGS,
    LANE_SHIFT,
    LANES,
    LIVE,
    RESERVED,
    ROW_MASK,
    first_row,
    index_of,
    is_stale,
    last_row,
    record_of,
)
from rlfeed.replay.kernels.stacks import stack_transition
from rlfeed.replay.kernels.words import fence, kernel, load_acquire, load_u8


@kernel("int64(int64[::1], int64, int64[::1], int64[::1], int64[::1], int64[::1])")
def list_windows(
    plan: np.ndarray, length: int, heads: np.ndarray, tails: np.ndarray, ids: np.ndarray, limits: np.ndarray
) -> int:
    """Cut what is stored into windows of steps, so that each step is in one of them.

    A window ends where its episode does or the newest step is, and at every ``length``-th step of its episode: so only
    the first one of an episode whose beginning was overwritten, and the last one, are shorter.

    Args:
        plan: The storage.
        length: Steps in a window, >= 1.
        heads: ``[LANES]``: receives each lane's head.
        tails: ``[LANES]``: receives each lane's oldest row.
        ids: ``[N]``, one for every row that can be stored: receives the first steps of the windows, lane by lane,
            oldest first.
        limits: ``[N]``: receives the row behind the successor of each window's last step: what the window may see.

    Returns:
        How many windows there are.
    """
    found = 0
    for lane in range(plan[LANES]):
        before, looking = found, True
        while looking:
            found, start = before, np.int64(-1)
            heads[lane] = load_acquire(plan[COMMITTED] + lane * 8)
            tails[lane] = max(0, load_acquire(plan[RESERVED] + lane * 8) - plan[LIVE])
            for row in range(tails[lane], heads[lane]):
                record = record_of(plan, lane, row)
                holds = row + 1 < heads[lane] and not load_u8(record + FLAGS) & CLOSING
                if start >= 0 and (not holds or index_of(record) % length == 0 or row - start == length):
                    ids[found], limits[found] = (lane << LANE_SHIFT) | start, row + 1
                    found, start = found + 1, np.int64(-1)
                if holds and start < 0:
                    start = np.int64(row)
            fence()
            looking = is_stale(plan, lane, tails[lane])  # a writer has overwritten the tail meanwhile: look again
    return found


@kernel("int64(int64[::1], int64[::1], int64[:, ::1], int64, int64[::1], int64[::1], int64[::1], int64, int64)")
def gather_stored_stacks(
    plan: np.ndarray,
    tails: np.ndarray,
    fields: np.ndarray,
    block: int,
    ids: np.ndarray,
    limits: np.ndarray,
    todo: np.ndarray,
    n_step: int,
    back: int,
) -> int:
    """Gather what `gather_stacks` does, for any stored step: where frames are gone the oldest one stored stands in.

    Args:
        plan: The storage.
        tails: ``[LANES]``, each lane's oldest row.
        fields: Field table of the stacked fields; OTHER is the field's offset in the block.
        block: Address of the block.
        ids: ``[B]``.
        limits: ``[B]``, the heads that a sample may see up to.
        todo: Which rows of the batch to gather; receives, in its front, those that were overwritten meanwhile.
        n_step: Steps to the successor.
        back: Rows before the step that are touched.

    Returns:
        How many were overwritten.
    """
    stale = 0
    for n in range(len(todo)):
        i = todo[n]
        lane, row = ids[i] >> LANE_SHIFT, ids[i] & ROW_MASK
        first = max(tails[lane], first_row(plan, lane, row))
        successor = last_row(plan, lane, row, limits[i], n_step)
        if stack_transition(plan, fields, block, i, lane, row, successor, first, back):
            todo[stale] = i
            stale += 1
    return stale
