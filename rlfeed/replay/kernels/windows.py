"""From rows to padded windows of steps: resolved first, then one pass over the rows, and the re-check."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.rows import (
    BASE,
    FIRST,
    FLAGS,
    LANE_SHIFT,
    NBYTES,
    OTHER,
    PITCH,
    REWARD,
    ROLE,
    ROLE_CARRY,
    ROLE_OBSERVATION,
    ROLE_PREVIOUS,
    ROW_MASK,
    ROWS,
    TERMINATED,
    TRUNCATED,
    closing_row,
    first_row,
    is_stale,
    record_of,
)
from rlfeed.replay.kernels.words import (
    copy_row,
    fence,
    kernel,
    load_f32,
    load_u8,
    memzero,
    store_f32,
    store_i64,
    store_u8,
)


@kernel("int64(int64[::1], int64[::1], int64[::1], int64[::1], int64, int64, int64[:, ::1])")
def resolve_windows(
    plan: np.ndarray, ids: np.ndarray, limits: np.ndarray, todo: np.ndarray, length: int, back: int, windows: np.ndarray
) -> int:
    """Find the rows of each window: where it begins, how many steps it has and how many of them are burn-in.

    Args:
        plan: The storage.
        ids: ``[B]``, the first trained steps.
        limits: ``[B]``, the heads at the draws.
        todo: Which to find; receives, in its front, those that were overwritten meanwhile.
        length: Trained steps at most.
        back: Burn-in steps at most.
        windows: ``[B, 4]``: receives first row, steps, burn-in, and 1 where a step of the episode lies before.

    Returns:
        How many were overwritten: their windows are not to be trusted.
    """
    stale = 0
    for i in range(len(todo)):
        at = todo[i]
        identity, limit = ids[at], limits[at]
        lane, row = identity >> LANE_SHIFT, identity & ROW_MASK
        first = first_row(plan, lane, row)
        begin = row - back if first < 0 else max(first, row - back)
        end = min(min(closing_row(plan, lane, row, limit), limit - 1), row + length)
        windows[at, 0] = begin
        windows[at, 1] = max(1, end - begin)
        windows[at, 2] = row - begin
        windows[at, 3] = begin != first
        fence()
        if is_stale(plan, lane, begin - windows[at, 3]):
            todo[stale] = at
            stale += 1
    return stale


@njit
def gather_field(
    plan: np.ndarray, field: np.ndarray, block: int, lane: int, window: np.ndarray, i: int, longest: int
) -> None:
    """Copy one field of one window and clear what lies behind it."""
    nbytes, role, rows = field[NBYTES], field[ROLE], plan[ROWS]
    base = field[BASE] + lane * rows * field[PITCH]
    begin, steps, room = window[0], window[1], longest
    if role == ROLE_OBSERVATION:
        steps, room = steps + 1, longest + 1
    elif role == ROLE_CARRY:
        steps, room = 1, 1
    elif role == ROLE_PREVIOUS:
        begin, steps, room = begin - 1, window[3], 1
    destination = block + field[OTHER] + i * room * nbytes
    slot = begin % rows
    for t in range(steps):
        copy_row(destination + t * nbytes, base + slot * field[PITCH], nbytes)
        slot = slot + 1 if slot + 1 < rows else 0
    memzero(destination + steps * nbytes, (room - steps) * nbytes)


@njit
def gather_flags(
    plan: np.ndarray, block: int, identity: int, window: np.ndarray, i: int, longest: int, gamma: float, out: np.ndarray
) -> None:
    """Store what is computed for one window, step by step, and clear what lies behind it."""
    lane, begin, steps, burn, before = identity >> LANE_SHIFT, window[0], window[1], window[2], window[3]
    for t in range(longest):
        at = i * longest + t
        inside = t < steps
        flags, reward = np.uint8(0), np.float32(0.0)
        if inside:
            record = record_of(plan, lane, begin + t)
            flags, reward = load_u8(record + FLAGS), load_f32(record + plan[REWARD])
        terminated = flags & TERMINATED != 0
        store_f32(block + out[0] + at * 4, reward)
        store_u8(block + out[1] + at, np.uint8(terminated))
        store_u8(block + out[2] + at, np.uint8(flags & TRUNCATED != 0))
        store_f32(block + out[3] + at * 4, np.float32(gamma) if inside and not terminated else np.float32(0.0))
        store_u8(block + out[4] + at, np.uint8(inside))
        store_u8(block + out[5] + at, np.uint8(inside and t >= burn))
        store_u8(block + out[6] + at, np.uint8(flags & FIRST != 0))
    store_i64(block + out[7] + i * 8, steps)
    store_i64(block + out[8] + i * 8, burn)
    previous = load_f32(record_of(plan, lane, begin - 1) + plan[REWARD]) if before else np.float32(0.0)
    store_f32(block + out[9] + i * 4, previous)
    store_f32(block + out[10] + i * 4, np.float32(1.0))
    store_i64(block + out[11] + i * 8, identity)


@kernel("int64(int64[::1], int64[:, ::1], int64, int64[::1], int64[:, ::1], int64[::1], int64, float64, int64[::1])")
def gather_windows(
    plan: np.ndarray,
    fields: np.ndarray,
    block: int,
    ids: np.ndarray,
    windows: np.ndarray,
    todo: np.ndarray,
    longest: int,
    gamma: float,
    out: np.ndarray,
) -> int:
    """Gather windows of steps into padded, dense fields of a block; padding is zeros.

    Args:
        plan: The storage.
        fields: Field table; OTHER is the field's offset in the block.
        block: Address of the block.
        ids: ``[B]``.
        windows: From `resolve_windows`.
        todo: Which to gather; receives, in its front, those that were overwritten meanwhile.
        longest: T, steps per padded row.
        gamma: Discount per step.
        out: Offsets in the block of reward, terminated, truncated, discount, mask, loss_mask, is_first, lengths,
            burn_in, prev_reward, weights and ids.

    Returns:
        How many were overwritten.
    """
    stale = 0
    for n in range(len(todo)):
        i = todo[n]
        gather_flags(plan, block, ids[i], windows[i], i, longest, gamma, out)
        for f in range(fields.shape[0]):
            gather_field(plan, fields[f], block, ids[i] >> LANE_SHIFT, windows[i], i, longest)
        fence()
        if is_stale(plan, ids[i] >> LANE_SHIFT, windows[i, 0] - windows[i, 3]):
            todo[stale] = i
            stale += 1
    return stale
